"""The main job on real weights: fine-tune, compress, merge with mergekit, compare. `tvbases demo` runs it."""

from .run import Settings, run_demo

__all__ = ["Settings", "run_demo"]
