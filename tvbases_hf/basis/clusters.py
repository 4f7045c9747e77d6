"""Vectors from clusters of vectors, by any merging method.

Means and sums of clusters are ``cluster_bases``. Here the inner method may be anything that merges: TIES, top-k, TSV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.blocks import blocks
from ..algebra.delta import Delta, Dense, dense
from ..bases import BasisWeights, Clusters, find_clusters
from ..bases.weights import squared_error
from ..errors import ParameterError
from ..merging.apply import merged
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..storage.checkpoint import TensorInfo
from ..storage.parallel import written
from ..storage.tensor_files import TensorFiles
from .info import VECTORS_STEM, BasisInfo, describe
from .sources import refit, write_vectors


def clustered(vectors: Vectors, clusters: Clusters, inner: str = "mean", **options: Any) -> Vectors:
    """One vector per cluster: its members merged by ``inner``, a name in ``merging.METHODS``, with its options.

    ``encoder`` holds each cluster's mean: how the members' data is to be mixed, whatever the inner method does.
    """
    if clusters.num_tasks != len(vectors):
        raise ParameterError(f"the clusters are of {clusters.num_tasks} vectors, but there are {len(vectors)}")
    changes = [merged(vectors.selected(group), inner, **options) for group in clusters.members]
    return replace(
        vectors,
        labels=tuple("+".join(vectors.labels[i] for i in group) for group in clusters.members),
        encoder=vectors.encoder @ clusters.encoder(),
        read=lambda name: [change(name) for change in changes],
    )


# A basis directory of merged vectors


@dataclass(frozen=True)
class MergedVectors:
    """The vectors of a basis, made of the task vectors by methods that need not be linear; see VectorSource."""

    tasks: Vectors
    vectors: Vectors
    dtype: torch.dtype | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        rows, base = len(self.vectors), self.vectors.base.tensors
        return {name: TensorInfo((rows, *base[name].shape), self.dtype or base[name].dtype) for name in self.names}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.vectors.base.tensors[name].shape

    def deltas(self, name: str) -> list[Delta]:
        info = self.tensors[name]
        return [Dense(dense(d).reshape(info.shape[1:]).to(info.dtype)) for d in self.vectors.deltas(name)]

    def own(self, name: str, task: int, base: object) -> list[Delta]:
        return []

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        rows, count, tensors = len(self.vectors), len(self.tasks), self.tensors
        files = TensorFiles(directory, VECTORS_STEM, tensors)

        def write(name: str) -> list[float]:
            parts = self.deltas(name)
            write_vectors(files, name, parts)
            products = torch.zeros(rows, rows + count, dtype=torch.float64, device=self.tasks.device)
            for part in blocks([*parts, *self.tasks.deltas(name)]):
                products += part[:rows] @ part.T
            return products.flatten().tolist()

        width = rows * (rows + count)
        table = written(files, self.names, write, width, "Writing bases", lambda n: tensors[n].nbytes)
        inner, cross = table.sum(0).reshape(rows, rows + count).split([rows, count], dim=1)
        decoder, saved = refit(inner, cross, False)
        norms = torch.tensor(info.gram, dtype=torch.float64).diagonal()
        loss = float((norms - saved).clamp_min(0).sum() / (norms.sum() or 1.0))
        return replace(info.refitted(decoder, saved), loss=loss)


def cluster_vectors(
    tasks: Vectors,
    gram: Gram,
    num_bases: float | None,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> tuple[BasisInfo, MergedVectors]:
    """A basis of clusters whose ``inner`` method is not linear; what ``cluster_bases`` does not know is its option."""
    own = {name: options[name] for name in ("split_below", "seed") if name in options}
    rest = {name: value for name, value in options.items() if name not in (*own, "inner")}
    clusters = find_clusters(gram.matrix, num_bases, **own)
    vectors = clustered(tasks, clusters, options["inner"], **rest)
    return describe(tasks, gram, _weights(gram.matrix, clusters), options), MergedVectors(tasks, vectors, dtype)


def _weights(gram: Tensor, clusters: Clusters) -> BasisWeights:
    """What is known before the vectors are written: the shares of the tasks' data; the decoder is fitted then."""
    encoder = clusters.encoder()
    decoder = (encoder > 0).to(torch.float64).T.contiguous()
    bound = float(torch.linalg.eigvalsh(gram)[: len(gram) - len(clusters)].sum().clamp_min(0))
    loss = squared_error(gram, encoder @ decoder)
    return BasisWeights("cluster", encoder, decoder, loss, bound, bound, total=float(gram.trace()))
