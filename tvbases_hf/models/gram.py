"""Streaming inner products of task vectors: one tensor at a time, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.delta import PIECE_BYTES, Delta, Dense, blocks, gram, pieces
from ..errors import CheckpointError
from ..storage.parallel import rows
from .finite import not_finite_in
from .vectors import Vectors

# A fine-tune moves a model by well under a per cent to a few per cent (AE paper, Table 6); another base by about its
# whole norm (Table 7, Figure 6).
WRONG_BASE_RATIO = 0.1
WRONG_BASE_OUTLIER = 5.0


@dataclass(frozen=True)
class Gram:
    """G = T^T T of the task vectors ``tasks``, [T, T] float64, and the norm of the base over the same tensors.

    ``base_norm`` is None for adapters: they cannot be told from those of another base by their length.
    """

    tasks: tuple[str, ...]
    matrix: Tensor
    base_norm: float | None

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

    def warnings(self) -> list[str]:
        """What looks wrong with the inputs, one line each: a base that is not theirs, a model equal to its base."""
        lines = [
            f'"{t}" equals the base: its task vector is zero'
            for t, n in zip(self.tasks, self.norms, strict=True)
            if not n
        ]
        ratios = self.norm_ratios
        if ratios is None:
            return lines
        for task, ratio in zip(self.tasks, ratios.tolist(), strict=True):
            others = [r for t, r in zip(self.tasks, ratios.tolist(), strict=True) if t != task]
            usual = float(torch.tensor(others).median()) if others else ratio
            if ratio > WRONG_BASE_RATIO or (len(others) > 1 and ratio > WRONG_BASE_OUTLIER * usual > 0):
                lines.append(
                    f'"{task}" differs from the base by {ratio:.1%} of its norm'
                    + (f" (the others: {usual:.2%})" if others else "")
                    + "; a fine-tune differs by a few per cent at most, so this is probably a fine-tune of another base"
                )
        return lines


def gram_matrix(vectors: Vectors) -> Gram:
    """Inner products of all task vectors, in one pass over the base and the T models.

    Each tensor is mapped, subtracted and multiplied in blocks: O(T^2 d) operations, memory for one block per thread.

    Raises:
        CheckpointError: NaN or infinity in a tensor, which is named.
    """
    count = len(vectors)

    def products(name: str) -> list[float]:
        deltas = vectors.deltas(name)
        if vectors.are_adapters:
            part, square = gram(deltas), 0.0
        else:
            own = (delta.base for delta in deltas if isinstance(delta, Dense) and delta.base is not None)
            base = next(own, None)
            part, square = _with_base(deltas, vectors.base.read(name) if base is None else base)
        if not (torch.isfinite(part).all() and math.isfinite(square)):
            raise not_finite(vectors, name, deltas)
        return [*part.flatten().tolist(), square]

    size = lambda name: vectors.base.tensors[name].nbytes * (count + 1)  # noqa: E731
    width, need = count * count + 1, lambda name: PIECE_BYTES + vectors.copied(name)
    table = rows(vectors.names, products, width, "Gram matrix", size, need, vectors.stored)
    total = table.sum(dim=0)
    base_norm = None if vectors.are_adapters else float(total[-1]) ** 0.5
    return Gram(vectors.tasks, total[:-1].reshape(count, count), base_norm)


def _with_base(deltas: list[Delta], base: Tensor) -> tuple[Tensor, float]:
    """The inner products of changes that are not all low-rank, and the base's squared norm, in one pass over both."""
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=deltas[0].device)
    square, start, flat = 0.0, 0, base.reshape(-1)
    for part in blocks(deltas):
        products += part @ part.T
        square += float(flat[start : start + part.shape[1]].to(part.device, torch.float64).square().sum())
        start += part.shape[1]
    return products, square


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
