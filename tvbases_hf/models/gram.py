"""Streaming inner products of task vectors: one tensor at a time, added up in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.blocks import PIECE_BYTES, blocks, pieces
from ..algebra.delta import Delta, Dense
from ..algebra.products import float32_products, gram
from ..errors import CheckpointError
from ..storage.inputs import unchanged
from ..storage.parallel import rows
from .finite import not_finite_in
from .fit import changes_nothing, given_twice
from .vectors import Vectors

# A fine-tune moves a model by well under a per cent to a few per cent, another base by about its whole norm (AE paper,
# Tables 6 and 7, Figure 6). A small model that is trained long moves far as well, but it still points where its base
# does: a change of the base's own length, in any direction, leaves a cosine of 0.7, and another base one of about 0.
WRONG_BASE_COSINE = 0.5
WRONG_BASE_OUTLIER = 5.0
# Float32 knows inner products to some 1e-8 of the lengths. Where an eigenvalue of the cosines is below this, the error
# that bases leave, which is a sum of eigenvalues, would be known to less than 1e-5 of itself: then float64 it is.
CONDITIONED = 5e-3
# Two sums of the same d products, in whatever order: eps sqrt(d) for d = 1e7, of squares.
SAME = 1e-12


@dataclass(frozen=True)
class Gram:
    """G = T^T T of the task vectors ``tasks``, [T, T] float64, and the norm of the base over the same tensors.

    ``base_norm`` is None for adapters: they cannot be told from those of another base by their length. ``along`` is
    T^T theta_0, [T] float64, where it was computed.
    """

    tasks: tuple[str, ...]
    matrix: Tensor
    base_norm: float | None
    along: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """[T] lengths of the task vectors."""
        return self.matrix.diagonal().clamp_min(0).sqrt()

    @property
    def norm_ratios(self) -> Tensor | None:
        """[T] length of each task vector over that of the base; None for adapters, and over a base of zeros."""
        return self.norms / self.base_norm if self.base_norm else None

    @property
    def cosine(self) -> Tensor:
        """[T, T] cosine similarities; 0 for a task vector that is zero."""
        norms = torch.where(self.norms > 0, self.norms, torch.ones_like(self.norms))
        return self.matrix / norms[:, None] / norms[None, :]

    @property
    def base_cosine(self) -> Tensor | None:
        """[T] cosine of each fine-tuned model with the base; None where their inner products are not known."""
        if self.along is None or not self.base_norm:
            return None
        square = self.base_norm**2
        tuned = (square + 2 * self.along + self.matrix.diagonal()).clamp_min(0).sqrt()
        return (square + self.along) / (self.base_norm * tuned.clamp_min(torch.finfo(torch.float64).tiny))

    def warnings(self) -> list[str]:
        """What looks wrong with the inputs, one line each: copies of the base or of a task, another base."""
        zero = [t for t, n in zip(self.tasks, self.norms.tolist(), strict=True) if not n]
        lines = [changes_nothing(task) for task in zero]
        lines += [given_twice(task, first) for task, first in self._copies().items()]
        return lines + self._of_another_base()

    def _copies(self) -> dict[str, str]:
        """{task: the first task whose vector is the same}"""
        found: dict[str, str] = {}
        squares = self.matrix.diagonal()
        for i, j in itertools.combinations(range(len(self.tasks)), 2):
            total = float(squares[i] + squares[j])
            if squares[i] > 0 and abs(total - 2 * float(self.matrix[i, j])) <= SAME * total:
                found.setdefault(self.tasks[j], self.tasks[i])
        return found

    def _of_another_base(self) -> list[str]:
        """Tasks that stand out by their length, or whose model does not point where the base does."""
        if self.norm_ratios is None:
            return []
        ratios = self.norm_ratios.tolist()
        cosines = [1.0] * len(ratios) if self.base_cosine is None else self.base_cosine.tolist()
        lines = []
        for index, (task, ratio, cosine) in enumerate(zip(self.tasks, ratios, cosines, strict=True)):
            others = ratios[:index] + ratios[index + 1 :]
            usual = float(torch.tensor(others).median()) if others else ratio
            foreign = cosine < WRONG_BASE_COSINE
            if foreign or (len(others) > 1 and ratio > WRONG_BASE_OUTLIER * usual > 0):
                lines.append(
                    f'"{task}" differs from the base by {ratio:.1%} of its norm'
                    + (f" (the others: {usual:.2%})" if others else "")
                    + (f", and its cosine with the base is {cosine:.2f}" if foreign else "")
                    + "; a fine-tune stays close to its base, so this is probably a fine-tune of another base"
                )
        return lines


def gram_matrix(vectors: Vectors) -> Gram:
    """Inner products of all task vectors, in one pass over the base and the T models.

    Each tensor is mapped, subtracted and multiplied in blocks: O(T^2 d) operations, memory for one block per thread. In
    float32 where that is enough for the error of any bases; vectors that are nearly dependent (copies, checkpoints of
    one run) take a second pass in float64.

    Raises:
        CheckpointError: NaN or infinity in a tensor, which is named; a file that was written to meanwhile.
    """
    found, rounded = _one_pass(vectors, float32=True)
    if not rounded or torch.linalg.eigvalsh(found.cosine)[0] > CONDITIONED:
        return found
    return _one_pass(vectors, float32=False)[0]


def _one_pass(vectors: Vectors, float32: bool) -> tuple[Gram, bool]:
    """``float32``: wherever that is faster, see algebra.products; and whether that was anywhere, in any process."""
    count = len(vectors)

    def products(name: str) -> list[float]:
        deltas, rounded = vectors.deltas(name), False
        if vectors.are_adapters:
            part, along, square = gram(deltas), torch.zeros(count), 0.0
        else:
            own = (delta.base for delta in deltas if isinstance(delta, Dense) and delta.base is not None)
            base = next(own, None)
            base = vectors.base.read(name) if base is None else base
            known = float32_products(deltas, base) if float32 else None
            rounded = known is not None
            part, along, square = _with_base(deltas, base) if known is None else _parts(known)
        if not (torch.isfinite(part).all() and math.isfinite(square)):
            raise not_finite(vectors, name, deltas)
        return [*part.flatten().tolist(), *along.tolist(), square, float(rounded)]

    size = lambda name: vectors.base.tensors[name].nbytes * (count + 1)  # noqa: E731
    width, need = count * count + count + 2, lambda name: PIECE_BYTES + vectors.copied(name)
    with unchanged():
        table = rows(vectors.names, products, width, "Gram matrix", size, need, vectors.stored)
    total = table.sum(dim=0)
    matrix = total[: count * count].reshape(count, count)
    if vectors.are_adapters:
        return Gram(vectors.tasks, matrix, None), False
    along, square, rounded = total[count * count : -2], float(total[-2]), bool(total[-1])
    return Gram(vectors.tasks, matrix, square**0.5, along), rounded


def _parts(products: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of [T + 1, T + 1], the last being the base: what ``_with_base`` returns."""
    return products[:-1, :-1], products[:-1, -1], float(products[-1, -1])


def _with_base(deltas: list[Delta], base: Tensor) -> tuple[Tensor, Tensor, float]:
    """The inner products of changes that are not all low-rank, theirs with the base, and the base's squared norm.

    One pass over all of them.
    """
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=deltas[0].device)
    along = products.new_zeros(len(deltas))
    square, start, flat = 0.0, 0, base.reshape(-1)
    for part in blocks(deltas):
        own = flat[start : start + part.shape[1]].to(part.device, torch.float64)
        products += part @ part.T
        along += part @ own
        square += float(own.square().sum())
        start += part.shape[1]
    return products, along, square


def not_finite(vectors: Vectors, name: str, deltas: list[Delta]) -> CheckpointError:
    """Name the model whose tensor holds NaN or infinity: the base first, since it spoils every task."""
    base = vectors.base
    models = [model.label for model in vectors.models.values()]
    labels = models if len(models) == len(deltas) else vectors.labels  # bases are not any model's
    for label, delta in zip([base.label, *labels], [Dense(base.read(name)), *deltas], strict=True):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces(delta))
        if bad:
            return not_finite_in(label, name, bad, base.tensors[name].numel)
    return CheckpointError(f"tensor {name}: its inner products overflow float64")
