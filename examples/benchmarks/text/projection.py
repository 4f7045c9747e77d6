"""RandProj of the AE paper: task vectors projected on a random subspace, which holds almost nothing of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomProjection:
    """Q [d, M] with orthonormal columns, never stored: a seeded Gaussian matrix Z, orthonormalised as Z @ mixing."""

    seed: int
    mixing: Tensor
    """[M, M] float64, the inverse transposed Cholesky factor of Z^T Z."""
    coefficients: Tensor
    """[M, T] float64, C = Q^T T."""

    def columns(self, name: str, size: int) -> Tensor:
        """[size, M] the rows of Q that belong to the tensor ``name``, float64."""
        return gaussian_rows(self.seed, name, size, len(self.mixing)) @ self.mixing

    def reconstruct(self, name: str, size: int) -> Tensor:
        """[T, size] the projected task vectors Q C, one row per task."""
        return (self.columns(name, size) @ self.coefficients).T


def rand_proj(tensors: Iterable[tuple[str, Tensor]], num_bases: int, *, seed: int = 0) -> RandomProjection:
    """Project task vectors, given as (name, [T, size] columns), on a random M-dimensional subspace, one pass."""
    inner: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for name, columns in tensors:
        rows = gaussian_rows(seed, name, columns.shape[1], num_bases)
        inner = inner + rows.T @ rows
        cross = cross + rows.T @ columns.to(torch.float64).T
    mixing = torch.linalg.inv(torch.linalg.cholesky(torch.as_tensor(inner))).T
    return RandomProjection(seed, mixing, mixing.T @ torch.as_tensor(cross))


def gaussian_rows(seed: int, name: str, size: int, num_bases: int) -> Tensor:
    """[size, M] rows of the Gaussian matrix for one tensor; they depend on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(size, num_bases, generator=generator, dtype=torch.float64)
