"""The HTTP edge: REST and the page in front, the three gRPC services behind. No torch in here."""
