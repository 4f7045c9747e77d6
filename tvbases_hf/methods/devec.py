"""Shared and unique components of task vectors, one weight matrix at a time (DeVec), in factor space throughout."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .. import defaults
from ..algebra.delta import Delta, Dense, LowRank, dense, reshaped, zeros
from ..algebra.layout import is_matrix, is_stack, stacked, unstacked
from ..algebra.linalg import orthonormal_columns
from ..algebra.products import premultiplied, square_norm
from ..algebra.rank import Rank, RankRule
from ..algebra.sums import side_by_side, total
from ..algebra.svd import factored_range, svd
from ..errors import ParameterError
from ..options import checked, options_of

Threshold = Annotated[
    float, Field(gt=0, le=1, description="degree of sharing above which a direction counts as shared; the paper: 0.85")
]
Subspace = Annotated[defaults.Subspace, Field(description="how shared directions are found")]
Pool = Annotated[defaults.Pool, Field(description="which tasks are compared")]
Side = Annotated[defaults.Side, Field(description="the space that is compared")]
DenseRank = Annotated[Rank, Field(description="rank rule for dense changes")]
FactoredRank = Annotated[Rank | None, Field(description="rank rule for low-rank changes; none: their own rank")]
THRESHOLD = defaults.THRESHOLD
DEFAULT_RANK = defaults.RANK
# A matrix whose smaller side is below this has no low-rank structure to speak of: its change counts as unique.
MIN_SIDE = 16
CHANCE_TRIALS = 8
CHANCE_SIDE = 256


class WholeSpaceError(ParameterError):
    """A change that spans all directions: everything would count as shared with it."""


@dataclass(frozen=True)
class Options:
    """How to decompose; see the paper's section 3 and the module's functions. Raises ParameterError on bad values."""

    threshold: Threshold = THRESHOLD
    subspace: Subspace = "chain"
    pool: Pool = "joint"
    side: Side = "column"
    rank: DenseRank = DEFAULT_RANK
    factored_rank: FactoredRank = None

    def __post_init__(self) -> None:
        checked("a decomposition", options_of(Options), vars(self))


@dataclass(frozen=True)
class Decomposition:
    """``shared[i]`` + ``unique[i]`` is the change of task i; ``combined`` the weighted shared change (equation 14).

    With pool ``pairs`` ``unique`` are the changes as they are, and ``pairwise`` holds the shared change of every pair,
    in the order of itertools.combinations.
    ``ranks`` are the dimensions of the tasks' column spaces, ``shared_dims`` of what was found shared for each.
    """

    shared: tuple[Delta, ...]
    unique: tuple[Delta, ...]
    combined: Delta
    ranks: tuple[int, ...]
    shared_dims: tuple[int, ...]
    pairwise: tuple[Delta, ...] = ()

    def each(self, function: Callable[[Delta], Delta]) -> Decomposition:
        """Of every change in it."""
        parts = [tuple(map(function, group)) for group in (self.shared, self.unique, self.pairwise)]
        return Decomposition(parts[0], parts[1], function(self.combined), self.ranks, self.shared_dims, parts[2])


def decompose(
    deltas: Sequence[Delta], options: Options = Options(), targets: Sequence[int] | None = None
) -> Decomposition:
    """Split the changes of one weight into shared and unique components (section 3.2).

    Args:
        deltas: the T tasks' changes of one weight matrix, dense or low-rank; n x n is never built.
        options: pool ``joint``: one subspace shared by all tasks. ``iterative``: from each target, one after another,
            what it shares with each other task is removed; its subspace then shares nothing above the threshold with
            any of them (subspaces chain and angles). ``pairs``: the shared component of every pair.
        targets: tasks to decompose when the pool is iterative; None for all. The others keep their change as unique.

    Raises:
        ParameterError: a column space fills the whole space, so that everything would be declared shared with it.
    """
    if targets is not None and not set(targets) <= set(range(len(deltas))):
        raise ParameterError(f"targets {list(targets)} must be numbers of tasks, 0 to {len(deltas) - 1}")
    if len(deltas[0].shape) != 2 or min(deltas[0].shape) < MIN_SIDE or len(deltas) < 2:
        return _all_unique(deltas, options.pool)
    if options.side == "row":
        return _decompose_columns([delta.T for delta in deltas], options, targets).each(lambda delta: delta.T)
    return _decompose_columns(deltas, options, targets)


def decompose_weight(
    name: str,
    shape: Sequence[int],
    deltas: Sequence[Delta],
    options: Options = Options(),
    targets: Sequence[int] | None = None,
    *,
    transposed: bool = False,
) -> Decomposition:
    """``decompose`` of the weight ``name``: experts in one tensor [E, n, m] one by one, other than matrices as unique.

    ``transposed``: its matrices are stored as [in, out]. Ranks and dimensions of experts are added up.
    """
    if transposed:
        options = replace(options, side="row" if options.side == "column" else "column")
    if is_stack(name, shape):
        return _stacked([decompose(part, options, targets) for part in unstacked(deltas, shape)])
    if not is_matrix(name, shape):
        return _all_unique([reshaped(delta, shape, torch.float32) for delta in deltas], options.pool)
    return decompose(deltas, options, targets)


def _stacked(parts: Sequence[Decomposition]) -> Decomposition:
    join = lambda groups: tuple(stacked(group) for group in zip(*groups, strict=True))  # noqa: E731
    add = lambda rows: tuple(sum(column) for column in zip(*rows, strict=True))  # noqa: E731
    return Decomposition(
        join([part.shared for part in parts]),
        join([part.unique for part in parts]),
        stacked([part.combined for part in parts]),
        add([part.ranks for part in parts]),
        add([part.shared_dims for part in parts]),
        join([part.pairwise for part in parts]),
    )


def _decompose_columns(deltas: Sequence[Delta], options: Options, targets: Sequence[int] | None) -> Decomposition:
    spaces = [column_space(delta, options.rank, options.factored_rank) for delta in deltas]
    _check_not_whole(spaces, options.rank)
    if options.pool == "pairs":
        return _pairs(deltas, spaces, options)
    if options.pool == "iterative":
        chosen = range(len(deltas)) if targets is None else targets
        splits = [
            _remove_one_by_one(delta, spaces, index, options) if index in chosen else (_zero_like(delta), delta, 0)
            for index, delta in enumerate(deltas)
        ]
        shared, unique, dims = (tuple(group) for group in zip(*splits, strict=True))
        return Decomposition(shared, unique, weighted_mean(shared), _ranks(spaces), dims)
    common = shared_subspace(spaces, options.threshold, options.subspace)
    shared = tuple(project(common, delta) for delta in deltas)
    unique = tuple(subtract(delta, part, common) for delta, part in zip(deltas, shared, strict=True))
    return Decomposition(shared, unique, weighted_mean(shared), _ranks(spaces), (common.shape[1],) * len(deltas))


def column_space(
    delta: Delta, rank: str | float | RankRule, factored_rank: str | float | RankRule | None = None
) -> Tensor:
    """[n, r] orthonormal basis of a change's column space: the numerical one if low-rank, else by the rank rule."""
    if delta.factors is not None:
        return factored_range(delta.factors, None if factored_rank is None else RankRule.parse(factored_rank))
    return svd(delta, rank).U


