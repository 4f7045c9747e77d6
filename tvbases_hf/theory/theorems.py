"""The error bounds of the AE paper (Theorems 3.5 to 3.7, proved as B.5 to B.11) and the constants in them.

All of them assume that the gradient of every task's loss vanishes at its own theta_i (B.2), that the loss lies below
its quadratic with curvature L_i = |Hessian at theta_i| around theta_i, as far as the merged models are away (B.3), and
coefficients that are not negative and sum to 1 (B.4; in negation: alpha <= 1). Where these hold the bounds are tight
for addition and OOD: two orthogonal (or opposed) task vectors of one length and a loss as curved in all directions
reach them. Those for negation are not: they add |L_j(theta_0) - L_j(theta_j)|, which for a quadratic loss has the
other sign, so that a quadratic never exceeds L C (1/2 + eps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.weights import check_gram
from ..errors import ParameterError


@dataclass(frozen=True)
class Constants:
    """``c`` >= |tau_i|^2, ``epsilon`` >= |cos(tau_i, tau_j)|, and the spectrum of G [T] around the M-th eigenvalue.

    ``gap`` is lambda_M - lambda_{M+1}, ``tail`` is lambda_{M+1}: 0 for M = T.
    """

    c: float
    epsilon: float
    gap: float
    tail: float
    eigenvalues: tuple[float, ...]


def constants(gram: Tensor, num_bases: int) -> Constants:
    """From G [T, T]; the cosine with a task vector that is zero counts as 0."""
    gram = check_gram(gram)
    count = len(gram)
    if not 1 <= num_bases <= count:
        raise ParameterError(f"num_bases is {num_bases}; choose 1 to {count}")
    norms = gram.diagonal().sqrt()
    cosine = (gram / norms[:, None] / norms).nan_to_num(0.0, 0.0, 0.0).fill_diagonal_(0)
    values = [*torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).tolist(), 0.0]
    return Constants(
        float(gram.diagonal().max()),
        float(cosine.abs().max().clamp_max(1)),
        values[num_bases - 1] - values[num_bases],
        values[num_bases],
        tuple(values[:count]),
    )


def alignment(inner: Tensor, c: float) -> tuple[int, float]:
    """(i*, gamma) of Theorem 3.6: the source with the largest <tau_tar, tau_i> [T], and that inner product over C."""
    best = int(inner.argmax())
    return best, float(inner[best]) / c if c > 0 else 0.0


def coverage(encoder: Tensor, task: int) -> tuple[int, float]:
    """(m*, rho): the basis that holds most of a task, and how much, from an encoder [T, M] of convex columns."""
    best = int(encoder[task].argmax())
    return best, float(encoder[task, best])


def addition_bound(smoothness: float, c: float, epsilon: float) -> float:
    """L_i(theta_0 + sum alpha_i tau_i) - L_i(theta_i) <= L_i C (1 + eps) (11), and the same over convex bases."""
    return smoothness * c * (1 + epsilon)


def ood_bound(smoothness: float, c: float, gamma: float, rho: float = 1.0) -> float:
    """L_tar(theta_0 + tau_i*) - L_tar(theta_tar) <= L_tar C (1 - gamma) (12); theta_0 + B_m*: C (1 - rho gamma) (13).

    C bounds |tau_tar|^2 too. (13) needs that no source opposes the target, <tau_tar, tau_i> >= 0 for all i: Theorem
    B.8 says so, the statement of Theorem 3.6 leaves it out, and without it (13) is false.
    """
    return smoothness * c * (1 - rho * gamma)


def negation_bound(smoothness: float, c: float, epsilon: float) -> float:
    """L_j(theta_0 - alpha tau_i) - L_j(theta_0) <= L_j C (3/2 + eps), for j other than i and alpha <= 1 (14)."""
    return smoothness * c * (1.5 + epsilon)


def basis_negation_bound(smoothness: float, c: float, epsilon: float, residual: float) -> float:
    """The same for a reconstruction tau_hat_i: <= L_j C (5/2 + 2 eps) + L_j ``residual``.

    ``residual`` is |tau_hat_i - tau_i|^2 (Theorem B.10, any bases), or lambda_{M+1}(G) if the bases attain the spectral
    bound (15), as free ones do at best; balanced bases leave more.
    """
    return smoothness * c * (2.5 + 2 * epsilon) + smoothness * residual
