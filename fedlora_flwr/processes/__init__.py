"""Processes of this machine: independent jobs, and children that end with their parent."""
