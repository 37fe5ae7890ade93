"""What the Makefile calls: no part of the package, and nothing that is imported."""
