"""LoRA adapters on a backbone, and the backbone's frozen weights."""
