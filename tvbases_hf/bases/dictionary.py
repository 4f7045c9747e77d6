"""Dictionary learning over the tasks: each is restored from few of the bases (Mairal et al., 2009)."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.linalg import GRAM_CUTOFF
from ..errors import MissingExtraError
from .ae import fitted, least_squares_decoder
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases, squared_error

PAPER = "https://doi.org/10.1145/1553374.1553463"


@construction(
    "dictionary", "dictionary_bases", "Dictionary of task vectors", PAPER, rule=lambda **options: _scikit_learn()
)
def dictionary_bases(
    gram: Tensor,
    num_bases: float = 0.5,
    *,
    sparsity: Annotated[
        float, Field(gt=0, description="weight of the l1 norm of a task's shares, relative to its own length")
    ] = 0.1,
    steps: Annotated[int, Field(ge=1, description="most steps of the search")] = 1000,
    seed: Annotated[int, Field(description="chooses what replaces a basis that no task uses")] = 0,
) -> BasisWeights:
    """Vectors in the tasks' span of which each task uses few (dictionary learning).

    min 1/2 |T - B C|^2 + sparsity |C|_1 over B of unit columns, by scikit-learn, on coordinates that have the tasks'
    inner products, with tasks of mean length 1. Shrunk shares are then fitted anew, by least squares over the bases
    that a task uses. A basis is a mixture with weights of both signs, scaled so that their magnitudes sum to 1.
    """
    gram = check_gram(gram)
    count = resolve_num_bases(num_bases, len(gram))
    values, vectors = torch.linalg.eigh(gram)
    keep = values > GRAM_CUTOFF * values[-1].clamp_min(0)
    if not keep.any():
        return fitted("dictionary", gram, torch.full((len(gram), count), 1 / len(gram), dtype=torch.float64))
    scale = (gram.trace() / len(gram)).sqrt()
    coordinates = vectors[:, keep] * values[keep].sqrt() / scale  # [T, rank], a row per task
    model = _scikit_learn().DictionaryLearning(
        count, alpha=sparsity, max_iter=steps, tol=1e-9, fit_algorithm="cd", transform_algorithm="lasso_cd",
        transform_max_iter=10_000, random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shares that have settled to fewer digits than asked for
        used = torch.from_numpy(model.fit_transform(coordinates.numpy())).abs() > 0
    directions = torch.from_numpy(model.components_)  # [M, rank]
    encoder = vectors[:, keep] @ (directions / (values[keep].sqrt() / scale)).T
    encoder = encoder / encoder.abs().sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    encoder = encoder * torch.where(encoder.sum(dim=0) < 0, -1.0, 1.0)
    decoder = _refitted(gram, encoder, used)
    spectral = float(torch.linalg.eigvalsh(gram)[: len(gram) - count].sum().clamp_min(0))
    loss = squared_error(gram, encoder @ decoder)
    return BasisWeights("dictionary", encoder, decoder, loss, spectral, spectral, total=float(gram.trace()))


def _refitted(gram: Tensor, encoder: Tensor, used: Tensor) -> Tensor:
    """[M, T] the decoder of least error with zeros where ``used`` [T, M] says that a task does not use a basis."""
    decoder = torch.zeros(encoder.shape[1], len(gram), dtype=torch.float64)
    for task, row in enumerate(used):
        if row.any():
            decoder[row, task] = least_squares_decoder(gram, encoder[:, row])[:, task]
    return decoder


def _scikit_learn() -> Any:
    """Its decompositions; MissingExtraError where it is not installed."""
    try:
        import sklearn.decomposition
    except ImportError as error:
        raise MissingExtraError(
            f'dictionary learning needs scikit-learn ({error}); pip install "tvbases-hf[cluster]"'
        ) from error
    return sklearn.decomposition
