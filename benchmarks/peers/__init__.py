"""Attacks on the code of others, which you fetch yourself: nothing of it is in this repository."""
