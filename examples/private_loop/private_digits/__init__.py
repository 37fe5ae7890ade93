"""A Flower project whose client trains under a private step."""
