"""What is known of a stored tensor without reading it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

# The safetensors format's names for dtypes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def check_tensor(name: Any, tensor: Any, label: str) -> None:
    """Raise CheckpointError for what no safetensors file could hold: a state dict or a pickle may."""
    if not isinstance(name, str):
        raise CheckpointError(f'"{label}": a tensor is called {name!r}, which is no text; save it by name')
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f'"{label}": {name} is a {type(tensor).__name__} and no tensor; leave it out, or convert it'
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
        kind = "has no numbers (device meta)" if tensor.is_meta else f"is {tensor.layout}, {tensor.dtype}"
        raise CheckpointError(f'"{label}": tensor {name} {kind}, which is not supported')
