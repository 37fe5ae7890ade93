"""Measurements behind the claims about cost; each module is a command of its own."""
