"""What a merge should give, computed densely in float64 from the files, and ways to run a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from zoo.hf_models import Family, State, read_state

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Vectors:
    """theta_0 and the T task vectors, float64: one tensor [T, *shape] per name."""

    base: State
    tau: State

    @property
    def count(self) -> int:
        return len(next(iter(self.tau.values())))

    @property
    def matrix(self) -> Tensor:
        """[d, T] the task vectors as columns."""
        return torch.cat([tau.reshape(self.count, -1) for tau in self.tau.values()], dim=1).T

    @property
    def gram(self) -> Tensor:
        return self.matrix.T @ self.matrix

    def mixed(self, mixing: Tensor) -> State:
        """[K, *shape] per name: the columns of ``mixing`` [T, K] as sums of task vectors."""
        return {name: torch.tensordot(mixing.T, tau, dims=1) for name, tau in self.tau.items()}

    def rounding(self, mixing: Tensor, scale: float = 1.0) -> State:
        """How far a float32 computation of base + scale * sum of the mixed vectors may be off, per number."""
        terms = mixing.numel() + 4
        weight = abs(scale) * mixing.abs().sum(dim=1)
        sizes = {name: torch.tensordot(weight, tau.abs(), dims=1) for name, tau in self.tau.items()}
        return {name: terms * EPS * (self.base[name].abs() + size) for name, size in sizes.items()}


def read_vectors(base: Path, models: Sequence[Path]) -> Vectors:
    """Differences of the stored numbers, which float64 holds exactly; a tensor that a model lacks is unchanged."""
    origin = {name: tensor.double() for name, tensor in read_state(base).items() if tensor.is_floating_point()}
    tuned = [read_state(model) for model in models]
    tau = {
        name: torch.stack([(state[name].double() if name in state else tensor) - tensor for state in tuned])
        for name, tensor in origin.items()
    }
    return Vectors(origin, tau)


def family_vectors(family: Family) -> Vectors:
    return read_vectors(family.base, family.tuned())


def added(vectors: Vectors, mixing: Tensor, scale: float = 1.0) -> State:
    """theta_0 + scale * sum of the mixed vectors."""
    return {name: vectors.base[name] + scale * mixed.sum(dim=0) for name, mixed in vectors.mixed(mixing).items()}


def balanced_reconstruction(vectors: Vectors, num_bases: int) -> Tensor:
    """[T, T] R with T_hat = T R: projection on the best M-dimensional subspace that holds the sum of the task vectors.

    From singular vectors of the dense matrix; no encoder comes into it.
    """
    matrix = vectors.matrix
    total = matrix.sum(dim=1)
    axis = total / total.norm()
    rest = matrix - torch.outer(axis, axis @ matrix)
    left = torch.linalg.svd(rest, full_matrices=False).U[:, : num_bases - 1]
    span = torch.cat([axis[:, None], left], dim=1)
    return torch.linalg.lstsq(matrix, span @ (span.T @ matrix)).solution


def trimmed(deltas: Tensor, density: float) -> Tensor:
    """TIES, step 1: the largest ``density`` of each of the K vectors [K, *shape], by magnitude."""
    flat = deltas.reshape(len(deltas), -1)
    keep = max(1, int(density * flat.shape[1]))
    kept = torch.zeros_like(flat).scatter(1, flat.abs().topk(keep, dim=1).indices, 1.0)
    return (flat * kept).reshape(deltas.shape)


def sign_elected(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """TIES, steps 2 and 3: the sign of the larger mass, then the mean (or sum) of the vectors that agree with it."""
    weights = weights.reshape(-1, *[1] * (deltas.ndim - 1))
    weighted = deltas * weights
    elected = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = (weighted.sign() == elected).double()
    merged = (weighted * agrees).sum(dim=0)
    divisor = (weights * agrees).sum(dim=0)
    return merged / torch.where(divisor == 0, 1.0, divisor) if normalize else merged


def merge_config(
    family: Family, method: str = "ae_bases", dtype: str | None = "float32", **parameters: Any
) -> dict[str, Any]:
    """A mergekit configuration; ``lambda_`` stands for lambda, which is a keyword of Python."""
    renamed = {name.rstrip("_"): value for name, value in parameters.items()}
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(path)} for path in family.tuned()],
        "parameters": renamed,
    }
    return config | ({"dtype": dtype} if dtype else {})


def write_config(file: Path, config: Mapping[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return file


def run_stock(config: Mapping[str, Any], out: Path, *options: str) -> State:
    """mergekit's own command, which knows our methods because they are registered in this process."""
    from mergekit.scripts.run_yaml import main

    from tvbases_mergekit import register

    register()
    file = write_config(out.with_suffix(".yml"), config)
    main.main([str(file), str(out), "--quiet", *options], standalone_mode=False)
    return read_state(out)


def run_ours(config: Mapping[str, Any], out: Path, *options: str) -> State:
    """``tvbases mergekit-yaml``."""
    from tvbases_mergekit.command import merge

    file = write_config(out.with_suffix(".yml"), config)
    merge([str(file), str(out), "--quiet", *options])
    return read_state(out)


def assert_within(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: Mapping[str, Tensor]) -> None:
    """Every number of every tensor within its own bound."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        excess = (found[name].double() - tensor).abs() - bound[name]
        assert excess.max() <= 0, f"{name}: {int((excess > 0).sum())} of {tensor.numel()} numbers are off"


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a - b| / |b| over all tensors."""
    assert a.keys() == b.keys()
    square = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (square / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5
