"""Style mixing in diffusers pipelines: the unique components of several LoRAs as one adapter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mixing import StyleMix, mix_styles, set_style_scales, unload_styles
    from .modular import MixStylesStep

# Loaded when first used: MixStylesStep needs a diffusers with modular pipelines, the others do not.
_HOME = {
    "MixStylesStep": "modular",
    "StyleMix": "mixing",
    "mix_styles": "mixing",
    "set_style_scales": "mixing",
    "unload_styles": "mixing",
}

__all__ = ["MixStylesStep", "StyleMix", "mix_styles", "set_style_scales", "unload_styles"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