def shared_subspace(spaces: Sequence[Tensor], threshold: float, subspace: str = "chain") -> Tensor:
    """[n, s] orthonormal basis of the directions shared by k column spaces U_i [n, r_i].

    ``chain``: eigenvectors of P_1 P_2 ... P_k above the threshold, as in the paper. They lie in the first space, so
    they depend on the order of the tasks: for k = 2 within the angles that count as shared, for k > 2 by more (and
    from k = 4 the number of them, too).
    ``mean``: eigenvectors of (1/k) sum P_i, its eigenvalues mapped so that k = 2 agrees; does not depend on the order.
    ``angles``: squared cosines of the principal angles of two spaces (supplement, section 6); chain of k = 2.
    """
    if any(space.shape[1] == 0 for space in spaces):
        return spaces[0][:, :0]
    values, vectors = spectrum(spaces, subspace)
    chosen = vectors[:, values > threshold]
    # Eigenvectors of a chain are not orthogonal; one that depends on the others to half the digits is a copy.
    return orthonormal_columns(chosen, cutoff=torch.finfo(chosen.dtype).eps ** 0.5).to(spaces[0].dtype)


def spectrum(spaces: Sequence[Tensor], subspace: str = "chain") -> tuple[Tensor, Tensor]:
    """Degrees of sharing (1: in all spaces) and the directions they belong to, [n, r]; both float64.

    For ``chain`` the non-zero eigenvalues of P_1 ... P_k are those of K = (U_1^T U_2)(U_2^T U_3)...(U_k^T U_1), which
    is r_1 x r_1, and U_1 y is the eigenvector for K y = lambda y. Of complex ones the real parts count, and y and its
    conjugate stand for the plane that their real and imaginary parts span.
    """
    exact = [space.to(torch.float64) for space in spaces]
    if subspace == "angles" and len(exact) != 2:
        raise ParameterError(f"subspace: angles is defined for two tasks, not {len(exact)}; use chain or mean")
    if subspace != "mean" and len(exact) == 2:  # K is symmetric: A A^T with A = U_1^T U_2
        left, cosines, _ = torch.linalg.svd(exact[0].T @ exact[1], full_matrices=False)
        return cosines.square(), exact[0] @ left
    if subspace == "chain":
        ring = [*exact, exact[0]]
        values, vectors = torch.linalg.eig(
            functools.reduce(torch.matmul, [a.T @ b for a, b in itertools.pairwise(ring)])
        )
        return values.real, exact[0] @ torch.where(values.imag < 0, vectors.imag, vectors.real)
    joined = torch.cat(exact, dim=1)
    values, vectors = torch.linalg.eigh(joined.T @ joined)  # values: k times the mean's eigenvalues
    degree = ((values - 1).clamp_min(0) / (len(exact) - 1)).square()
    return degree, joined @ (vectors / values.clamp_min(1e-12).sqrt())


