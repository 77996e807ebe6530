"""Measuring: what the system costs and how good its pictures are."""
