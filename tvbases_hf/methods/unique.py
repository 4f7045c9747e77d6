"""Models merged by what each has for itself: the unique components of DeVec."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from ..algebra.delta import Delta
from ..algebra.sums import total
from ..errors import ParameterError
from .devec import DenseRank, Options, Pool, Side, Subspace, Threshold, chance_limit, chance_share, decompose
from .registry import method

LOG = logging.getLogger("tvbases_hf")
Pairs = Annotated[
    Literal["together", "trained"],
    Field(description="one weight for all that is shared, or (tvbases tune) a trained one for each part"),
]
SharedWeight = Annotated[float, Field(description="weight of the shared component; 0: none of it")]


@method("devec_unique", title="DeVec, unique components", source="https://arxiv.org/abs/2512.22511", of_matrices=True)
def devec_unique(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    threshold: Threshold = Options.threshold,
    subspace: Subspace = Options.subspace,
    pool: Pool = Options.pool,
    side: Side = Options.side,
    rank: DenseRank = Options.rank,
    shared_weight: SharedWeight = 0.0,
    pairs: Pairs = "together",
) -> Delta:
    """The sum of what the vectors do not share with one another.

    sum_i w_i unique_i + shared_weight * shared. A vector of weight 0 is compared with the others and not added.
    ``pairs: trained`` is the paper's merging protocol: a coefficient for each vector, whole, and for what each pair
    shares, which ``tvbases tune`` finds on data (learning.devec).

    Raises ParameterError for a vector that spans its whole space, with which everything would be shared, and for
    trained coefficients, which need data.
    """
    if pairs == "trained":
        raise ParameterError("pairs: trained needs data; use tvbases tune CONFIG OUT --data NAME=FILE")
    options = Options(threshold, subspace, pool, side, rank)
    split = decompose(deltas, options, [index for index, weight in enumerate(weights) if weight])
    _warn_of_chance(split.ranks, deltas[0].shape, options)
    shared = split.pairwise if pool == "pairs" else (split.combined,)
    return total([*split.unique, *shared], [*weights, *[shared_weight] * len(shared)])


_warned: set[Options] = set()


def _warn_of_chance(ranks: Sequence[int], shape: Sequence[int], options: Options) -> None:
    """Say once per setting that subspaces this large look shared by chance."""
    if options in _warned or len(ranks) < 2 or len(shape) != 2:
        return
    side = shape[0] if options.side == "column" else shape[1]
    if min(ranks) <= chance_limit(options.threshold) * side:
        return
    _warned.add(options)
    share = chance_share(side, tuple(sorted(ranks)[:2]), options.threshold)
    LOG.warning(
        "devec_unique: rank %s keeps %d of %d directions of a weight %s; above %.0f %% of them even two random "
        "subspaces look shared (here %.0f %% of their directions). Consider a smaller rank, for example fraction:0.15",
        options.rank, min(ranks), side, list(shape), 100 * chance_limit(options.threshold), 100 * share,
    )  # fmt: skip