def project(space: Tensor, delta: Delta) -> LowRank:
    """Z Z^T W as a low-rank delta of rank s; O(n s m) for a dense W, O((n + m) r s) for a low-rank one."""
    return LowRank(space, premultiplied(space.T, delta))


def subtract(delta: Delta, shared: LowRank, space: Tensor) -> Delta:
    """W - Z Z^T W; a low-rank W keeps its rank."""
    if delta.factors is not None:
        left = delta.factors.left.to(space.dtype)
        return LowRank(left - space @ (space.T @ left), delta.factors.right)
    return Dense((dense(delta) - dense(shared)).to(torch.float32))


def weighted_mean(shared: Sequence[Delta]) -> Delta:
    """One shared change: the mean of the components, weighted by their norms (equation 14)."""
    norms = [square_norm(part) ** 0.5 for part in shared]
    if not any(norms):
        return _zero_like(shared[0])
    return total(shared, [norm / sum(norms) for norm in norms])


@functools.cache
def chance_share(rows: int, ranks: tuple[int, ...], threshold: float, subspace: str = "chain") -> float:
    """Share of the first task's dimensions that random subspaces of these ranks would share, by simulation.

    Sides above CHANCE_SIDE are scaled down: the answer depends on r/n, not on n. For two spaces and large n it is 0
    below r/n = (1 - sqrt(1 - threshold)) / 2 (.306 at .85) and grows quickly above.
    """
    scale = min(1.0, CHANCE_SIDE / rows)
    side = round(rows * scale)
    small = [max(1, round(rank * scale)) for rank in ranks]
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(CHANCE_TRIALS):
        spaces = [
            torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64)).Q for rank in small
        ]
        found += shared_subspace(spaces, threshold, subspace).shape[1]
    return min(1.0, found / (CHANCE_TRIALS * small[0]))


def chance_limit(threshold: float) -> float:
    """r/n above which two random r-dimensional subspaces of R^n look shared: 4a(1 - a) = threshold."""
    return (1 - (1 - threshold) ** 0.5) / 2


def _remove_one_by_one(
    delta: Delta, spaces: Sequence[Tensor], index: int, options: Options
) -> tuple[Delta, Delta, int]:
    """Shared part, unique part and shared dimensions of one target (the paper's toxicity protocol, section 4.3).

    The target's column space shrinks by what was removed; it is not decomposed again, which could only bring back
    directions that the rank rule had left out.
    """
    current, own, removed = delta, spaces[index], []
    for other, space in enumerate(spaces):
        if other == index:
            continue
        common = shared_subspace([own, space], options.threshold, options.subspace)
        if common.shape[1]:
            part = project(common, current)
            current, removed = subtract(current, part, common), [*removed, part]
            own = orthonormal_columns(own - common @ (common.T @ own), cutoff=torch.finfo(own.dtype).eps ** 0.5)
    if not removed:
        return _zero_like(delta), delta, 0
    shared = side_by_side([(part, 1.0) for part in removed])
    return shared, current, shared.rank


def _pairs(deltas: Sequence[Delta], spaces: Sequence[Tensor], options: Options) -> Decomposition:
    found, dims = [], [0] * len(deltas)
    for i, j in itertools.combinations(range(len(deltas)), 2):
        common = shared_subspace([spaces[i], spaces[j]], options.threshold, options.subspace)
        found.append(weighted_mean([project(common, deltas[i]), project(common, deltas[j])]))
        dims[i], dims[j] = max(dims[i], common.shape[1]), max(dims[j], common.shape[1])
    zeros = tuple(_zero_like(delta) for delta in deltas)
    return Decomposition(zeros, tuple(deltas), weighted_mean(found), _ranks(spaces), tuple(dims), tuple(found))


def _check_not_whole(spaces: Sequence[Tensor], rank: str | float) -> None:
    rows = spaces[0].shape[0]
    whole = [index for index, space in enumerate(spaces) if space.shape[1] >= rows]
    if whole:
        raise WholeSpaceError(
            f"{len(whole)} of {len(spaces)} tasks (first: number {whole[0]}) span all {rows} directions, so everything "
            f"would count as shared with them. Rank {rank} is for full fine-tunes: choose one that keeps fewer, for "
            f"example energy:0.9, fraction:0.25 or gavish-donoho. Adapters keep their own rank: where it is {rows} or "
            "more, leave this weight out or compare the other side"
        )


def _all_unique(deltas: Sequence[Delta], pool: str) -> Decomposition:
    zeros, none = tuple(_zero_like(delta) for delta in deltas), (0,) * len(deltas)
    pairs = tuple(_zero_like(first) for first, _ in itertools.combinations(deltas, 2)) if pool == "pairs" else ()
    return Decomposition(zeros, tuple(deltas), zeros[0], none, none, pairs)


def _ranks(spaces: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(space.shape[1] for space in spaces)


def _zero_like(delta: Delta) -> Delta:
    return zeros(delta.shape, delta.device)
