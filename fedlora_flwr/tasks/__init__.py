"""Tasks: what a federation learns, from which records, and how clients share the records."""
