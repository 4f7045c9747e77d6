"""Autoencoder bases: convex combinations of the task vectors (AE paper, section 3.2), free or balanced.

How the default solver works. Give the M bases a total weight r = encoder @ 1 per task. Their span holds T r, so the
loss is at least that of the best M-dimensional subspace that holds T r: project T r out and take the spectrum that
remains. Any r > 0 attains this in closed form: let V [T, M-1] span the rest of the subspace with columns that sum to
zero, and F [M-1, M] be the vertices of a regular simplex (orthonormal rows that sum to zero). Then

    encoder = r 1^T / M + step * V Q F,     Q any rotation, step > 0 small enough that no entry is negative,

has columns that sum to 1, rows that sum to r, and that very span. So balanced bases (r = M/T for every task) need one
eigendecomposition and always reach their bound, and free bases are a search over T numbers r instead of T x M. The
rotation is ours to choose: we take a well-conditioned one, which keeps bases apart and the decoder small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.linalg import condition_number, fix_signs, solve_psd, symmetric
from ..errors import ParameterError
from .adam import adam_encoder
from .even import even_mixtures
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases, squared_error

PAPER = "https://arxiv.org/abs/2502.01015"
# Where the spectral bound is not attainable (Theorem 3.4) the best free encoder drops tasks altogether, and
# cond(encoder) grows like one over the weight they keep. So every task keeps a share of the average weight, and an
# encoder beyond FREE_CONDITION is moved towards equal weights as far as this share of the total squared norm allows.
FREE_FLOOR = 0.01
FREE_CONDITION = 100.0
FREE_SLACK = 5e-5
# The loss of free row sums has local minima: besides equal weights, the search starts from this many other places.
FREE_STARTS = 2
ROTATIONS = 64
# A weighted sum of task vectors whose squared norm is below this share of theirs is rounding noise of the Gram matrix.
CANCELLED_SUM = 1e-14
# Stay this far inside the simplex, so that every entry is positive: a softmax encoder has no zeros.
INTERIOR = 1 - 1e-9


def _go_together(
    *, solver: str, balance: bool, target_weights: Sequence[float] | None, even_errors: bool, **others: object
) -> None:
    if even_errors and not (balance and solver == "varpro"):
        raise ParameterError("even errors are of balanced bases by varpro; leave balance and solver as they are")
    if target_weights is not None and not balance:
        raise ParameterError("target_weights are the row sums of balanced bases; they need balance=True")


@construction("ae", "ae_bases", "Autoencoder task-vector bases", PAPER, rule=_go_together)
@torch.inference_mode(False)  # the searches differentiate, whatever the caller's mode
@torch.enable_grad()
def ae_bases(
    gram: Tensor,
    num_bases: float = 0.5,
    *,
    solver: Annotated[
        Literal["varpro", "adam"], Field(description="varpro: the optimum; adam: the paper's recipe")
    ] = "varpro",
    balance: Annotated[
        bool, Field(description="give every task the same weight in the sum of the bases; without it: as in the paper")
    ] = True,
    target_weights: Annotated[
        Sequence[float] | None, Field(description="each task's weight in the sum of balanced bases, instead of 1")
    ] = None,
    normalize: Annotated[bool, Field(description="count each task's error relative to its own norm")] = False,
    even_errors: Annotated[
        bool, Field(description="with balanced bases, reconstruct all tasks about equally well, and give none up")
    ] = False,
    temperature: Annotated[float, Field(gt=0, description="of adam's softmax over the tasks")] = 5.0,
    anneal: Annotated[
        float | None, Field(gt=0, le=1, description="factor on adam's temperature, every 500 steps")
    ] = None,
    steps: Annotated[int, Field(ge=1, description="with adam, how many")] = 4000,
    seed: Annotated[int, Field(description="chooses between equally good bases, and where adam starts")] = 0,
) -> BasisWeights:
    """M convex combinations of the tasks that reconstruct all of them best (autoencoder bases).

    Args:
        gram: [T, T] inner products of the task vectors.
        num_bases: M, or a fraction of T when below 1.
        solver: ``varpro`` (the optimum by variable projection) or ``adam`` (gradient descent on a softmax encoder and a
            linear decoder).
        balance: rows of the encoder sum to M/T, so that task arithmetic over the bases is task arithmetic over all
            tasks. False: only columns are constrained.
        target_weights: [T] positive weights for balanced rows to be proportional to, instead of uniform ones.
        normalize: short task vectors are then not given up.
        even_errors: choose the subspace that makes the sum of the *squares* of the tasks' relative squared errors
            least, instead of their sum. For what is done to single tasks. Beyond the paper; whether a negation gains by
            it depends on the tasks. ``loss`` is then relative, as with ``normalize``, and somewhat above ``bound``.
        temperature, anneal, steps: the temperature does not fall below 0.1. The optimum that ``varpro`` finds does not
            depend on them.

    Raises:
        ParameterError: M outside 1..T, options that do not go together, weights that are not positive.
    """
    gram = check_gram(gram)
    num_tasks = len(gram)
    num_bases = resolve_num_bases(num_bases, num_tasks)
    rows = _row_sums(target_weights, num_tasks, num_bases)
    total = float(gram.trace())
    unit = gram / total if total > 0 else gram
    normalize = normalize or even_errors
    scale = _task_scale(unit, normalize)
    if solver == "varpro":
        encoder = _optimal_encoder(unit, scale, rows, num_bases, seed, balance, even_errors)
        decoder = least_squares_decoder(unit, encoder)
    else:
        wanted = rows if balance else None
        encoder, decoder = adam_encoder(unit * num_tasks, num_bases, wanted, scale, temperature, anneal, steps, seed)
    spectral = _tail(_scaled(unit, scale), num_bases)
    bound = _row_sums_loss(unit, scale, rows, num_bases) if balance else spectral
    units = 1.0 if normalize else total
    return BasisWeights(
        method="ae",
        encoder=encoder,
        decoder=decoder,
        loss=units * squared_error(unit, encoder @ decoder, scale),
        bound=units * float(bound),
        spectral_bound=units * float(spectral),
        total=units * float((unit.diagonal() * scale).sum()),
    )


def fitted(method: str, gram: Tensor, encoder: Tensor) -> BasisWeights:
    """The bases of an encoder [T, M] that was chosen by other means, with the decoder of least error."""
    decoder = least_squares_decoder(gram, encoder)
    spectral = float(torch.linalg.eigvalsh(gram)[: len(gram) - encoder.shape[1]].sum().clamp_min(0))
    loss = squared_error(gram, encoder @ decoder)
    return BasisWeights(method, encoder, decoder, loss, spectral, spectral, total=float(gram.trace()))


def least_squares_decoder(gram: Tensor, encoder: Tensor) -> Tensor:
    """[M, T] the decoder of least reconstruction error for this encoder: (W^T G W)^+ W^T G."""
    # The bases' squared lengths if nothing cancelled: what cancelled is known only relative to that.
    squares = encoder.T.square() @ gram.diagonal()
    return solve_psd(encoder.T @ gram @ encoder, encoder.T @ gram, squares)


def _row_sums(target: Sequence[float] | None, num_tasks: int, num_bases: int) -> Tensor:
    if target is None:
        return torch.full((num_tasks,), num_bases / num_tasks, dtype=torch.float64)
    weights = torch.as_tensor(target, dtype=torch.float64)
    if weights.shape != (num_tasks,) or not torch.isfinite(weights).all() or (weights <= 0).any():
        raise ParameterError(f"target_weights must be {num_tasks} positive numbers, one per task; got {list(target)}")
    return weights * (num_bases / weights.sum())


def _task_scale(gram: Tensor, normalize: bool) -> Tensor:
    """[T] diagonal of S; a task vector that is zero has no relative error and gets weight 0."""
    norms = gram.diagonal()
    if not normalize:
        return torch.ones_like(norms)
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(norms))


def _scaled(gram: Tensor, scale: Tensor) -> Tensor:
    root = scale.sqrt()
    return symmetric(root[:, None] * gram * root[None, :])


def _tail(gram: Tensor, kept: int) -> Tensor:
    """Sum of all but the ``kept`` largest eigenvalues, not below zero."""
    return torch.linalg.eigvalsh(gram)[: len(gram) - kept].sum().clamp_min(0)


def _project_out(gram: Tensor, rows: Tensor) -> Tensor:
    """Gram matrix of what is left of the task vectors when the direction T @ rows is projected out."""
    image = gram @ rows
    energy = rows @ image
    # Vectors that cancel in the weighted sum leave nothing to project out.
    cancelled = energy <= CANCELLED_SUM * gram.trace() * rows.square().sum()
    return gram if cancelled else gram - torch.outer(image, image) / energy


def _optimal_encoder(
    gram: Tensor, scale: Tensor, rows: Tensor, num_bases: int, seed: int, balance: bool, even: bool
) -> Tensor:
    """[T, M] the encoder of least loss, balanced to ``rows`` or free; the tasks themselves where M = T allows it."""
    if num_bases == len(gram) and (rows == 1).all():
        return torch.eye(num_bases, dtype=torch.float64)
    if balance:
        return _encoder_with_rows(gram, scale, rows, num_bases, seed, even)
    return _free_encoder(gram, scale, num_bases, seed)


def _encoder_with_rows(
    gram: Tensor, scale: Tensor, rows: Tensor, num_bases: int, seed: int, even: bool = False
) -> Tensor:
    """The encoder of the module docstring: columns sum to 1, rows to ``rows``, loss at the bound for these rows.

    Or, ``even``, over the subspace whose errors are even.
    """
    if num_bases == 1:
        return rows[:, None].clone()
    mixtures = even_mixtures(_project_out(gram, rows), gram.diagonal(), num_bases - 1, seed) if even else None
    if mixtures is None:
        mixtures = _least_squares_mixtures(gram, scale, rows, num_bases - 1)
    directions = _zero_sum(mixtures, rows)
    simplex = _simplex(num_bases)
    best: tuple[float, Tensor] | None = None
    for rotation in _rotations(directions, simplex, seed):
        moves = directions @ (rotation @ simplex)
        step = INTERIOR * (rows[:, None] / num_bases / (-moves).clamp_min(torch.finfo(torch.float64).tiny)).min()
        encoder = rows[:, None] / num_bases + step * moves
        condition = condition_number(encoder)
        if best is None or condition < best[0] * (1 - 1e-9):
            best = condition, encoder
    assert best is not None
    return best[1]


def _least_squares_mixtures(gram: Tensor, scale: Tensor, rows: Tensor, count: int) -> Tensor:
    """[T, count] mixtures of the tasks that, with ``rows``, span the optimal subspace."""
    rest = _scaled(_project_out(gram, rows), scale)
    root = torch.where(scale > 0, scale, torch.ones_like(scale)).sqrt()
    null = rows / root
    # ``null`` is in the kernel; pushed below all others it stays out of the eigenvectors even if those are null too.
    push = rest.trace().clamp_min(1e-300) / null.square().sum()
    _, vectors = torch.linalg.eigh(rest - push * torch.outer(null, null))
    return fix_signs(vectors[:, -count:]) * root[:, None]


def _zero_sum(mixtures: Tensor, rows: Tensor) -> Tensor:
    """[T, count] orthonormal columns that sum to zero and, with ``rows``, span the same."""
    mixtures = mixtures - torch.outer(rows, mixtures.sum(dim=0)) / rows.sum()
    orthonormal, triangle = torch.linalg.qr(mixtures)
    return orthonormal * torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # whatever the order of the tasks


def _simplex(num_vertices: int) -> Tensor:
    """[M-1, M] orthonormal rows that sum to zero: the vertices of a regular simplex."""
    ones = torch.full((num_vertices, 1), 1 / math.sqrt(num_vertices), dtype=torch.float64)
    axes = torch.eye(num_vertices, dtype=torch.float64)[:, : num_vertices - 1]
    return torch.linalg.qr(torch.cat([ones, axes], dim=1)).Q[:, 1:].T.contiguous()


def _rotations(directions: Tensor, simplex: Tensor, seed: int):
    """Candidate rotations: one that points each basis at a task of its own, then random ones."""
    vertices = directions[_spread_rows(directions, simplex.shape[1])]
    left, _, right = torch.linalg.svd(vertices.T @ simplex.T)
    yield left @ right
    generator = torch.Generator().manual_seed(seed)
    size = len(simplex)
    for _ in range(ROTATIONS - 1):
        yield torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _spread_rows(directions: Tensor, count: int) -> list[int]:
    """Greedy choice of ``count`` rows far from one another's span (pivoted Gram-Schmidt, a constant column added)."""
    rows = torch.cat(
        [torch.full((len(directions), 1), 1 / math.sqrt(len(directions)), dtype=torch.float64), directions], 1
    )
    chosen: list[int] = []
    for _ in range(count):
        pick = int(rows.square().sum(dim=1).argmax())
        chosen.append(pick)
        axis = rows[pick] / rows[pick].norm().clamp_min(1e-300)
        rows = rows - torch.outer(rows @ axis, axis)
    return chosen


