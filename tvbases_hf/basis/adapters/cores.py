"""T low-rank changes of one weight in joint coordinates, where everything costs powers of the ranks, never n x m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.components import SVD
from ...algebra.delta import LowRank
from ...algebra.svd import factored_svd

# Widths of a shared subspace that are tried: all up to this many, then about as many, evenly spaced.
WIDTHS = 32
# Combinations of pivots may have coefficients up to this; each swap of pivots until then multiplies their volume.
MAX_COEFFICIENT = 2.0
# Directions that no kept component has more of than this (relative) are rounding noise, not part of the subspace.
EMPTY = 1e-9


@dataclass(frozen=True)
class Cores:
    """Change t = left @ outs[t] @ ins[t].T @ right.T, float64.

    left [n, p] and right [m, q] have orthonormal columns; outs[t] [p, r_t], ins[t] [q, r_t]; p, q <= sum of the ranks.
    """

    left: Tensor
    right: Tensor
    outs: tuple[Tensor, ...]
    ins: tuple[Tensor, ...]

    @classmethod
    def of(cls, changes: Sequence[LowRank]) -> Cores:
        """By two thin QRs: O((n + m) R^2), R the sum of the ranks."""
        sizes = [change.rank for change in changes]
        left, outs = torch.linalg.qr(torch.cat([change.left.to(torch.float64) for change in changes], dim=1))
        right, ins = torch.linalg.qr(torch.cat([change.right.to(torch.float64).T for change in changes], dim=1))
        return cls(left, right, outs.split(sizes, dim=1), ins.split(sizes, dim=1))

    def transposed(self) -> Cores:
        return Cores(self.right, self.left, self.ins, self.outs)

    def gram(self) -> Tensor:
        """[T, T] inner products of the changes."""
        return block_sums(torch.cat(self.outs, dim=1), torch.cat(self.ins, dim=1), [p.shape[1] for p in self.ins])

    def overlap(self) -> Tensor:
        """[T, T] share of the smaller of two changes' row spaces that lies in the other's; about r/m by chance."""
        bases = [torch.linalg.qr(part).Q for part in self.ins]
        sizes = [basis.shape[1] for basis in bases]
        stacked = torch.cat(bases, dim=1)
        smaller = torch.tensor([[max(1, min(a, b)) for a in sizes] for b in sizes])
        return block_sums(stacked, stacked, sizes) / smaller

    def combined(self, shares: Tensor) -> SVD:
        """Singular components of sum_t shares[t] * change t, in joint coordinates."""
        used = [(float(share), t) for t, share in enumerate(shares) if share]
        if not used:
            return SVD(self.outs[0][:, :0], self.outs[0].new_zeros(0), self.ins[0][:, :0])
        left = torch.cat([share * self.outs[t] for share, t in used], dim=1)
        return factored_svd(LowRank(left, torch.cat([self.ins[t] for _, t in used], dim=1).T))

    def reduced(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per task Q [p, r] orthonormal and C [r, q] with change t = left Q C right^T."""
        pairs = [torch.linalg.qr(part) for part in self.outs]
        return [q for q, _ in pairs], [r @ part.T for (_, r), part in zip(pairs, self.ins, strict=True)]


