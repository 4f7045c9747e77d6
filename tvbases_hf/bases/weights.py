"""What every basis construction returns: how bases are made of tasks, and tasks of bases."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.linalg import condition_number
from ..errors import ParameterError

# What a Gram matrix may be off by, relative to its size: as much as if it had been computed in float32.
GRAM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class BasisWeights:
    """M bases B = T @ encoder of T task vectors, and the reconstruction mean + B @ decoder. All float64.

    ``loss`` and the bounds are sums of squared errors in the units of the Gram matrix: sum_i s_i |tau_hat_i - tau_i|^2,
    with s_i = 1 unless ``normalize`` was asked for. ``bound`` is the least possible loss under the method's own
    constraint, ``spectral_bound`` that of any rank-M reconstruction (Eckart-Young; AE paper, equation 7).
    """

    method: str
    encoder: Tensor
    decoder: Tensor
    loss: float
    bound: float
    spectral_bound: float
    mean: Tensor | None = None
    """[T] weights of the vector that is added to every reconstruction (PCA), or None."""
    total: float = 1.0
    """The loss of reconstructing nothing: loss / total is the relative squared error."""

    @property
    def num_tasks(self) -> int:
        return self.encoder.shape[0]

    @property
    def num_bases(self) -> int:
        return self.encoder.shape[1]

    @property
    def effective_weights(self) -> Tensor:
        """[T] what each task weighs in the sum of the bases, encoder @ 1. Task arithmetic depends on nothing else."""
        return self.encoder.sum(dim=1)

    @property
    def reconstruction(self) -> Tensor:
        """[T, T] matrix R with T_hat = T @ R."""
        combined = self.encoder @ self.decoder
        return combined if self.mean is None else combined + self.mean[:, None]

    @property
    def condition(self) -> float:
        """Condition number of the encoder: how much rounding of the stored bases is amplified in a reconstruction."""
        return condition_number(self.encoder)


def squared_error(gram: Tensor, reconstruction: Tensor, scale: Tensor | None = None) -> float:
    """Tr(S E^T G E) with E = R - I (AE paper, Lemma 3.2), never below zero. ``scale`` [T] is the diagonal of S."""
    residual = reconstruction - torch.eye(len(gram), dtype=torch.float64)
    per_task = (residual * (gram @ residual)).sum(dim=0)
    return float((per_task if scale is None else per_task * scale).sum().clamp_min(0))


def resolve_num_bases(num_bases: float | None, num_tasks: int) -> int:
    """M as an integer: a number below 1 is a fraction of the T tasks (at least one basis).

    Raises ParameterError unless 1 <= M <= T.
    """
    is_number = isinstance(num_bases, numbers.Real) and not isinstance(num_bases, bool)
    if not is_number or num_bases is None or not 0 < num_bases < float("inf"):
        raise ParameterError(
            f"num_bases must be a positive number, got {num_bases!r}; for example 2, or 0.5 for half of the tasks"
        )
    if num_bases < 1:
        return max(1, round(float(num_bases) * num_tasks))
    if float(num_bases) != int(num_bases):
        raise ParameterError(f"num_bases must be a whole number, or a fraction below 1; got {num_bases}")
    if num_bases > num_tasks:
        raise ParameterError(
            f"num_bases is {int(num_bases)} but there {'is' if num_tasks == 1 else 'are'} only {num_tasks} "
            f"task{'s' if num_tasks > 1 else ''}; choose 1 to {num_tasks}, or a fraction below 1"
        )
    return int(num_bases)


def check_gram(gram: Tensor) -> Tensor:
    """``gram`` as a symmetric float64 matrix on the CPU; ParameterError if it cannot be a Gram matrix."""
    gram = torch.as_tensor(gram, dtype=torch.float64, device="cpu")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ParameterError(f"a Gram matrix is square, [tasks, tasks]; got shape {list(gram.shape)}")
    if not torch.isfinite(gram).all():
        raise ParameterError("the Gram matrix holds NaN or infinity")
    if (gram - gram.T).abs().max() > GRAM_TOLERANCE * gram.abs().max():
        raise ParameterError("the Gram matrix is not symmetric")
    if (gram.diagonal() < 0).any():
        raise ParameterError("the Gram matrix has a negative squared norm on its diagonal")
    gram = (gram + gram.T) / 2
    values = torch.linalg.eigvalsh(gram / gram.abs().max()) if gram.any() else gram.diagonal()
    if values[0] < -GRAM_TOLERANCE * values[-1]:
        raise ParameterError(
            f"the Gram matrix has a negative eigenvalue ({values[0] / values[-1]:.2g} of the largest): "
            "no vectors have these inner products"
        )
    return gram
