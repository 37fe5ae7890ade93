"""Real clients on real devices: what a fleet needs, and whether it is fit to start."""
