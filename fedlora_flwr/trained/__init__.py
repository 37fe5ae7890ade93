"""What is done with an adapter after a run: open it, measure it, predict with it, merge it."""
