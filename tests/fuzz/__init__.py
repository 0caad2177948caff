"""Hostile files for everything that the package reads from disk, and a watch over what reading them does."""
