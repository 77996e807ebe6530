"""Code generated from proto/edsc.proto. Never edited; `make proto` writes it anew."""
