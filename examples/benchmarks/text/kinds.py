"""The ways to keep fewer vectors than there are tasks, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tvbases_demo.compare import selections
from tvbases_hf.bases import BasisWeights, ae_bases, pca_bases, pca_positive
from tvbases_hf.models.vectors import Vectors

from .workshop import Workshop

ALL = "all"
SIDES = ("bases", "reconstructions")

# (Gram matrix, M, number of the draw) -> bases
KINDS: dict[str, Callable[[Tensor, int, int], BasisWeights]] = {
    "balanced": lambda gram, m, draw: ae_bases(gram, m, seed=draw),
    "normalize": lambda gram, m, draw: ae_bases(gram, m, normalize=True, seed=draw),
    "even": lambda gram, m, draw: ae_bases(gram, m, even_errors=True, seed=draw),
    "ae_varpro": lambda gram, m, draw: ae_bases(gram, m, balance=False, seed=draw),
    "ae_adam": lambda gram, m, draw: ae_bases(gram, m, solver="adam", balance=False, seed=draw),
    "rand_select": lambda gram, m, draw: list(selections(gram, m, draw + 1))[draw],
    "pca": lambda gram, m, draw: pca_bases(gram, m),
    "pca_positive": lambda gram, m, draw: pca_positive(gram, m),
}
TITLES = {
    ALL: "all task vectors",
    "balanced": "AE, balanced",
    "normalize": "AE, balanced, normalised",
    "even": "AE, balanced, even errors",
    "ae_varpro": "AE of the paper, varpro",
    "ae_adam": "AE of the paper, Adam",
    "rand_select": "RandSelect",
    "pca": "PCA",
    "pca_positive": "PCA ≥ 0",
}


def weights_of(workshop: Workshop, kind: str, num_bases: int, seed: int = 0, draw: int = 0) -> BasisWeights:
    """Encoder [T, M] and decoder [M, T] of the task vectors of one fine-tuning seed."""
    return KINDS[kind](workshop.gram(seed), num_bases, draw)


def vectors_of(
    workshop: Workshop, kind: str, num_bases: int = 0, *, over: str = "bases", seed: int = 0, draw: int = 0
) -> Vectors:
    """The task vectors, their bases, or their reconstructions from these."""
    vectors = workshop.vectors(seed)
    if kind == ALL:
        return vectors
    return vectors.mixed(weights_of(workshop, kind, num_bases, seed, draw), over)


def kept(kind: str, num_bases: int, over: str) -> int:
    """Vectors to keep on disk: PCA's reconstructions need its mean too."""
    return num_bases + (kind == "pca" and over == "reconstructions")


def bytes_of(vectors: Vectors, count: int) -> int:
    """Of ``count`` vectors in float32."""
    return 4 * count * sum(vectors.base.tensors[name].numel for name in vectors.names)


def random_span(num_tasks: int, num_bases: int, seed: int) -> Tensor:
    """[T, M] orthonormal columns: the span of M random mixtures of the task vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(num_tasks, num_bases, dtype=torch.float64, generator=generator))[0]
