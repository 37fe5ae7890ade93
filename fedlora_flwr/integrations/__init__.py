"""Private federated LoRA inside projects that exist already."""
