"""Principal components of the task vectors: the optimal reconstruction, and the AE paper's baselines (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.linalg import fix_signs, symmetric
from .ae import PAPER, fitted
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases, squared_error


@construction("pca", "pca_bases", "PCA task-vector bases", PAPER, has_mean=True)
def pca_bases(gram: Tensor, num_bases: float = 0.5) -> BasisWeights:
    """The principal components of the task vectors, and their mean, which is stored as well.

    B = U_M S_M and decoder V_M^T of the centred task vectors, from the double-centred Gram matrix; ``mean`` holds the
    weights 1/T of the mean vector. It is one more stored vector, so M components plus the mean are compared with M + 1
    bases of another kind. ``bound`` is the least loss of a mean plus M components.
    """
    gram = check_gram(gram)
    num_tasks = len(gram)
    num_bases = resolve_num_bases(num_bases, num_tasks)
    centring, values, loadings = _components(gram, num_bases)
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


@construction("pca_positive", "pca_positive", "PCA task-vector bases with positive shares", PAPER)
def pca_positive(gram: Tensor, num_bases: float = 0.5) -> BasisWeights:
    """Convex combinations of the tasks where the principal components are positive (PCA>=0).

    Of each component v_m the softmax over its strictly positive entries, 0 elsewhere (AE paper, Table 13). Methods
    that mix the tasks' data by the encoder apply, as to an autoencoder's bases. No mean is stored; the decoder is the
    best for these bases. The sign of a component, which has no meaning of its own, is the one that makes its entry of
    largest magnitude positive.
    """
    gram = check_gram(gram)
    num_tasks = len(gram)
    num_bases = resolve_num_bases(num_bases, num_tasks)
    _, _, loadings = _components(gram, num_bases)
    encoder = torch.softmax(loadings.masked_fill(loadings <= 0, float("-inf")), dim=0)
    return fitted("pca_positive", gram, encoder)


def _components(gram: Tensor, num_bases: int) -> tuple[Tensor, Tensor, Tensor]:
    """The centring matrix, the eigenvalues of the double-centred Gram matrix, and its M leading eigenvectors [T, M]."""
    num_tasks = len(gram)
    centring = torch.eye(num_tasks, dtype=torch.float64) - 1 / num_tasks
    values, vectors = torch.linalg.eigh(symmetric(centring @ gram @ centring))
    return centring, values, fix_signs(vectors[:, -num_bases:].flip(1))
