"""Bytes, threads and processes: models read by tensor, directories written whole or not at all."""
