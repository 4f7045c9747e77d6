"""Checkpoints read lazily by name, and directories that are written whole or not at all."""
