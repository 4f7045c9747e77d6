"""Bases of LoRA adapters: candidates in factor space, the choice between them, what is stored."""
