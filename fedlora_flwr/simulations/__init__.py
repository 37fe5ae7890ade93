"""Runs on one machine: in this process, or on Flower's simulation engine."""
