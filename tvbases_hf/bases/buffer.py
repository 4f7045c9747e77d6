"""Bases of a growing sequence of tasks in M vectors: what one more task does to the small matrices (AE paper, Alg. 1).

While there is room a task vector is appended; when there is none the M vectors are compressed to M - 1 first. What a
stored vector is made of, how every past task is reconstructed, and how far off that may be follow from the inner
products of one step: the original vectors are not needed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.linalg import solve_psd
from ..errors import ParameterError
from .ae import ae_bases
from .random import rand_select

# Those that keep M vectors, and those that keep the merged vector alone.
BUFFERED = ("ae", "rand_select")
RUNNING = ("ta", "magmax", "ties", "opcm")
METHODS = (*BUFFERED, *RUNNING)
LINEAR = (*BUFFERED, "ta")


@dataclass(frozen=True)
class Buffer:
    """K stored vectors B of T tasks so far; all float64.

    ``encoder`` [T, K]: B = T encoder where the method is linear, up to the rounding of storage (elsewhere 1: every task
    is in the one vector). ``decoder`` [K, T]: tau_hat = B decoder. ``weights`` [K]: sum_k weights_k B_k is the merged
    vector. ``gram`` [K, K] of the vectors as stored, ``norms`` [T] of the task vectors. ``errors`` [T] are upper bounds
    of |tau_hat - tau|, ``estimates`` [T] what it is if the losses of different steps are orthogonal to each other.
    """

    encoder: Tensor
    decoder: Tensor
    weights: Tensor
    gram: Tensor
    norms: Tensor
    errors: Tensor
    estimates: Tensor

    @classmethod
    def empty(cls) -> Buffer:
        none, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        return cls(matrix, matrix, none, matrix, none, none, none)

    @property
    def size(self) -> int:
        """K, the number of stored vectors."""
        return len(self.weights)

    @property
    def num_tasks(self) -> int:
        return len(self.norms)


@dataclass(frozen=True)
class Step:
    """What the next task does: the new vectors are [B, tau] ``mixing`` [K + 1, K'], None where that is not linear."""

    mixing: Tensor | None
    weights: Tensor


def next_step(
    buffer: Buffer, method: str, budget: int, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Step:
    """Append the next task vector, after making room for it if there is none.

    Compressed by ``ae`` with ``balance`` (the default), the bases' sum weighted by ``weights`` stays the sum of all
    task vectors: rows of the encoder are proportional to the old weights. With ``balance=False``, as in the paper,
    and for ``rand_select`` every stored vector weighs 1.
    """
    size, options = buffer.size, dict(options or {})
    if method in RUNNING:
        return Step(torch.ones(size + 1, 1, dtype=torch.float64) if method == "ta" else None, _ones(1))
    if size < budget:
        return _appended(torch.eye(size, dtype=torch.float64), buffer.weights)
    if method == "rand_select":
        return _appended(_dropped(buffer.gram, seed + buffer.num_tasks), _ones(size - 1))
    balance = options.get("balance", True)
    target = buffer.weights.tolist() if balance else None
    encoder = ae_bases(buffer.gram, size - 1, target_weights=target, seed=seed, **options).encoder
    return _appended(encoder, _ones(size - 1) * (buffer.weights.sum() / (size - 1) if balance else 1.0))


def follow(buffer: Buffer, step: Step, method: str, joint: Tensor) -> Buffer:
    """The buffer after a step, from the inner products of everything that it touched.

    ``joint`` [K + 1 + K', K + 1 + K'] is the Gram matrix of the old vectors, the new task vector, and the new vectors
    as they are stored. Every old reconstruction X D, X = [B, tau], becomes B' W D with W the least-squares fit of X by
    B', so |tau_hat' - tau| <= |tau_hat - tau| + |(X - B' W) D|.
    """
    count = buffer.size + 1
    before, cross, inner = joint[:count, :count], joint[count:, :count], joint[count:, count:]
    fit = solve_psd(inner, cross, inner.diagonal())
    residual = before - cross.T @ fit - fit.T @ cross + fit.T @ inner @ fit
    parts, shares = _with_one(buffer.decoder), _with_one(buffer.encoder.T).T
    lost = (parts * (residual @ parts)).sum(0).clamp_min(0).sqrt()
    none = torch.zeros(1, dtype=torch.float64)
    norms = torch.cat([buffer.norms, before[-1:, -1].clamp_min(0).sqrt()])
    weights = step.weights
    if method == "opcm":  # the merged vector is as long as a task vector is on average
        length = inner[0, 0].clamp_min(0).sqrt()
        weights = norms.mean() / length * _ones(1) if length > 0 else _ones(1)
    return Buffer(
        encoder=shares @ (step.mixing if step.mixing is not None else torch.ones(count, 1, dtype=torch.float64)),
        decoder=fit @ parts,
        weights=weights,
        gram=inner,
        norms=norms,
        errors=torch.cat([buffer.errors, none]) + lost,
        estimates=torch.hypot(torch.cat([buffer.estimates, none]), lost),
    )


def check_budget(method: str, budget: object) -> None:
    """ParameterError for a number of vectors that a method cannot keep."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget != int(budget) or budget < 1:
        raise ParameterError(f"num_bases is the number of vectors to keep, a whole number; got {budget!r}")
    if method in RUNNING and budget != 1:
        raise ParameterError(f"online {method} keeps one vector, the merged one; leave num_bases out, or set it to 1")
    if method == "ae" and budget < 2:
        raise ParameterError("online ae needs num_bases of at least 2: one for the past and one for the newest task")


def _dropped(gram: Tensor, seed: int) -> Tensor:
    """[K, K - 1] the identity without a column at random."""
    if len(gram) == 1:
        return gram.new_zeros(1, 0)
    return rand_select(gram, len(gram) - 1, seed=seed).encoder


def _appended(encoder: Tensor, weights: Tensor) -> Step:
    """What ``encoder`` [K, K'] makes of the old vectors, and the new one as it is, with weight 1."""
    return Step(_with_one(encoder), torch.cat([weights, _ones(1)]))


def _with_one(matrix: Tensor) -> Tensor:
    """[K + 1, T + 1] block diagonal: one more vector that is one more task."""
    rows, columns = matrix.shape
    larger = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)
    larger[:rows, :columns], larger[rows, columns] = matrix, 1.0
    return larger


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)
