"""Models in the shapes of Llama: their tensors, and checkpoints of them with made-up numbers, compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARDS = 3
WORDS, STEP = 15_485_863, 15_485_867  # primes near 2^24: patterns of numbers that do not repeat together


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    vocabulary: int = 128_256
    head: int = 64
    tied: bool = True
    """Whether the output embedding is the input embedding, and not stored."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        h, f, kv = self.hidden, self.intermediate, self.key_value
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
            shapes |= {f"{attention}{name}_proj.weight": (h, h) for name in "qo"}
            shapes |= {f"{attention}{name}_proj.weight": (kv, h) for name in "kv"}
            shapes |= {
                f"{mlp}gate_proj.weight": (f, h),
                f"{mlp}up_proj.weight": (f, h),
                f"{mlp}down_proj.weight": (h, f),
            }
            shapes |= {f"model.layers.{layer}.{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
        shapes["model.norm.weight"] = (h,)
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocabulary, h)}

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [torch.Size(shape).numel() for shape in self.tensors().values()]

    @property
    def nbytes(self) -> int:
        return 2 * sum(self.sizes)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": max(1, self.key_value // self.head),
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


LLAMA_1B = Shape(hidden=2048, intermediate=8192, layers=16, key_value=512)
LLAMA_8B = Shape(hidden=4096, intermediate=14_336, layers=32, key_value=1024, head=128, tied=False)


def write_model(directory: Path, shape: Shape, seed: int, shards: int = SHARDS) -> int:
    """A base (seed 0), or a fine-tune that differs from it by about one per cent, in bfloat16; returns its bytes."""
    base = torch.randn(WORDS, generator=torch.Generator().manual_seed(0)) * 0.02
    step = torch.randn(STEP, generator=torch.Generator().manual_seed(seed)) * 2e-4 if seed else None
    directory.mkdir()
    files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    parts: list[dict[str, Tensor]] = [{} for _ in files]
    weight_map: dict[str, str] = {}
    start, total = 0, sum(shape.sizes)
    for name, size in shape.tensors().items():
        numbers = torch.Size(size).numel()
        tensor = _cut(base, start, numbers)
        if step is not None:
            tensor += _cut(step, start, numbers)
        index = min(shards - 1, start * shards // total)
        parts[index][name] = tensor.to(torch.bfloat16).reshape(size)
        weight_map[name] = files[index]
        start += numbers
    for file, part in zip(files, parts, strict=True):
        save_file(part, directory / file, {"format": "pt"})
    index_file = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    return shape.nbytes


def _cut(pattern: Tensor, start: int, count: int) -> Tensor:
    """``count`` numbers of the endlessly repeated pattern, from ``start``."""
    start %= len(pattern)
    return pattern.repeat((start + count) // len(pattern) + 1)[start : start + count]


def difference(first: Path, second: Path) -> dict[str, float]:
    """Of two bfloat16 checkpoints: largest distance in units in the last place, share of numbers that differ."""
    ours, theirs = _tensors(first), _tensors(second)
    largest = differing = count = 0
    for name in ours:
        a, b = (_ordered(source[name](name)) for source in (ours, theirs))
        apart = (a - b).abs()
        largest, differing, count = (
            max(largest, int(apart.max())),
            differing + int((apart > 0).sum()),
            count + a.numel(),
        )
    return {"ulps": largest, "share": differing / count}


def _tensors(directory: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        handle = safe_open(str(file), framework="pt")
        found |= {name: handle.get_tensor for name in handle.keys()}  # noqa: SIM118
    return found


def _ordered(tensor: Tensor) -> Tensor:
    """Neighbouring bfloat16 numbers as neighbouring integers."""
    bits = tensor.reshape(-1).view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
