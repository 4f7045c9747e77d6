"""Adapters with planted common subspaces, in the shapes of SmolLM2-135M: what bench_library.py compresses.

Adapter t of family f changes a weight by U_f C_t V_f^T plus noise, rank 16: U_f and V_f have ``width`` orthonormal
columns, C_t is normal and of rank 16, and noise in both factors has ``noise`` of the change's squared norm. Every
``loners``-th adapter belongs to no family.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, KEYS = 576, 1536, 192
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def weights(layers: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(layers):
        for module, shape in shapes.items():
            yield f"model.layers.{layer}.{module}", shape


def write_base(directory: Path, layers: int = 30, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Path:
    """A base of these shapes, with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": 0.05 * torch.randn(shape, generator=generator).bfloat16()
        for name, shape in weights(layers, shapes)
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    words = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
    words |= {"intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 9}
    words |= {"num_key_value_heads": 3, "vocab_size": 64, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(words))
    return directory


def family_of(index: int, families: int, loners: int) -> int | None:
    return None if loners and index % loners == loners - 1 else index % families


def write_adapter(
    directory: Path,
    index: int,
    *,
    layers: int = 30,
    families: int = 20,
    rank: int = 16,
    width: int = 24,
    noise: float = 0.005,
    loners: int = 100,
    dtype: torch.dtype = torch.bfloat16,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> Path:
    """Adapter number ``index``: the same one whenever it is written."""
    directory.mkdir(parents=True, exist_ok=True)
    own, family = torch.Generator().manual_seed(1_000_003 + index), family_of(index, families, loners)
    tensors: dict[str, Tensor] = {}
    for place, (name, (outputs, inputs)) in enumerate(weights(layers, shapes)):
        b, a = torch.randn(outputs, rank, generator=own), torch.randn(rank, inputs, generator=own)
        if family is not None:
            shared = torch.Generator().manual_seed(7919 * family + place)
            left = torch.randn(outputs, width, generator=shared) / outputs**0.5
            right = torch.randn(width, inputs, generator=shared) / inputs**0.5
            half = (noise / 2) ** 0.5  # of each factor: the product's noise has twice that in squares
            b = left @ torch.randn(width, rank, generator=own) / width**0.5 + half / outputs**0.5 * b
            a = torch.randn(rank, width, generator=own) @ right / width**0.5 + half / inputs**0.5 * a
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (0.05 * b).to(dtype).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    words |= {"target_modules": sorted({name.rpartition(".")[2] for name in shapes}), "inference_mode": True}
    words |= {"base_model_name_or_path": "planted", "lora_dropout": 0.0, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(words))
    return directory
