"""Clients on real devices: making a fleet, checking it, and starting its devices."""
