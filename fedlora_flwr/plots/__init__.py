"""Pictures of results. matplotlib is imported where it draws, so that runs start without it."""
