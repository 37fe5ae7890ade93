"""Records: where they come from, and how they are read, cached and dealt out to clients."""
