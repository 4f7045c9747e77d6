"""Small LoRA files in the formats of image models, and what they mean by definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, LowRank, dense
from zoo.peft_models import relative

SIDE, RANK, ALPHA = 32, 4, 3.0


def factors(seed: int, rows: int, columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """down [rank, columns] and up [rows, rank]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def kohya(
    shapes: dict[str, tuple[int, int]], alpha: float | None = ALPHA, rank: int = RANK, step: float = 1.0
) -> dict[str, Tensor]:
    """kohya's names: NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha; alpha grows by ``step`` per module."""
    state = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = factors(seed, rows, columns, rank)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha + step * seed)
    return state


def change(state: dict[str, Tensor], name: str) -> Tensor:
    """alpha / rank * up @ down, as kohya defines it."""
    down, up = state[f"{name}.lora_down.weight"].double(), state[f"{name}.lora_up.weight"].double()
    alpha = float(state.get(f"{name}.alpha", torch.tensor(float(len(down)))))
    return alpha / len(down) * up.flatten(1) @ down.flatten(1)


def write(directory: Path, state: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> Path:
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})
    file = directory / "style.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file, header)
    return file


def assert_same(found: dict[str, Delta], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, delta in found.items():
        assert isinstance(delta, LowRank)
        assert relative(dense(delta), expected[name]) <= 1e-6, name


FLUX_SHAPES = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * SIDE, SIDE),
    "lora_unet_double_blocks_0_txt_attn_qkv": (3 * SIDE, SIDE),
    "lora_unet_double_blocks_0_img_attn_proj": (SIDE, SIDE),
    "lora_unet_double_blocks_0_txt_mlp_0": (4 * SIDE, SIDE),
    "lora_unet_double_blocks_0_img_mod_lin": (6 * SIDE, SIDE),
    "lora_unet_single_blocks_0_linear2": (SIDE, 5 * SIDE),
}
