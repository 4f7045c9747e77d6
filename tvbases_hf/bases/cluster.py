"""Cluster bases: similar tasks share a vector (clustering paper, Algorithm 1).

Tasks are grouped by spectral clustering of the absolute cosines |C|, whose number of clusters is where the eigenvalues
of the Laplacian D - |C| jump. A cluster that holds opposite tasks is split in two, since their mean would cancel. The
mean (or sum) of each cluster is a basis; a task is forgotten by its cluster's basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import MissingExtraError, ParameterError
from .ae import fitted
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases

PAPER = "https://arxiv.org/abs/2502.01015v1"
# Our choice: the paper asks for a negative threshold and says that natural tasks rarely reach it.
SPLIT_BELOW = -0.3
# Similarities of exactly zero make a graph of several parts, for which spectral embeddings are not unique.
FLOOR = 1e-9


@dataclass(frozen=True)
class Clusters:
    """T tasks in M groups, each by the tasks' positions; groups are ordered by their first task."""

    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_tasks(self) -> int:
        return sum(len(group) for group in self.members)

    def of_task(self, task: int) -> int:
        """The cluster that holds a task: its basis is what negation takes away (clustering paper, Table 1)."""
        return next(index for index, group in enumerate(self.members) if task in group)

    def encoder(self, inner: Literal["mean", "sum"] = "mean") -> Tensor:
        """[T, M] float64: the ``mean`` of each cluster's tasks, or their ``sum``."""
        weights = torch.zeros(self.num_tasks, len(self), dtype=torch.float64)
        for column, group in enumerate(self.members):
            weights[list(group), column] = 1 / len(group) if inner == "mean" else 1.0
        return weights

    @classmethod
    def of_encoder(cls, encoder: Tensor) -> Clusters:
        """The clusters behind an encoder [T, M] of which every row has one entry."""
        if not ((encoder != 0).sum(1) == 1).all():
            raise ParameterError("these are no cluster bases: a task has a share in none or in several of them")
        return cls(tuple(tuple(torch.nonzero(column).flatten().tolist()) for column in encoder.T))


def _count(num_bases: float | None, num_tasks: int) -> tuple[int, int]:
    """Chosen by the eigenvalues there are two or more; splitting opposites can at most double a given number."""
    if num_bases is None:
        return min(2, num_tasks), num_tasks
    given = resolve_num_bases(num_bases, num_tasks)
    return given, min(2 * given, num_tasks)


@construction(
    "cluster",
    "cluster_bases",
    "Clusters of similar task vectors",
    PAPER,
    rule=lambda **options: scikit_learn(),
    counts=_count,
)
def cluster_bases(
    gram: Tensor,
    num_bases: float | None = None,
    *,
    inner: Annotated[Literal["mean", "sum"], Field(description="what becomes of a cluster")] = "mean",
    split_below: Annotated[
        float, Field(ge=-1, lt=0, description="a negative cosine; a cluster with one below it is split in two")
    ] = SPLIT_BELOW,
    seed: Annotated[int, Field(description="seed of the spectral clustering")] = 0,
) -> BasisWeights:
    """One basis per cluster of similar tasks, the mean or the sum of its task vectors.

    Args:
        gram: [T, T] inner products of the task vectors.
        num_bases: how many clusters, or a fraction of T when below 1; None where the eigenvalues jump. Splitting
            opposite tasks can add to them.
        inner: others than these two are not linear: see ``tvbases_hf.basis.clusters``.

    ``bound`` is that of any M vectors: clustering has none of its own. Needs scikit-learn.
    """
    gram = check_gram(gram)
    clusters = find_clusters(gram, num_bases, split_below=split_below, seed=seed)
    encoder = clusters.encoder(inner)
    return fitted("cluster", gram, encoder)


def find_clusters(
    gram: Tensor, num_clusters: float | None = None, *, split_below: float = SPLIT_BELOW, seed: int = 0
) -> Clusters:
    """Lines 2 to 13 of Algorithm 1; arguments as in ``cluster_bases``."""
    cosine = cosine_matrix(check_gram(gram))
    count = len(cosine)
    wanted = eigengap(cosine.abs()) if num_clusters is None else resolve_num_bases(num_clusters, count)
    groups = []
    for group in _spectral(cosine.abs(), wanted, seed):
        part = cosine[group][:, group]
        lowest = float(part.min())
        if lowest < split_below:
            groups += [[group[i] for i in half] for half in _spectral(part - lowest, 2, seed)]
        else:
            groups.append(group)
    return Clusters(tuple(tuple(group) for group in sorted(groups)))


def eigengap(similarity: Tensor) -> int:
    """k = argmax over 1 < i <= T - 1 of lambda_(i+1) - lambda_i of the Laplacian D - S, the first of equals.

    Fewer than three tasks leave no candidate; each is then a cluster of its own.
    """
    count = len(similarity)
    if count < 3:
        return count
    values = torch.linalg.eigvalsh(similarity.sum(1).diag() - similarity)
    gaps = values.diff()[1:]  # gaps[0] is between the second and the third eigenvalue
    return 2 + int((gaps >= gaps.max() * (1 - 1e-9)).nonzero()[0])


def cosine_matrix(gram: Tensor) -> Tensor:
    """[T, T] cosines, ones on the diagonal; a zero task vector is similar to none."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    cosine = (gram / norms[:, None] / norms[None, :]).clamp(-1, 1)
    return cosine.fill_diagonal_(1.0)


def _spectral(similarity: Tensor, count: int, seed: int) -> list[list[int]]:
    """Groups of positions; scikit-learn's spectral clustering where there is something to find."""
    size = len(similarity)
    if count == 1:
        return [list(range(size))]
    if count >= size:
        return [[index] for index in range(size)]
    model = scikit_learn().SpectralClustering(count, affinity="precomputed", random_state=seed)
    labels = model.fit_predict(similarity.clamp_min(FLOOR).numpy()).tolist()
    groups = [[index for index, label in enumerate(labels) if label == group] for group in range(count)]
    return [group for group in groups if group]


def scikit_learn() -> Any:
    """Its clustering; MissingExtraError where it is not installed."""
    try:
        import sklearn.cluster
    except ImportError as error:
        raise MissingExtraError(
            f'cluster bases need scikit-learn ({error}); pip install "tvbases-hf[cluster]"'
        ) from error
    return sklearn.cluster