def block_sums(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """[T, T] sums over the blocks of (a^T a) * (b^T b): inner products of the T products a_t b_t^T."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    member = torch.nn.functional.one_hot(owner, len(sizes)).to(a.dtype)
    return member.T @ ((a.T @ a) * (b.T @ b)) @ member


def shared_axes(cores: Cores, weights: Tensor) -> Tensor:
    """[q, q] orthonormal axes of the row space, by their share of the weighted changes' energy, largest first.

    They are the right singular vectors of the changes stacked on one another, change t scaled by sqrt(weights[t]).
    """
    _, images = cores.reduced()
    scaled = torch.cat([image * weight.sqrt() for image, weight in zip(images, weights, strict=True)])
    return torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1)


def widths(limit: int) -> list[int]:
    """Which widths of a shared subspace to try, 1 to ``limit``."""
    if limit <= WIDTHS:
        return list(range(1, limit + 1))
    return sorted({1 + round(step * (limit - 1) / (WIDTHS - 1)) for step in range(WIDTHS)})


def energies_within(cores: Cores, axes: Tensor, tried: Sequence[int]) -> list[Tensor]:
    """Per width R: [T, r] squared singular values of each change restricted to the leading R axes, ascending."""
    _, images = cores.reduced()
    rows = max(len(image) for image in images)
    stacked = torch.stack([torch.nn.functional.pad(image @ axes, (0, 0, 0, rows - len(image))) for image in images])
    squares, start, found = stacked.new_zeros(len(images), rows, rows), 0, []
    for width in tried:
        part = stacked[:, :, start:width]
        squares = squares + part @ part.mT
        start = width
        found.append(torch.linalg.eigvalsh(squares).clamp_min(0))
    return found


def largest(values: Sequence[Tensor], count: int) -> list[int]:
    """How many of each of several descending lists are among the ``count`` largest values of all."""
    owner = torch.repeat_interleave(torch.arange(len(values)), torch.tensor([len(part) for part in values]))
    order = torch.cat(list(values)).argsort(descending=True, stable=True)[:count]
    return torch.bincount(owner[order], minlength=len(values)).tolist()


@dataclass(frozen=True)
class Shared:
    """K components of all tasks over R rows that some of them have in common.

    Component k = lefts[:, k] times row k; the rows of ``pivots`` are ``rows`` [R, m] itself, the others' are
    ``mix`` [K - R, R] @ rows. ``sizes`` [T] components per task, which are listed task by task.
    """

    lefts: Tensor
    rows: Tensor
    mix: Tensor
    pivots: tuple[int, ...]
    sizes: tuple[int, ...]


def share_rows(cores: Cores, weights: Tensor, width: int, count: int) -> Shared:
    """The ``count`` components of most weighted energy of the changes restricted to the ``width`` leading shared axes.

    An interpolative decomposition: the shared rows are those of R well-chosen components (pivots), so that nothing
    but the other components' R coefficients has to be stored beside them. R is smaller than ``width`` where the
    components that were kept do not span it.
    """
    axes = shared_axes(cores, weights)[:, :width]
    bases, images = cores.reduced()
    parts = [torch.linalg.svd(image @ axes, full_matrices=False) for image in images]
    sizes = largest([weight * part.S.square() for weight, part in zip(weights, parts, strict=True)], count)
    lefts, rows = [], []
    for basis, (outer, values, inner), size in zip(bases, parts, sizes, strict=True):
        root = values[:size].sqrt()
        lefts.append(basis @ outer[:, :size] * root)
        rows.append(root[:, None] * inner[:size])
    coordinates = torch.cat(rows)
    pivots = well_conditioned_rows(coordinates)
    mix = _coefficients(coordinates[pivots], coordinates[[k for k in range(len(coordinates)) if k not in set(pivots)]])
    shared = coordinates[pivots] @ (cores.right @ axes).T
    return Shared(cores.left @ torch.cat(lefts, dim=1), shared, mix, tuple(pivots), tuple(sizes))


def well_conditioned_rows(matrix: Tensor) -> list[int]:
    """Indices, ascending, of as many rows as ``matrix`` has rank; all others are combinations with small coefficients.

    Greedy by what is left of each row, then swaps until no coefficient exceeds MAX_COEFFICIENT: each swap multiplies
    the volume of the chosen rows by more than that, so there are few.
    """
    rest, chosen = matrix.clone(), []
    limit = EMPTY * float(matrix.norm(dim=1).max()) if len(matrix) else 0.0
    while len(chosen) < min(matrix.shape):
        pick = int(rest.square().sum(dim=1).argmax())
        length = float(rest[pick].norm())
        if length <= limit:
            break
        chosen.append(pick)
        axis = rest[pick] / length
        rest = rest - torch.outer(rest @ axis, axis)
    for _ in range(10 * len(chosen)):
        coefficients = _coefficients(matrix[chosen], matrix).abs()
        row, column = divmod(int(coefficients.argmax()), len(chosen))
        if coefficients[row, column] <= MAX_COEFFICIENT:
            break
        chosen[column] = row
    return sorted(chosen)


def _coefficients(rows: Tensor, others: Tensor) -> Tensor:
    """X with X @ rows = others, for independent rows."""
    basis, core = torch.linalg.qr(rows.T)
    return torch.linalg.solve_triangular(core, basis.T @ others.T, upper=True).T