def _free_encoder(gram: Tensor, scale: Tensor, num_bases: int, seed: int) -> Tensor:
    """The encoder of least loss whose columns sum to 1; a little more loss where that makes it well-conditioned."""
    equal = torch.full((len(gram),), num_bases / len(gram), dtype=torch.float64)
    best = _best_row_sums(gram, scale, num_bases)
    encoder = _encoder_with_rows(gram, scale, best, num_bases, seed)
    if condition_number(encoder) <= FREE_CONDITION:
        return encoder
    allowed = _row_sums_loss(gram, scale, best, num_bases) + FREE_SLACK * float((gram.diagonal() * scale).sum())
    low, high = 0.0, 1.0  # the share of equal weights
    for _ in range(20):
        middle = (low + high) / 2
        if _row_sums_loss(gram, scale, torch.lerp(best, equal, middle), num_bases) <= allowed:
            low = middle
        else:
            high = middle
    return _encoder_with_rows(gram, scale, torch.lerp(best, equal, low), num_bases, seed)


def _row_sums_loss(gram: Tensor, scale: Tensor, rows: Tensor, num_bases: int) -> Tensor:
    """The least loss of an encoder with these row sums; all that the loss of a free encoder depends on."""
    return _tail(_scaled(_project_out(gram, rows), scale), num_bases - 1)


