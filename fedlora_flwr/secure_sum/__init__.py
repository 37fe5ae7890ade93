"""Secure sums: each client adds its share of the noise, and the server sees only the sum."""
