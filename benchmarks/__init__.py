"""Ours against its peers, side by side."""

ALPHA = 0.1
"""The rate of every program's inner step, where it starts."""
