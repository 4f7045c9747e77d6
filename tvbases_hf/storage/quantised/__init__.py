"""Weights that are stored as codes, read as the numbers that they stand for: one file per family of formats.

Every format is read as the library that owns it computes it on a CPU, in the dtype that it gives. What is stored as
codes in a way that none of them knows is refused by name: codes are never taken for numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..json_files import read_json
from ..tensors import TensorInfo
from . import bitsandbytes, compressed, float8, gptq, mxfp4
from .weight import QuantisedWeight, Stored

__all__ = [
    "CONFIG_FILES",
    "QuantisedWeight",
    "numbers_of",
    "quantisation",
    "without_quantisation",
    "written_dtype",
]

FORMATS = (float8, bitsandbytes, gptq, compressed, mxfp4)
# Where a configuration says how the weights are stored, and files beside it that say so for other programs.
CONFIG_KEYS = ("quantization_config", "compression_config")
CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
PARTS = ("text_config", "llm_config", "language_config")
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
# What is stored beside quantised weights for activations and caches, and means nothing without them.
ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point", "input_global_scale", "input_scale_ub")
ACTIVATIONS += ("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
ACTIVATIONS += ("scaled_fp8", "scale_input")


def numbers_of(
    label: str,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    method: Mapping[str, Any],
) -> tuple[dict[str, TensorInfo], dict[str, QuantisedWeight]]:
    """The tensors as the model computes with them, and those of them that are dequantised when they are read.

    ``method`` is how the weights are stored, as ``quantisation`` finds it. Raises CheckpointError for codes that no
    format here can read.
    """
    stored = Stored(label, tensors, read, method, str(config.get("model_type") or ""))
    found: dict[str, QuantisedWeight] = {}
    for format in FORMATS:
        found |= format.find(stored)
    owner = {part: name for name, weight in found.items() for part in weight.parts}
    if found or method:
        owner |= {name: "" for name in tensors if name.rpartition(".")[2] in ACTIVATIONS and name not in owner}
    if config or method:
        _check_rest(stored, [name for name in tensors if name not in owner], bool(found))
    logical: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        weight = owner.get(name, name)
        if weight:
            logical[weight] = found[weight].info if weight in found else info
    return logical, found


def _check_rest(stored: Stored, names: list[str], any_found: bool) -> None:
    """CheckpointError for matrices of integers that are called weights, or are in a model that is said to be quantised,
    for float8 without scales there, and for exponents, which are scales and no numbers of a model."""
    odd = [name for name in names if _is_code(name, stored.tensors[name], any_found or bool(stored.format))]
    if odd:
        info = stored.tensors[odd[0]]
        dtype = str(info.dtype).removeprefix("torch.")
        kind = stored.format or "an unknown format"
        more = f"; {len(odd)} tensors are stored so" if len(odd) > 1 else ""
        raise stored.refused(odd[0], f"{kind}, {dtype} {list(info.shape)}{more}")


def _is_code(name: str, info: TensorInfo, is_quantised: bool) -> bool:
    if info.dtype in float8.CODES:
        return is_quantised
    if info.dtype == float8.EXPONENTS:
        return True  # scales, which no weight has been found for
    last = name.rpartition(".")[2]
    called_so = last != "bias" if is_quantised else "weight" in last  # GPT-2's old masks are integers called bias
    return info.dtype in INTEGERS and len(info.shape) > 1 and called_so


def quantisation(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How a model's configuration, or a file beside it, says that its weights are stored; empty where none does."""
    for part in (config, *(config.get(key) for key in PARTS)):
        for key in CONFIG_KEYS:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                return dict(part[key])
    for file in CONFIG_FILES:
        try:
            found = read_json(directory / file)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return {"quant_method": "gptq" if file == CONFIG_FILES[0] else "", **found}
    return {}


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those of its parts, without what it says of how weights are stored."""
    return {
        key: without_quantisation(value) if key in PARTS and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def written_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a dequantised weight is stored in again: the 16-bit float that its model declares, else bfloat16."""
    declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return torch.float16 if declared == "float16" else torch.bfloat16
