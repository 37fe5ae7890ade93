"""A Flower project with a model and a training loop of its own."""
