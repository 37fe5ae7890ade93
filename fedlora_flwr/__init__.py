"""Differentially private federated LoRA on Flower."""
