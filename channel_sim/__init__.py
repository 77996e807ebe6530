"""Symbols in, faded and noisy symbols out: the air between transmitter and receiver."""
