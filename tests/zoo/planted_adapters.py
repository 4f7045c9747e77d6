"""A few adapters in families, over a base of tiny matrices: what a library is made of."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks import planted

from zoo.adapter_families import Adapters
from zoo.peft_models import Case

SHAPES = {"self_attn.q_proj": (96, 80), "self_attn.v_proj": (48, 80), "mlp.up_proj": (144, 80)}
FAMILIES, LONERS, RANK, WIDTH = 2, 5, 8, 12


def planted_adapters(root: Path, count: int, *, noise: float = 1e-3, dtype: torch.dtype = torch.float32) -> Adapters:
    """Adapters t0, t1, ...: even and odd ones are of two families, every fifth is of none."""
    base = planted.write_base(root / "base", 2, SHAPES)
    how = {"layers": 2, "families": FAMILIES, "rank": RANK, "width": WIDTH, "loners": LONERS, "shapes": SHAPES}
    tasks = {
        f"t{index}": planted.write_adapter(root / f"t{index}", index, noise=noise, dtype=dtype, **how)
        for index in range(count)
    }
    return Adapters(Case("llama", {}), base, tasks)
