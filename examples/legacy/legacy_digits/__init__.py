"""A Flower project of old: client_fn, server_fn, a NumPyClient."""
