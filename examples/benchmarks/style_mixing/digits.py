"""scikit-learn's handwritten digits as signed distances, so that every style can be drawn on them too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS, MARGIN = 8, 2  # a side of a digit, whose strokes reach its edge, and what is put around it
FINE = 8  # pixels of a cell's side
INK = 0.5  # how dark the inside of a stroke is, at least
HANDS = 6
"""Of every digit, of some 180: with all of them the small Flux would have to be trained for longer than on shapes."""


@functools.cache
def _known() -> tuple[Tensor, Tensor]:
    """Signed distances [1797, 96, 96] in half widths of a digit, negative inside, and labels."""
    from scipy.ndimage import distance_transform_edt
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.pad(images, (MARGIN, MARGIN, MARGIN, MARGIN))
    inside = F.interpolate(images, scale_factor=FINE, mode="bicubic", align_corners=False)[:, 0] > INK
    to_edge: Any = distance_transform_edt
    distances = [to_edge(~one) - to_edge(one) for one in inside.numpy()]
    labels = torch.tensor(found.target)
    return torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in distances]) * (2 / CELLS / FINE), labels


def digit_distances(
    digit: int, shift: Tensor, size: Tensor, angle: Tensor, side: int, generator: torch.Generator
) -> Tensor:
    """[k, side, side] of one digit in k hands: shifts [k, 2] and sizes [k] in half widths, angles [k] in radians."""
    known, labels = _known()
    written = known[(labels == digit).nonzero()[:HANDS, 0]]
    chosen = written[torch.randint(len(written), (len(shift),), generator=generator)][:, None]
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    turn = turn / (size * (CELLS + 2 * MARGIN) / CELLS)[:, None, None]
    where = torch.cat([turn, -(turn @ shift[..., None])], dim=2)
    grid = F.affine_grid(where, [len(shift), 1, side, side], align_corners=False)
    found = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)[:, 0]
    return found * size[:, None, None]
