"""Models whose weights stay frozen: loaded, or trained here on public data."""
