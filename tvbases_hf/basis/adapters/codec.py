"""How a basis of adapters stores one weight: two factors in the stock PEFT file, and what they cannot hold beside it.

The stock file's factors multiply to the sum of the weight's vectors. Vectors that share nothing are simply side by side
in them. Vectors over shared rows (see cores.Shared) have the R shared rows as lora_A and, as lora_B, the sum of all
components' columns, each weighted by its coefficients:

    lora_B = L_pivots + L_others @ mix        [n, R]

so that beside them only ``rest`` = L_others [n, K - R] and ``mix`` [K - R, R] are stored, and the pivots' columns are
the difference. Shared columns are the same transposed. Nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from ...algebra.delta import LowRank
from ...errors import ParameterError
from ...models.layouts import Layout
from ...models.lora_parts import PREFIX
from .cores import Shared

SIDES = ("", "right", "left")
REST, MIX = ".rest", ".mix"


@dataclass(frozen=True)
class Spec:
    """One weight's entry in basis_config.json: its module in the stock file, the rank of each vector's part, sharing.

    ``shared``: nothing, the ``right`` factors (rows), or the ``left`` ones (columns); ``pivots`` are the components,
    counted through all vectors, whose rows or columns the others are combinations of. ``shape`` is that of the change,
    [n, m] with convolutions flattened.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    module: str
    kind: Annotated[str, Field(pattern="^(linear|conv1d|embedding|conv)$")]
    kernel: list[PositiveInt]
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    ranks: list[NonNegativeInt]
    shared: Annotated[str, Field(pattern="^(|right|left)$")] = ""
    pivots: list[NonNegativeInt] = field(default_factory=list)

    def check(self, name: str, num_vectors: int) -> None:
        """ValueError unless there is a rank for each vector, and every pivot is one of the components."""
        total = sum(self.ranks)
        if len(self.ranks) != num_vectors:
            raise ValueError(f"{name}.ranks has {len(self.ranks)} entries, and {num_vectors} are needed")
        if len(set(self.pivots)) < len(self.pivots) or any(pivot >= total for pivot in self.pivots):
            raise ValueError(f"{name}.pivots are not {len(self.pivots)} of its {total} components")

    @classmethod
    def of(cls, layout: Layout, shape: Sequence[int], ranks: Sequence[int], **sharing: Any) -> Spec:
        return cls(layout.module, layout.kind, list(layout.kernel), list(shape), list(ranks), **sharing)

    @property
    def prefix(self) -> str:
        """What the names of the module's tensors in the stock file begin with."""
        return f"{PREFIX}{self.module}"

    @property
    def width(self) -> int:
        """The rank of the stock file's factors."""
        return len(self.pivots) if self.shared else sum(self.ranks)

    @property
    def others(self) -> list[int]:
        """The components that are not pivots."""
        pivots = set(self.pivots)
        return [k for k in range(sum(self.ranks)) if k not in pivots]


@dataclass(frozen=True)
class Stored:
    """left [n, R] and right [R, m] of the stock file; ``rest`` and ``mix`` beside it where something is shared."""

    left: Tensor
    right: Tensor
    rest: Tensor | None = None
    mix: Tensor | None = None

    def transposed(self) -> Stored:
        return Stored(self.right.T, self.left.T, None if self.rest is None else self.rest.T, self.mix)

    @property
    def beside(self) -> dict[str, Tensor]:
        """What the stock file does not hold, by suffix."""
        return {} if self.rest is None or self.mix is None else {REST: self.rest, MIX: self.mix}


def store(vectors: Sequence[LowRank] | Shared, shared: str, factor: Tensor, dtype: torch.dtype) -> Stored:
    """Round the vectors of one weight to ``dtype``; ``factor`` [n] divides the stock left factor's rows (DoRA).

    What is computed from stored numbers is computed from them as rounded, so that roundings do not add up.
    """
    if not isinstance(vectors, Shared):
        left = torch.cat([vector.left for vector in vectors], dim=1).to(torch.float64)
        right = torch.cat([vector.right for vector in vectors], dim=0)
        return _rounded(Stored(left / factor[:, None], right), dtype)
    others = torch.ones(vectors.lefts.shape[1], dtype=torch.bool)
    others[list(vectors.pivots)] = False
    mix, rest = vectors.mix.to(dtype), vectors.lefts[:, others].to(dtype)
    total = vectors.lefts[:, ~others] + rest.to(torch.float64) @ mix.to(torch.float64)
    if shared == "left":
        columns = Stored(total, vectors.rows, rest, mix).transposed()
        return _rounded(Stored(columns.left / factor[:, None], columns.right, columns.rest, mix), dtype)
    return _rounded(Stored(total / factor[:, None], vectors.rows, rest, mix), dtype)


def restored(stored: Stored, spec: Spec, factor: Tensor) -> list[LowRank]:
    """The vectors' parts of one weight, float64; the inverse of ``store`` up to rounding."""
    left = stored.left.to(torch.float64) * factor[:, None]
    right = stored.right.to(torch.float64)
    if spec.shared:
        assert stored.rest is not None and stored.mix is not None
        whole = Stored(left, right, stored.rest.to(torch.float64), stored.mix.to(torch.float64))
        if spec.shared == "left":
            right, left = (part.T for part in _unfolded(whole.transposed(), spec))
        else:
            left, right = _unfolded(whole, spec)
    lefts, rights = left.split(spec.ranks, dim=1), right.split(spec.ranks, dim=0)
    return [LowRank(a, b) for a, b in zip(lefts, rights, strict=True)]


def _unfolded(stored: Stored, spec: Spec) -> tuple[Tensor, Tensor]:
    """All components' columns [n, K] and rows [K, m] from the shared rows and the sum of the columns."""
    assert stored.rest is not None and stored.mix is not None
    count, others = sum(spec.ranks), spec.others
    lefts, rows = stored.left.new_zeros(len(stored.left), count), stored.left.new_zeros(count, stored.right.shape[1])
    lefts[:, others], lefts[:, spec.pivots] = stored.rest, stored.left - stored.rest @ stored.mix
    rows[others], rows[spec.pivots] = stored.mix @ stored.right, stored.right
    return lefts, rows


def _rounded(stored: Stored, dtype: torch.dtype) -> Stored:
    rest = None if stored.rest is None else stored.rest.to(dtype)
    mix = None if stored.mix is None else stored.mix.to(dtype)
    found = Stored(stored.left.to(dtype), stored.right.to(dtype), rest, mix)
    for part in (found.left, found.right, found.rest, found.mix):
        if part is not None and not torch.isfinite(part).all():
            raise ParameterError(f"a factor overflows {dtype}; store it as bfloat16 or float32")
    return found


def stock_factors(read: Callable[[str], Tensor], spec: Spec) -> tuple[Tensor, Tensor]:
    """left [n, R] and right [R, m] of a module as PEFT stores it; the inverse of what adapter_out writes.

    A module whose vectors are all zero has one component of zeros in the file where PEFT wants one; it is left out.
    """
    prefix, width = spec.prefix, spec.width
    if spec.kind == "embedding":
        left, right = read(f"{prefix}.lora_embedding_A").T, read(f"{prefix}.lora_embedding_B").T
    else:
        left, right = read(f"{prefix}.lora_B.weight"), read(f"{prefix}.lora_A.weight")
        left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
        if spec.kind == "conv1d":
            left, right = right.T, left.T
    return left[:, :width], right[:width]
