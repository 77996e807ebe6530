"""What the paper compares with: separate source and channel coding, a learned codec, controls."""
