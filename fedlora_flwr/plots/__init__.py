"""Pictures of results. Only functions that draw import matplotlib, so runs start without it."""
