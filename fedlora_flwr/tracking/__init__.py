"""Programs that show a run's figures while it trains. Each is imported only where it is named."""
