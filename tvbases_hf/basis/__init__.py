"""The basis artefact: vectors and a decoder that stand for T task vectors, on disk and in memory."""

from .basis import Basis
from .lora import LoraBasis

__all__ = ["Basis", "LoraBasis"]
