"""From a request to a basis: the task vectors' inner products, what the request says, and the vectors' source."""

from __future__ import annotations

import torch

from ..bases import CONSTRUCTIONS
from ..errors import ParameterError
from ..models.gram import Gram, gram_matrix
from ..models.vectors import Vectors
from ..storage.run import once
from .adapters.compress import compress_adapters
from .clusters import cluster_vectors
from .info import BasisInfo, describe
from .library.create import METHOD as LIBRARY
from .masks import METHOD as MASKS
from .masks import masked
from .ranks import truncate
from .request import Request
from .sources import EncodedVectors, VectorSource, stored_encoder


def build(
    vectors: Vectors, request: Request, *, dtype: torch.dtype | None = None, gram: Gram | None = None
) -> tuple[BasisInfo, VectorSource]:
    """What a basis says about itself before rounding, and where its vectors come from.

    Raises ParameterError for a request that cannot be met, before anything long is read.
    """
    request = request.resolved(vectors.are_adapters, len(vectors))
    if request.method == LIBRARY:
        raise ParameterError(
            f"a library (of {len(vectors)} adapters) is written as it is made, and never in memory as a whole: use "
            "compress(..., out), or method joint"
        )
    gram = gram or gram_matrix(vectors)
    if vectors.are_adapters:
        return compress_adapters(vectors, gram, request, dtype)
    if request.method == MASKS:
        return masked(vectors, gram, request.options, dtype)
    if request.method == "tsv":
        return truncate(vectors, gram, request.rank, request.budget, dtype)
    if request.merges_clusters:
        return cluster_vectors(vectors, gram, request.num_bases, request.options, dtype)
    construction, matrix = CONSTRUCTIONS[request.method or "ae"], gram.matrix
    weights = once(lambda: construction.solve(matrix, request.num_bases, **request.options))
    source = EncodedVectors(vectors, stored_encoder(weights), dtype, weights.mean is not None)
    return describe(vectors, gram, weights, construction.complete(request.options)), source
