"""What reads released quantities only, and so costs no privacy."""
