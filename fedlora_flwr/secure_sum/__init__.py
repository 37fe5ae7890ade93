"""Noise that clients share, for a sum that is all that the server sees."""
