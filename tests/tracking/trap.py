"""A module that no device may load."""

raise AssertionError("A device has loaded a server's code.")
