"""Private federated LoRA inside existing projects."""
