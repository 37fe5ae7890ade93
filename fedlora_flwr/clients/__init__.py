"""What runs on a client: local private training and its Flower client."""
