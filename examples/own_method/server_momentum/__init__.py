"""A strategy that remembers which way the global arrays moved."""
