"""An app in the browser: a weight for every task as a slider, and what the model writes before and after."""

from __future__ import annotations

from .mixer import Mixer
from .page import build, launch, look

__all__ = ["Mixer", "build", "launch", "look"]
