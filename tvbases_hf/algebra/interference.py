"""How far the tasks' singular directions of one weight matrix get into each other's way (TSV paper, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .components import SVD
from .delta import Delta
from .products import premultiplied


def interference(parts: Sequence[SVD]) -> float:
    """Singular task interference, the entrywise 1-norm of (U^T U - I) S (V^T V - I) (equation 7).

    U [n, k], S [k] and V [m, k] hold the components of all tasks: whole spectra, or what was kept of them. It is added
    up task by task, so that no k x k matrix is made.
    """
    left = torch.cat([part.U for part in parts], dim=1).to(torch.float64)
    right = torch.cat([part.V for part in parts], dim=1).to(torch.float64)
    values = torch.cat([part.S for part in parts]).to(torch.float64)
    found, start = 0.0, 0
    for part in parts:
        own = range(start, start + part.rank)
        overlap = left[:, start : start + part.rank].T @ left
        overlap[range(part.rank), own] -= 1
        overlap *= values
        found += float(((overlap @ right.T) @ right - overlap).abs().sum())
        start += part.rank
    return found


def own_interference(merged: Delta, parts: Sequence[SVD]) -> float:
    """What a merged change does beside each task's own, in that task's directions: sum_t |c U_t^T X V_t - S_t|_1.

    c is the scale at which X comes closest to all tasks there (least squares), so that a merge does not depend on its
    scale; 0 of a merge that acts on every task's directions as the task does. At c = 1 these are, for the plain sum,
    the blocks of equation 7 that lie on the diagonal.
    """
    exact = [SVD(*(x.to(torch.float64) for x in (part.U, part.S, part.V))) for part in parts]
    seen = [premultiplied(part.U.T, merged) @ part.V for part in exact]
    square = sum(float(block.square().sum()) for block in seen)
    along = sum(float(block.diagonal() @ part.S) for block, part in zip(seen, exact, strict=True))
    scale = along / square if square else 0.0
    return sum(float((scale * block - part.S.diag()).abs().sum()) for block, part in zip(seen, exact, strict=True))


def overlaps(spaces: Sequence[Tensor]) -> Tensor:
    """[T, T] of orthonormal U_i [n, r_i]: |U_i^T U_j|^2 / min(r_i, r_j), the share of the smaller space in the other.

    1 on the diagonal and of a space that holds the other, 0 of orthogonal spaces, max(r_i, r_j) / n of random ones;
    0 of a space without directions.
    """
    exact = [space.to(torch.float64) for space in spaces]
    rows = [[float((a.T @ b).square().sum()) / max(1, min(a.shape[1], b.shape[1])) for b in exact] for a in exact]
    return torch.tensor(rows, dtype=torch.float64)
