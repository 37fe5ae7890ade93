"""Records: where they come from, how they are read, kept and dealt out to clients."""
