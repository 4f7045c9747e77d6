"""What all number formats share: the stored tensors that they are found in, and codes times scales in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..tensors import TensorInfo

# Numbers that are dequantised at a time, so that little is in memory beside the result.
CHUNK_NUMBERS = 1 << 18


@dataclass(frozen=True)
class Stored:
    """The tensors as a model's files hold them.

    ``method`` is its quantization_config, empty where it has none, and ``model_type`` its architecture.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    method: Mapping[str, Any]
    model_type: str = ""

    @property
    def format(self) -> str:
        """What the configuration calls the format."""
        return str(self.method.get("quant_method") or "")

    def refused(self, name: str, what: str) -> CheckpointError:
        """The error for a weight whose codes cannot be read."""
        return CheckpointError(
            f'"{self.label}": {name} is quantised ({what}), which is not read here; give the model as it was before '
            "that, or load it with its own library, call model.dequantize() and save it"
        )


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight as the model computes with it: ``info`` dequantised, and the stored tensors that hold it."""

    format: str
    info: TensorInfo
    parts: tuple[str, ...]
    dequantise: Callable[[], Tensor]


def row_chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of about CHUNK_NUMBERS numbers, each beginning at a multiple of ``multiple``."""
    step = max(1, CHUNK_NUMBERS // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def scale_into(
    out: Tensor,
    codes: Callable[[int, int], Tensor],
    scales: Tensor,
    zeros: Tensor | None,
    groups: tuple[Tensor, Tensor],
) -> Tensor:
    """Put (codes - zeros) * scales, computed in the dtype of ``scales``, into ``out`` [n, m], and return it.

    Args:
        codes: the rows start to stop, [stop - start, m] of any dtype.
        scales: [rows of groups, columns of groups], of the dtype of ``out``.
        zeros: the same shape, of integers; None for none.
        groups: for each of the n rows and of the m columns, where in ``scales`` it is; int64.
    """
    rows, columns = groups
    for start, stop in row_chunks(*out.shape):
        part, row = codes(start, stop).to(scales.dtype), rows[start:stop]
        if zeros is not None:
            part -= zeros[row].to(scales.dtype)[:, columns]
        torch.mul(part, scales[row][:, columns], out=out[start:stop])
    return out


def groups_of(size: int, count: int, block: int | None = None) -> Tensor | None:
    """[size] which of ``count`` blocks each index is in: of ``block`` each, else equal ones; None if neither fits."""
    if block is not None and -(-size // block) == count:
        return torch.arange(size) // block
    return None if count == 0 or size % count else torch.arange(size) // (size // count)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[n, k] int32 to [n, k * 32 / bits] int32 codes, the lowest bits of a word first; ``bits`` divides 32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)
