"""Principal components of the task vectors: the optimal reconstruction, and the AE paper's baseline (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import fix_signs, symmetric
from .weights import BasisWeights, check_gram, resolve_num_bases, squared_error


def pca_bases(gram: Tensor, num_bases: float) -> BasisWeights:
    """B = U_M S_M and decoder V_M^T of the centred task vectors; ``mean`` holds the weights 1/T of the mean vector.

    All from the double-centred Gram matrix. The mean is one more stored vector, so M components plus the mean are
    compared with M + 1 bases of another kind. ``bound`` is the least loss of a mean plus M components.
    """
    gram = check_gram(gram)
    num_tasks = len(gram)
    num_bases = resolve_num_bases(num_bases, num_tasks)
    centring = torch.eye(num_tasks, dtype=torch.float64) - 1 / num_tasks
    values, vectors = torch.linalg.eigh(symmetric(centring @ gram @ centring))
    loadings = fix_signs(vectors[:, -num_bases:].flip(1))
    encoder, decoder = centring @ loadings, loadings.T.contiguous()
    mean = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    return BasisWeights(
        method="pca",
        encoder=encoder,
        decoder=decoder,
        mean=mean,
        loss=squared_error(gram, encoder @ decoder + mean[:, None]),
        bound=float(values[: num_tasks - num_bases].sum().clamp_min(0)),
        spectral_bound=float(torch.linalg.eigvalsh(gram)[: num_tasks - num_bases].sum().clamp_min(0)),
        total=float(gram.trace()),
    )
