"""Adapters of one rank everywhere: the same change without rank_pattern and alpha_pattern, which few loaders read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .lora_config import LoraOptions
from .lora_parts import FACTOR, PREFIX

# By part: the dimension that is as long as the rank. A convolution's factors have more dimensions behind these.
RANK_DIMENSION = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}


def equal_rank(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors padded with zeros to the largest rank, and a configuration with one rank and one alpha.

    Where modules are scaled differently, the second factor (and a bias beside it) takes up the difference.
    """
    options = LoraOptions.parse(config, "the adapter")
    modules = {match["module"] for key in tensors if (match := FACTOR.match(key.removeprefix(PREFIX)))}
    ranks = {module: options.rank_of(module) for module in modules}
    scales = {module: options.scaling(module, rank) for module, rank in ranks.items()}
    rank = max(ranks.values(), default=options.rank)
    common = scales[min(scales)] if len(set(scales.values())) == 1 else 1.0
    found = {}
    for key, tensor in tensors.items():
        match = FACTOR.match(key.removeprefix(PREFIX))
        if match and match["part"] in RANK_DIMENSION:
            own, part = match["module"], match["part"]
            if part.endswith("_B") and scales[own] != common:
                tensor = tensor * (scales[own] / common)
            if match["kind"] != "bias":
                tensor = _padded(tensor, RANK_DIMENSION[part], rank)
        found[key] = tensor
    alpha = common * rank
    words = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    return found, {**config, **words, "rank_pattern": {}, "alpha_pattern": {}}


def _padded(factor: Tensor, dimension: int, rank: int) -> Tensor:
    more = list(factor.shape)
    more[dimension] = rank - more[dimension]
    return torch.cat([factor, factor.new_zeros(more)], dim=dimension) if more[dimension] else factor
