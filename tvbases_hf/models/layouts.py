"""How PEFT stores the factors of a weight: of a linear layer, a Conv1D, an embedding or a convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..algebra.delta import LowRank
from ..errors import CheckpointError, MismatchError
from ..storage.checkpoint import Checkpoint
from ..storage.tied import is_token_matrix
from .lora_config import CONFIG_FILE, LoraOptions
from .lora_parts import MAGNITUDE, PAIRS
from .names import is_conv1d

# Kinds whose weight the base stores as [in, out], the transpose of B A.
TRANSPOSED = ("conv1d", "embedding")


@dataclass(frozen=True)
class Layout:
    """How PEFT stores the factors of a weight: ``kind`` linear, conv1d (weight [in, out]), embedding or conv."""

    module: str
    kind: str
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoraModule:
    """Stored names of one module's factors; ``scaling`` is alpha / r, or alpha / sqrt(r) for rsLoRA."""

    layout: Layout
    scaling: float
    parts: Mapping[str, str]

    @property
    def pair(self) -> tuple[str, str]:
        """The stored names of A and B."""
        first, second = PAIRS[self.layout.kind == "embedding"]
        return self.parts[first], self.parts[second]

    def product(self, a: Tensor, b: Tensor) -> LowRank:
        """s B A as PEFT computes it, convolutions flattened: the transpose of what the base stores as [in, out]."""
        return LowRank(self.scaling * b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1))


def find_layout(
    label: str,
    module: str,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    base: Checkpoint,
    options: LoraOptions,
) -> Layout:
    """The layout of the factors of the base's tensor ``name``, whose stored shapes are given by part.

    Raises MismatchError where they do not fit the weight, CheckpointError where nothing tells how it is stored.
    """
    embedding = "lora_embedding_A" in shapes
    a, b = (shapes[part] for part in PAIRS[embedding])
    shape = base.tensors[name].shape
    magnitude = math.prod(shapes[MAGNITUDE]) if MAGNITUDE in shapes else b[0]
    matching = math.prod(b[1:]) == a[0] and magnitude == b[0]
    made = b[:1] + a[1:]
    kind = _find_kind(label, name, base, options, made, embedding) if matching else None
    if kind is not None:
        return Layout(module, kind, a[2:])
    if len(a) > 2 and len(b) > 1 and 0 < b[1] < a[0]:
        raise CheckpointError(
            f'"{label}": {module} is a convolution in {a[0] // b[1]} groups, which LoRA mixes, so that no '
            "change of its weight does what PEFT computes; PEFT cannot merge it either"
        )
    made, way = made[::-1] if embedding else made, "give the base it was trained on"
    if matching and is_token_matrix(name, shape) and made[1:] == shape[1:]:
        way += (
            f", or resize this one to its vocabulary first: model.resize_token_embeddings({made[0]}); --extra-rows is "
            "for rows that are stored, not for factors"
        )
    raise MismatchError(
        f'"{label}": the factors of {module} make a change of shape {list(made)} but the base\'s weight '
        f"({base.label}) is {list(shape)}; {way}"
    )


def _find_kind(
    label: str, name: str, base: Checkpoint, options: LoraOptions, made: tuple[int, ...], embedding: bool
) -> str | None:
    """The kind of a weight that factors of a product [out, in, *kernel] fit; None if none does."""
    shape = base.tensors[name].shape
    if embedding:
        return "embedding" if shape == made[::-1] else None
    if len(made) > 2:
        return "conv" if shape == made else None
    if shape not in (made, made[::-1]):
        return None
    stored_as_in_out = is_conv1d(name, base, options.fan_in_fan_out)
    if stored_as_in_out is None and shape[0] == shape[1]:
        raise CheckpointError(
            f'"{label}": {CONFIG_FILE} says fan_in_fan_out, and nothing in the base tells whether the square '
            f"weight {name} is stored as [in, out]; set fan_in_fan_out to false if it is an nn.Linear"
        )
    if stored_as_in_out is None:
        stored_as_in_out = shape != made
    return ("conv1d" if stored_as_in_out else "linear") if shape == made[:: -1 if stored_as_in_out else 1] else None
