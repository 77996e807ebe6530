"""Photograph and sentence in, symbols out."""
