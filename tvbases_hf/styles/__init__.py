"""LoRA files of image models, and mixtures of their unique components."""
