"""The bases that mergekit can ask for: their parameters, what is wrong with some, and how they are solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from torch import Tensor

from tvbases_hf.bases import CONSTRUCTIONS as KNOWN
from tvbases_hf.bases import BasisWeights, ae_bases, cluster_bases, pca_bases
from tvbases_hf.bases.cluster import SPLIT_BELOW
from tvbases_hf.bases.weights import resolve_num_bases
from tvbases_hf.errors import ParameterError

# A number, a fraction, or None where the method may choose.
NumBases = Any


def _as_given(num_bases: NumBases, num_tasks: int) -> tuple[int, int]:
    number = resolve_num_bases(num_bases, num_tasks)
    return number, number


def _accept(parameters: Mapping[str, Any]) -> None:
    """Nothing to check."""


@dataclass(frozen=True)
class Construction:
    """One way from a Gram matrix to bases.

    ``check`` raises ParameterError for parameters with which it would fail; ``counts`` tells how few and how many bases
    a number of tasks may give.
    """

    name: str
    title: str
    parameters: tuple[ParameterSpec, ...]
    solve: Callable[[Tensor, NumBases, Mapping[str, Any]], BasisWeights]
    check: Callable[[Mapping[str, Any]], object] = _accept
    counts: Callable[[NumBases, int], tuple[int, int]] = _as_given

    @property
    def options(self) -> tuple[str, ...]:
        """Names of what ``solve`` takes beside the number of bases."""
        return tuple(spec.name for spec in self.parameters if spec.name != "num_bases")


def choose(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ParameterError(f"{name}: {value!r} is unknown; choose {' or '.join(known)}")
    return value


def _shared(name: str, kind: Any, default: Any) -> ParameterSpec:
    return ParameterSpec(name, kind, ParameterScope.SHARED, default=default)


def _solve_ae(gram: Tensor, num_bases: NumBases, options: Mapping[str, Any]) -> BasisWeights:
    names = {"normalize_tasks": "normalize"}
    return ae_bases(gram, num_bases, **{names.get(name, name): value for name, value in options.items()})


def _check_ae(parameters: Mapping[str, Any]) -> None:
    names = ("solver", "even_errors", "balance")
    KNOWN["ae"].checked({name: parameters[name] for name in names})


def _solve_pca(gram: Tensor, num_bases: NumBases, options: Mapping[str, Any]) -> BasisWeights:
    return pca_bases(gram, num_bases)


def _solve_clusters(gram: Tensor, num_bases: NumBases, options: Mapping[str, Any]) -> BasisWeights:
    return cluster_bases(gram, num_bases, **options)


def _check_clusters(parameters: Mapping[str, Any]) -> None:
    KNOWN["cluster"].checked({name: parameters[name] for name in ("inner", "split_below")})


NUM_BASES = _shared("num_bases", float, 0.5)
AE = Construction(
    "ae_bases",
    "Autoencoder task-vector bases",
    (
        NUM_BASES,
        _shared("solver", str, "varpro"),
        _shared("temperature", float, 5.0),
        _shared("balance", bool, True),
        _shared("normalize_tasks", bool, False),
        _shared("even_errors", bool, False),
        _shared("seed", int, 0),
    ),
    _solve_ae,
    _check_ae,
)
PCA = Construction("pca_bases", "PCA task-vector bases", (NUM_BASES,), _solve_pca)
CLUSTER = Construction(
    "cluster_bases",
    "Clusters of similar task vectors",
    (
        _shared("num_bases", Optional[float], None),  # noqa: UP045 (for pydantic on Python 3.10)
        _shared("inner", str, "mean"),
        _shared("split_below", float, SPLIT_BELOW),
        _shared("seed", int, 0),
    ),
    _solve_clusters,
    _check_clusters,
    KNOWN["cluster"].counts,
)
CONSTRUCTIONS = (AE, PCA, CLUSTER)
