"""Merge methods that work on one weight at a time: ``tsv``, ``tsv_compress`` and ``devec_unique``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.devec import DEFAULT_RANK, THRESHOLD, Options, chance_limit, chance_share, decompose
from tvbases_hf.methods.tsv import default_rank, truncate, tsv_merge

LOG = logging.getLogger("tvbases_mergekit")
TSV_PAPER = "https://arxiv.org/abs/2412.00081"
DEVEC_PAPER = "https://arxiv.org/abs/2512.22511"

Rank = Union[float, str]  # noqa: UP007 (pydantic evaluates it, on Python 3.10 too)
LAMBDA = ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0)
WEIGHT = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)
TASK_RANK = ParameterSpec("rank", Optional[Rank], ParameterScope.SHARED, default=None)  # noqa: UP045


@dataclass(frozen=True, eq=False)
class LayerwiseMerge(GroupMergeMethod):
    """theta_0 + lambda * change(deltas, weights): the change of one weight, from the models' changes of it."""

    spec: MergeMethodSpec
    change: Callable[..., list[tuple[float, Delta]]]
    check: Callable[[Mapping[str, Any]], object]
    """Raises ParameterError for parameters with which the merge would fail."""

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        assert group.base is not None  # the contract requires it
        base = group.base.tensor
        if not group.non_base:
            return base
        deltas = [Dense(entry.tensor, base) for entry in group.non_base]
        weights = [float(parameters["weight"][entry.id]) for entry in group.non_base]
        work = torch.promote_types(base.dtype, torch.float32)
        merged = torch.zeros_like(base, dtype=work)
        for factor, delta in self.change(deltas, weights, parameters, group.metadata.name or "a tensor"):
            if factor:
                merged += factor * dense(delta, work)
        return (base.to(work) + parameters["lambda"] * merged).to(base.dtype)


def _tsv(deltas: list[Delta], weights: list[float], parameters: Any, name: str) -> list[tuple[float, Delta]]:
    merged = tsv_merge(
        deltas,
        weights,
        rank=parameters["rank"],
        low_rank=parameters["low_rank"],
        orthogonalize=parameters["orthogonalize"],
    )
    return [(1.0, merged)]


def _tsv_compress(deltas: list[Delta], weights: list[float], parameters: Any, name: str) -> list[tuple[float, Delta]]:
    rank = default_rank(len(deltas)) if parameters["rank"] is None else parameters["rank"]
    return [(weight, truncate(delta, rank)) for weight, delta in zip(weights, deltas, strict=True) if weight]


def _check_rank(parameters: Mapping[str, Any]) -> None:
    if parameters["rank"] is not None:
        RankRule.parse(parameters["rank"])


def _devec_options(parameters: Mapping[str, Any]) -> Options:
    return Options(**{name: parameters[name] for name in ("threshold", "subspace", "pool", "side", "rank")})


def _devec(deltas: list[Delta], weights: list[float], parameters: Any, name: str) -> list[tuple[float, Delta]]:
    options = _devec_options(parameters)
    try:
        split = decompose(deltas, options, [index for index, weight in enumerate(weights) if weight])
    except ParameterError as error:
        raise ParameterError(f"devec_unique, {name}: {error}") from error
    sides = deltas[0].shape[0] if options.side == "column" else deltas[0].shape[-1]
    _warn_of_chance(name, split.ranks, sides, options)
    shared = split.pairwise if options.pool == "pairs" else (split.combined,)
    return [*zip(weights, split.unique, strict=True), *((parameters["shared_weight"], part) for part in shared)]


_warned: set[Options] = set()


def _warn_of_chance(name: str, ranks: tuple[int, ...], side: int, options: Options) -> None:
    """Say once per setting that subspaces this large look shared by chance."""
    if options in _warned or len(ranks) < 2 or min(ranks) <= chance_limit(options.threshold) * side:
        return
    _warned.add(options)
    share = chance_share(side, tuple(sorted(ranks)[:2]), options.threshold)
    LOG.warning(
        "devec_unique: rank %s keeps %d of %d directions of %s; above %.0f %% of them even two random subspaces look "
        "shared (here %.0f %% of their directions). Consider a smaller rank, for example fraction:0.15",
        options.rank, min(ranks), side, name, 100 * chance_limit(options.threshold), 100 * share,
    )  # fmt: skip


def _spec(name: str, pretty: str, url: str, parameters: tuple[ParameterSpec, ...]) -> MergeMethodSpec:
    return MergeMethodSpec(
        name=name,
        parameters=(LAMBDA, WEIGHT, *parameters),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=1),
        pretty_name=pretty,
        reference_url=url,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )


def _shared(name: str, kind: Any, default: Any) -> ParameterSpec:
    return ParameterSpec(name, kind, ParameterScope.SHARED, default=default)


TSV = LayerwiseMerge(
    _spec(
        "tsv",
        "TSV-Merge",
        TSV_PAPER,
        (TASK_RANK, _shared("low_rank", bool, True), _shared("orthogonalize", bool, True)),
    ),
    _tsv,
    _check_rank,
)
TSV_COMPRESS = LayerwiseMerge(
    _spec("tsv_compress", "TSV-Compress", TSV_PAPER, (TASK_RANK,)), _tsv_compress, _check_rank
)
DEVEC_UNIQUE = LayerwiseMerge(
    _spec(
        "devec_unique",
        "DeVec, unique components",
        DEVEC_PAPER,
        (
            _shared("threshold", float, THRESHOLD),
            _shared("subspace", str, "chain"),
            _shared("pool", str, "joint"),
            _shared("side", str, "column"),
            _shared("rank", Rank, DEFAULT_RANK),
            _shared("shared_weight", float, 0.0),
        ),
    ),
    _devec,
    _devec_options,
)
LAYERWISE = (TSV, TSV_COMPRESS, DEVEC_UNIQUE)
