"""Received symbols in, photograph out."""
