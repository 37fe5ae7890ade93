"""The client's side of a run: local private training and its Flower client."""
