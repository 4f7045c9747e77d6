"""Checkpoints whose weights are codes: what other libraries stored and computed of them, and codes made here.

``quantised_weights.safetensors`` holds one weight per case as the library that owns the format stores it, and as
``expected`` what that library dequantises on a CPU; its header has the versions and every case's quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .models import State, save_checkpoint

RECORDED = Path(__file__).with_name("quantised_weights.safetensors")
MODULE = "model.layers.0.mlp.down_proj"
FLOAT8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@dataclass(frozen=True)
class Recorded:
    """One weight as it is stored, by what its names end in; what it stands for; and how the configuration calls it."""

    stored: State
    expected: Tensor
    method: dict[str, Any]

    def save(self, directory: Path, module: str = MODULE, **config: object) -> Path:
        """A model of this weight and a norm."""
        state = {f"{module}.{end}": tensor for end, tensor in self.stored.items()} | {
            "model.norm.weight": torch.ones(4)
        }
        return save_checkpoint(directory, state, config={"quantization_config": self.method, **config})


def recorded() -> dict[str, Recorded]:
    """All cases by name."""
    with safe_open(str(RECORDED), framework="pt") as file:
        header = dict(file.metadata())
        cases: dict[str, State] = {name: {} for name in sorted(header) if name != "versions"}
        for key in file.keys():  # noqa: SIM118
            case, _, end = key.partition("/")
            cases[case][end] = file.get_tensor(key)
    return {name: Recorded(state, state.pop("expected"), json.loads(header[name])) for name, state in cases.items()}


def float8_blocks(state: Mapping[str, Tensor], block: int = 16) -> State:
    """The matrices of a Llama's layers as float8 with a float32 scale per block, as DeepSeek's files have them."""
    found = {}
    for name, tensor in state.items():
        if "proj" not in name:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        parts = tensor.float().reshape(rows // block, block, columns // block, block)
        scale = parts.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (parts / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        found[name], found[f"{name}_scale_inv"] = codes.reshape(rows, columns), scale
    return found


def int8_rows(state: Mapping[str, Tensor]) -> State:
    """The same matrices as bitsandbytes stores them with load_in_8bit."""
    found = {}
    for name, tensor in state.items():
        if "proj" not in name:
            found[name] = tensor
            continue
        largest = tensor.float().abs().amax(1)
        found[name] = (tensor.float() / largest[:, None] * 127).round().to(torch.int8)
        found[f"{name.removesuffix('weight')}SCB"] = largest
    return found


def packed(codes: Tensor, bits: int) -> Tensor:
    """[n, k] codes of ``bits`` bits to [n, k * bits / 32] int32 words, the first code in the lowest bits."""
    words = codes.long().unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    total = words.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def declare(directory: Path, method: Mapping[str, object]) -> None:
    """Say in a model's configuration that it is quantised."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(method)}), encoding="utf-8")