def _best_row_sums(gram: Tensor, scale: Tensor, num_bases: int) -> Tensor:
    """[T] row sums of least loss among all free encoders, each at least FREE_FLOOR of the average.

    Starts from equal weights, so that where the spectral bound is attainable a solution near them is found; where it
    is not, also from the positive parts of the directions that the best subspace holds.
    """
    share = (gram.diagonal() * scale).sum()
    rows = _descend(gram, scale, num_bases, torch.ones(len(gram), dtype=torch.float64))
    loss = float(_row_sums_loss(gram, scale, rows, num_bases))
    if loss <= float(_tail(_scaled(gram, scale), num_bases) + 1e-9 * share):
        return rows
    starts = _positive_directions(gram, scale, num_bases)
    starts.sort(key=lambda start: float(_row_sums_loss(gram, scale, _floored(start, num_bases), num_bases)))
    for start in starts[:FREE_STARTS]:
        other = _descend(gram, scale, num_bases, start)
        found = float(_row_sums_loss(gram, scale, other, num_bases))
        if found < loss - 1e-9 * float(share):
            rows, loss = other, found
    return rows


def _positive_directions(gram: Tensor, scale: Tensor, num_bases: int) -> list[Tensor]:
    """[T] positive parts of what is nearest to equal weights in the best subspace, and of its principal directions."""
    vectors = torch.linalg.eigh(_scaled(gram, scale)).eigenvectors[:, -num_bases:] * scale.sqrt()[:, None]
    found = [(vectors @ vectors.sum(dim=0)), *vectors.T, *-vectors.T]
    return [part for part in (direction.clamp_min(0) for direction in found) if part.sum() > 0]


def _floored(weights: Tensor, num_bases: int) -> Tensor:
    """[T] row sums in proportion to ``weights``, none below FREE_FLOOR of the average."""
    return num_bases * ((1 - FREE_FLOOR) * weights / weights.sum() + FREE_FLOOR / len(weights))


def _descend(gram: Tensor, scale: Tensor, num_bases: int, start: Tensor) -> Tensor:
    """[T] row sums at the local minimum of the loss that L-BFGS reaches from ``start`` [T], not negative."""
    start = start / start.sum() + FREE_FLOOR / len(start)  # a logit of minus infinity has no gradient
    logits = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _row_sums_loss(gram, scale, _floored(torch.softmax(logits, 0), num_bases), num_bases)
        if loss.requires_grad:  # vectors that cancel in the weighted sum leave nothing to differentiate
            loss.backward()
        return loss

    optimizer.step(closure)
    return _floored(torch.softmax(logits, 0), num_bases).detach()
