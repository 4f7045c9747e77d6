"""One more task vector into a merged one: continual TIES, and orthogonal projection (OPCM; Tang et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..algebra.delta import Delta, Dense, dense
from ..algebra.layout import is_matrix, is_stack, stacked, unstacked
from ..algebra.sums import total
from .sparse import TIES_DENSITY, Density, ties

# Of the authors' published configuration: what TIES gives of the merged vector and the new one is added at this scale.
TIES_SCALING = 0.5
OPCM_SHARE = 0.5
Scaling = Annotated[float, Field(description="factor on what TIES gives")]
Share = Annotated[float, Field(ge=0, lt=1, description="share of the sum of the singular values to protect")]


def continual_ties(
    merged: Delta,
    new: Delta,
    *,
    density: Density = TIES_DENSITY,
    scaling: Scaling = TIES_SCALING,
    limits: Sequence[float] | None = None,
) -> Delta:
    """merged + scaling * TIES(merged, new), signs elected by sum, no mean: as OPCM's authors compare with."""
    return total(
        [merged, ties([merged, new], [1.0, 1.0], density=density, consensus="sum", limits=limits)], [1, scaling]
    )


def orthogonal_sum(merged: Delta, new: Delta, *, share: Share = OPCM_SHARE) -> Delta:
    """merged + P(new), P leaving out what the merged change's singular directions already do (OPCM, equation 5).

    Of new in the singular bases of merged, U^T new V, the diagonal and the block of the leading components, which hold
    ``share`` of the sum of singular values, are set to zero. Only matrices have such directions; other shapes add up.
    U and V are thin: what lies outside them is left as it is, so that no n x n matrix is made.
    """
    if len(merged.shape) != 2:
        return total([merged, new])
    kept = dense(merged, torch.float32)
    cleaned = dense(new, torch.float32).reshape(kept.shape)
    left, values, right = torch.linalg.svd(kept, full_matrices=False)
    if values.sum() > 0:
        core = left.T @ cleaned @ right.T
        cleaned = cleaned - left @ torch.where(_occupied(values, share), core, torch.zeros_like(core)) @ right
    return Dense(kept + cleaned)


def weight_sum(name: str, shape: Sequence[int], merged: Delta, new: Delta, *, share: float = OPCM_SHARE) -> Delta:
    """``orthogonal_sum`` of the weight ``name``: experts in one tensor [E, n, m] one by one."""
    if is_stack(name, shape):
        return stacked([orthogonal_sum(*pair, share=share) for pair in unstacked([merged, new], shape)])
    return orthogonal_sum(merged, new, share=share) if is_matrix(name, shape) else total([merged, new])


def _occupied(values: Tensor, share: float) -> Tensor:
    """[p, p] the diagonal, and the block of the components before the one with which ``share`` of the sum is passed."""
    leading = int((values.cumsum(0) / values.sum() <= share).sum())
    occupied = torch.eye(len(values), dtype=torch.bool)
    occupied[:leading, :leading] = True
    return occupied
