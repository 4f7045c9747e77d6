"""The adapters that a basis is made of: their low-rank changes, and what is kept as it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...algebra.delta import Delta, Dense, LowRank, dense, low_parts
from ...errors import ParameterError
from ...models.adapter import Adapter
from ...models.gram import Gram
from ...models.lora_config import is_lora
from ...models.lora_files import adapter_tensors
from ...models.lora_template import Template
from ...models.vectors import Vectors
from ...options import options_of
from ...storage.checkpoint import TensorInfo
from .cores import Cores
from .lora_vectors import OWN, SCALE, row_factor

SAMPLED_WEIGHTS, SAMPLED_NUMBERS = 4, 16


@dataclass(frozen=True)
class Pool:
    """T adapters over one base, read weight by weight.

    ``names`` are the weights with low-rank changes. ``beside`` holds what is not compressed, in its stored form: row
    scales of DoRA (``.scale`` [T, n] float32) and changes that are not low-rank (``.own`` [T, *shape], trained biases
    and saved modules), whose rounding costs ``rounding`` [T] squared error. ``weights`` [T] are what a squared error of
    each task counts; ``square_norms`` [T] those of the task vectors.
    """

    vectors: Vectors
    template: Template
    dtype: torch.dtype
    names: tuple[str, ...]
    beside: dict[str, Tensor]
    rounding: Tensor
    square_norms: Tensor
    weights: Tensor
    normalize: bool

    @classmethod
    def of(
        cls,
        vectors: Vectors,
        gram: Gram,
        dtype: torch.dtype | None,
        *,
        normalize: Annotated[bool, Field(description="count each task's error relative to its own norm")] = True,
    ) -> Pool:
        """One pass over the adapters. Raises ParameterError for changes that a basis cannot hold."""
        check_kinds(vectors)
        adapters = adapters_of(vectors)
        template = Template.of(adapters, base_id(vectors))
        dtype = dtype or functools.reduce(torch.promote_types, (_factor_dtype(adapter) for adapter in adapters))
        beside: dict[str, Tensor] = {}
        rounding = torch.zeros(len(vectors), dtype=torch.float64)
        names = []
        for name in vectors.names:
            deltas = vectors.deltas(name)
            if any(delta.low is None for delta in deltas):
                _check_whole(name, template, vectors, deltas)
                exact = torch.stack([dense(d).reshape(vectors.base.tensors[name].shape) for d in deltas])
                beside[name + OWN] = exact.to(dtype)
                rounding += (beside[name + OWN].to(torch.float64) - exact).square().flatten(1).sum(1)
                continue
            names.append(name)
            scales = [delta.row_scale for delta in deltas]
            if any(scale is not None for scale in scales):
                zero = torch.zeros(deltas[0].shape[0])
                beside[name + SCALE] = torch.stack([zero if scale is None else scale.float() for scale in scales])
        if not names:
            raise ParameterError("the adapters have no low-rank changes in common with the base; nothing to compress")
        norms = gram.matrix.diagonal().clamp_min(0)
        relative = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(norms))
        weights = relative if normalize else torch.ones_like(norms)
        return cls(vectors, template, dtype, tuple(names), beside, rounding, norms, weights, normalize)

    def __len__(self) -> int:
        return len(self.vectors)

    def changes(self, name: str) -> list[LowRank]:
        """The tasks' low-rank changes of a weight; of a DoRA, the part beside the scaling of rows."""
        return low_parts(self.vectors.deltas(name))

    def cores(self, name: str) -> Cores:
        return Cores.of(self.changes(name))

    def shape(self, name: str) -> tuple[int, int]:
        """[n, m] of a weight's change, convolutions flattened."""
        info = self.vectors.base.tensors[name]
        return info.shape[0], info.numel // info.shape[0]

    def row_factor(self, name: str, alpha: float, row_weights: Tensor) -> Tensor:
        """[n] what the stock file's left factor of a weight is divided by; see LoraVectors."""
        scales = self.beside.get(name + SCALE)
        if scales is None:
            return torch.ones(self.shape(name)[0], dtype=torch.float64)
        return row_factor(scales, alpha, row_weights)

    @property
    def has_dora(self) -> bool:
        return any(name.endswith(SCALE) for name in self.beside)

    @property
    def rank(self) -> int:
        """The largest rank of the adapters."""
        return max(adapter.rank for adapter in adapters_of(self.vectors))

    @functools.cached_property
    def adapters_bytes(self) -> int:
        """What the adapters take in their own dtypes; copies of unchanged embeddings, which PEFT adds, not counted."""
        return sum(_own_bytes(adapter, self.vectors.base.tensors) for adapter in adapters_of(self.vectors))

    def fixed_bytes(self, alpha: float) -> int:
        """What the basis takes however small its ranks are: scales, magnitudes and whole changes."""
        total = sum(tensor.nbytes for tensor in self.beside.values())
        own = {n.removesuffix(OWN): t for n, t in self.beside.items() if n.endswith(OWN)}
        if not own:
            total += sum(tensor.nbytes for tensor in self.template.head.values())
        else:
            changes: dict[str, Delta] = {name: Dense(alpha * tensor[0].float()) for name, tensor in own.items()}
            tensors, _ = adapter_tensors(changes, self.template, self.vectors.base)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if any(name in self.template.bias_modules for name in own):  # PEFT wants one for every module
            total += sum(4 * max(self.shape(name)) for name in self.names)
        return total + sum(4 * self.shape(name)[0] for name in self.names if self.has_dora)

    def base_sample(self) -> dict[str, list[float]]:
        """The first numbers of a few of the base's weights."""
        step = max(1, len(self.names) // SAMPLED_WEIGHTS)
        read = self.vectors.base.read
        return {name: read(name).reshape(-1)[:SAMPLED_NUMBERS].tolist() for name in self.names[::step]}


# What all bases of adapters have, however they are made.
POOL_OPTIONS = options_of(Pool.of)


def check_kinds(vectors: Vectors) -> None:
    """Raises ParameterError for adapters whose changes a stock LoRA of all of them could not hold, or not task by task.

    Nothing but names is read.
    """
    for task, adapter in zip(vectors.tasks, adapters_of(vectors), strict=True):
        kind = adapter.config.get("peft_type")
        if not is_lora(adapter.config):
            raise ParameterError(
                f'"{task}": {kind} adapter, which has no factors of its changes; write a LoRA of it first (tvbases '
                "merge --adapter, with --rank for a small one), or a checkpoint, and compress that"
            )
        for option, names in (
            ("target_parameters", [name for name in adapter.names if adapter.place(name)]),
            ("trainable_token_indices", [name for name in adapter.names if adapter.rows(name)]),
            ("modules_to_save of the embedding and the output as one", list(adapter.twins)),
        ):
            if names:
                raise ParameterError(
                    f'"{task}": {option} of {len(names)} tensors (first: {names[0]}), which a basis of adapters does '
                    "not hold; leave that task out, or merge every task to a checkpoint (tvbases merge) and compress "
                    "these"
                )


def adapters_of(vectors: Vectors) -> list[Adapter]:
    adapters = [model for model in vectors.models.values() if isinstance(model, Adapter)]
    if len(adapters) < len(vectors):
        raise ParameterError("a basis of adapters needs adapters only; some of the models are full checkpoints")
    return adapters


def base_id(vectors: Vectors) -> str:
    """The name by which all adapters call their base, or else the path or id that it was opened by."""
    ids = {adapter.base_id for adapter in adapters_of(vectors)}
    return ids.pop() if len(ids) == 1 and ids != {""} else vectors.base.label


def _factor_dtype(adapter: Adapter) -> torch.dtype:
    dtypes = [info.dtype for name, info in adapter.tensors.items() if ".lora_" in name]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _own_bytes(adapter: Adapter, base: dict[str, TensorInfo]) -> int:
    factors = sum(info.nbytes for name, info in adapter.tensors.items() if ".lora_" in name)
    head = sum(tensor.nbytes for tensor in adapter.head.values())
    return factors + head + sum(base[name].nbytes for name in adapter.saved_names)


def _check_whole(name: str, template: Template, vectors: Vectors, deltas: list[Delta]) -> None:
    if name in template.layouts:
        task = next(task for task, delta in zip(vectors.tasks, deltas, strict=True) if delta.low is None)
        raise ParameterError(
            f'"{task}" changes {name} as a whole (a saved module, or DoRA on a weight stored transposed), where an '
            "adapter has factors; such a mixture cannot be compressed: leave that task out, or merge it to a checkpoint"
        )
