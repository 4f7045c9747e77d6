"""Small checkpoints on disk without transformers: made fast, written by safetensors and torch, read back by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvbases_hf import Vectors

State = dict[str, Tensor]

# The shapes of a small language model: embeddings, matrices wide and tall, norms, a convolution, a scalar.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 40),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.conv.weight": (4, 2, 3, 3),
    "model.layers.0.scale": (),
    "model.norm.weight": (16,),
    "lm_head.weight": (50, 16),
}
CONFIG = {"model_type": "small", "tie_word_embeddings": False, "torch_dtype": "float32"}
TUNING = 0.01


def random_state(
    seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> State:
    """Normal numbers, and an integer buffer as old checkpoints have it."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"model.position_ids": torch.arange(20)}


def tune(base: Mapping[str, Tensor], seed: int, size: float = TUNING) -> State:
    """A fine-tune: every number moved by about ``size`` times its typical magnitude, in the stored dtype."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
    }


def save_checkpoint(
    directory: Path,
    state: Mapping[str, Tensor],
    *,
    shards: int = 1,
    kind: str = "safetensors",
    config: Mapping[str, object] | None = None,
) -> Path:
    """``state`` as transformers lays it out: one file, or shards with an index; kind "bin" for PyTorch files."""
    directory.mkdir(parents=True, exist_ok=True)
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")

    def write(file: str, part: Mapping[str, Tensor]) -> None:
        if kind == "safetensors":
            save_file({name: tensor.contiguous() for name, tensor in part.items()}, directory / file, {"format": "pt"})
        else:
            torch.save(dict(part), directory / file)

    if shards == 1:
        write(f"{stem}.{ending}", state)
    else:
        names = list(state)
        weight_map = {}
        for shard in range(shards):
            file = f"{stem}-{shard + 1:05}-of-{shards:05}.{ending}"
            part = {name: state[name] for name in names[shard::shards]}  # neighbours apart, so that order differs
            write(file, part)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config), encoding="utf-8")
    return directory


def random_checkpoint(
    directory: Path,
    seed: int,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> Path:
    """A model of random numbers, in a directory of its own."""
    return save_checkpoint(directory, random_state(seed, dtype, shapes), shards=3 if sharded else 1)


@dataclass(frozen=True)
class Models:
    """A base and its fine-tunes, as directories and as the numbers in them."""

    base: Path
    tasks: dict[str, Path]
    base_state: State
    states: dict[str, State]

    def vectors(self) -> Vectors:
        return Vectors.open(self.base, {task: path for task, path in self.tasks.items()})


def random_models(
    directory: Path,
    num_tasks: int = 3,
    *,
    seed: int = 0,
    shards: int = 1,
    kind: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    size: float = TUNING,
) -> Models:
    """A base and ``num_tasks`` fine-tunes, all stored in one way."""
    base = random_state(seed, dtype, shapes)
    states = {f"task{i}": tune(base, seed * 100 + i, size) for i in range(num_tasks)}
    paths = {
        name: save_checkpoint(directory / name, state, shards=shards, kind=kind)
        for name, state in {"base": base, **states}.items()
    }
    return Models(paths.pop("base"), paths, base, states)


def flat(state: Mapping[str, Tensor], names: list[str] | None = None) -> Tensor:
    """[d] all floating-point numbers of a model, by sorted name, float64."""
    names = sorted(n for n, t in state.items() if t.is_floating_point()) if names is None else names
    return torch.cat([state[name].reshape(-1).to(torch.float64) for name in names])


def dense_task_matrix(base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """[d, T] the task vectors from the stored numbers, float64: the oracle of most tests."""
    names = sorted(n for n, t in base.items() if t.is_floating_point())
    return torch.stack([flat(state, names) - flat(base, names) for state in states.values()], dim=1)


def read_directory(directory: Path) -> State:
    """All tensors of a directory's safetensors files, by safetensors itself."""
    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state
