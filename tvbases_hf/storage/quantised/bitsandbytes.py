"""bitsandbytes: 4-bit codes of a table (NF4, FP4) in blocks, and rows of int8.

4 bits (QLoRA, Dettmers et al., 2023): two codes a byte, the high half first, an ``absmax`` for every block of the
flattened weight; with double quantisation that is itself stored as 8-bit codes. 8 bits (LLM.int8()): the largest
magnitude of each row is code 127.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..json_files import parse_json
from ..tensors import TensorInfo
from .weight import QuantisedWeight, Stored, row_chunks

STATE = ".quant_state.bitsandbytes__"
TABLES = ("nf4", "fp4")
# Of weights that transformers' Conv1D holds the transpose is quantised.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# As a float32 number 1 / 127; bitsandbytes multiplies by it, which rounds otherwise than a division.
STEP = 7.874015718698502e-3


def find(stored: Stored) -> dict[str, QuantisedWeight]:
    """The weights that are stored so, by name; CheckpointError for what cannot be read of them."""
    found = {}
    for name in stored.tensors:
        weight, _, kind = name.partition(STATE)
        if kind:
            if kind not in TABLES or weight not in stored.tensors:
                raise stored.refused(weight, f"bitsandbytes {kind}")
            found[weight] = _four_bits(stored, weight, name)
        elif name.endswith(".SCB") and stored.tensors.get(rows := name.removesuffix("SCB") + "weight"):
            found[rows] = _eight_bits(stored, rows, name)
    return found


def _four_bits(stored: Stored, name: str, state_name: str) -> QuantisedWeight:
    state = _state(stored, name, state_name)
    shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    parts = [f"{name}.{end}" for end in ("absmax", "quant_map")]
    nested = [f"{name}.{end}" for end in ("nested_absmax", "nested_quant_map")] if "nested_offset" in state else []
    absent = [part for part in parts + nested if part not in stored.tensors]
    numbers = stored.tensors[name].nbytes * 2
    if absent or not 0 <= numbers - math.prod(shape) < 2:
        raise stored.refused(name, f"bitsandbytes 4 bits, {f'without {absent[0]}' if absent else f'{numbers} codes'}")

    def dequantise() -> Tensor:
        absmax, table = (stored.read(part) for part in parts)
        absmax, table = absmax.reshape(-1), table.to(torch.float32)
        scales, codes = (stored.read(part).to(torch.float32) for part in nested) if nested else (absmax, table)

        def of_blocks(start: int, stop: int) -> Tensor:
            if not nested:
                return absmax[start:stop].to(torch.float32)
            outer = torch.arange(start, min(stop, len(absmax))) // state["nested_blocksize"]
            return codes[absmax[start:stop].long()] * scales[outer] + torch.tensor(float(state["nested_offset"]))

        packed = stored.read(name).contiguous().reshape(-1).view(torch.uint8)
        out = torch.empty(math.prod(shape), dtype=dtype)
        _look_up(out, packed, table, of_blocks, state["blocksize"])
        return out.reshape(shape)

    return QuantisedWeight("bitsandbytes", TensorInfo(shape, dtype), (name, state_name, *parts, *nested), dequantise)


def _state(stored: Stored, name: str, state_name: str) -> Mapping[str, Any]:
    """What is stored as JSON of a weight: its shape, dtype and sizes of blocks."""
    try:
        state = parse_json(bytes(stored.read(state_name).tolist()))
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        sound = all(type(size) is int and size > 0 for size in sizes)
        sound &= state["dtype"] in ("float32", "float16", "bfloat16")
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise stored.refused(name, "bitsandbytes 4 bits with a damaged quant_state")
    if stored.model_type in TRANSPOSED:
        raise stored.refused(name, f"bitsandbytes 4 bits of a {stored.model_type} model, which keeps the transpose")
    return state


def _look_up(out: Tensor, codes: Tensor, table: Tensor, absmax: Callable[[int, int], Tensor], block: int) -> None:
    """Put table[code] * absmax of the code's block, computed in float32, into ``out`` [size]."""
    for start, stop in row_chunks(len(out), 1, 2 * block):
        part = codes[start // 2 : (stop + 1) // 2].int()
        values = table[torch.stack([part >> 4, part & 15], dim=1).reshape(-1)[: stop - start]]
        scales = absmax(start // block, -(-stop // block)).repeat_interleave(block)[: stop - start]
        torch.mul(values, scales, out=values)
        out[start:stop] = values


def _eight_bits(stored: Stored, name: str, scale: str) -> QuantisedWeight:
    info, layout = stored.tensors[name], name + "_format"
    if info.dtype != torch.int8 or len(info.shape) != 2 or stored.tensors[scale].numel != info.shape[0]:
        raise stored.refused(name, f"bitsandbytes 8 bits as {info.dtype}, {list(info.shape)}")
    parts = (name, scale, *([layout] if layout in stored.tensors else []))
    if layout in parts and int(stored.read(layout)) != 0:
        raise stored.refused(name, "bitsandbytes 8 bits in a layout of one GPU type")
    if stored.model_type in TRANSPOSED:
        raise stored.refused(name, f"bitsandbytes 8 bits of a {stored.model_type} model, which keeps the transpose")

    def dequantise() -> Tensor:
        codes, largest = stored.read(name), stored.read(scale).to(torch.float32).reshape(-1, 1)
        out = codes.to(torch.float32)
        for start, stop in row_chunks(*info.shape):
            out[start:stop].mul_(largest[start:stop]).mul_(STEP)
        return out

    return QuantisedWeight("bitsandbytes", TensorInfo(info.shape, torch.float32), parts, dequantise)
