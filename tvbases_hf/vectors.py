"""What a merging method takes: K vectors over one base, and how they are made of the tasks.

Task vectors, bases and reconstructions are the same thing to a method. What tells them apart is ``encoder``: how much
of each task is in each vector, which is also how statistics of the tasks' data are mixed (AE paper, Table 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .bases import BasisWeights
from .basis import Basis
from .delta import Delta, mix
from .errors import ParameterError
from .storage.checkpoint import Checkpoint
from .taskvector import TaskVectors

OVER = ("bases", "reconstructions")


@dataclass(frozen=True)
class Vectors:
    """K vectors of T tasks, none of them in memory.

    ``names`` are the weights that they change, ``labels`` [K] what they are called, ``encoder`` [T, K] float64 the
    share of every task in every vector (the identity for task vectors and for reconstructions), ``read(name)`` the K
    changes of one weight.
    """

    base: Checkpoint
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    encoder: Tensor
    read: Callable[[str], list[Delta]]

    def __len__(self) -> int:
        return len(self.labels)

    def deltas(self, name: str) -> list[Delta]:
        """One change per vector for the weight ``name``."""
        return self.read(name)

    @classmethod
    def of_tasks(cls, vectors: TaskVectors) -> Vectors:
        """The task vectors themselves."""
        identity = torch.eye(len(vectors), dtype=torch.float64)
        return cls(vectors.base, vectors.tasks, vectors.tasks, vectors.names, identity, vectors.deltas)

    @classmethod
    def mixed(cls, vectors: TaskVectors, weights: BasisWeights, over: str = "bases") -> Vectors:
        """Bases of task vectors, or the reconstructions from them, before any rounding.

        A method that has a mean vector (PCA) gives its bases without it: the mean is in the reconstructions only.
        """
        _check_over(over)
        plain = cls.of_tasks(vectors)
        if over == "bases":
            labels = tuple(f"basis {index}" for index in range(weights.num_bases))
            mixing, encoder = weights.encoder, weights.encoder
        else:
            labels, mixing, encoder = vectors.tasks, weights.reconstruction, plain.encoder
        return replace(plain, labels=labels, encoder=encoder, read=lambda name: mix(vectors.deltas(name), mixing))

    @classmethod
    def of_basis(cls, basis: Basis, base: str | Path | Checkpoint, over: str = "bases") -> Vectors:
        """The vectors that a basis directory holds, or the reconstructions from them.

        Raises MismatchError if ``base`` is not the model that the basis was built on.
        """
        _check_over(over)
        model = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
        basis.check_base(model)
        num_tasks, num_bases = basis.encoder.shape
        covered = set(basis.names)
        names = tuple(name for name in model.tensors if name in covered)
        if over == "bases":
            labels = tuple(f"basis {index}" for index in range(num_bases))
            return cls(model, basis.tasks, labels, names, basis.encoder, lambda name: basis.parts(name)[:num_bases])
        identity = torch.eye(num_tasks, dtype=torch.float64)
        return cls(model, basis.tasks, basis.tasks, names, identity, lambda n: basis.reconstructions(n, model))

    def data_weights(self) -> Tensor:
        """[T, K] float64, columns that sum to 1: how much the data of each task counts for each vector.

        Raises ParameterError for a vector without any positive share, as PCA has them: its data is not defined.
        """
        shares = self.encoder.clamp_min(0)
        empty = [label for label, total in zip(self.labels, shares.sum(0).tolist(), strict=True) if total <= 0]
        if empty:
            raise ParameterError(
                f"{len(empty)} of {len(self)} vectors hold no positive share of any task (first: {empty[0]}), so no "
                "data belongs to them; use ae bases, pca_positive, or merge over the reconstructions"
            )
        return shares / shares.sum(0)

    def selected(self, indices: Sequence[int]) -> Vectors:
        """Some of the vectors, in the order given."""
        kept = list(indices)
        return replace(
            self,
            labels=tuple(self.labels[i] for i in kept),
            encoder=self.encoder[:, kept],
            read=lambda name: _chosen(self.read(name), kept),
        )


def _chosen(deltas: Sequence[Delta], indices: Sequence[int]) -> list[Delta]:
    return [deltas[i] for i in indices]


def _check_over(over: str) -> None:
    if over not in OVER:
        raise ParameterError(f"over must be one of {', '.join(OVER)}; got {over!r}")
