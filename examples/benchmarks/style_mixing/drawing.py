"""Pictures of ten shapes in five colours, and of the styles that change them: what is drawn is the truth to compare to.

A shape is a signed distance to its outline, negative inside, in half widths of the picture; pictures are anti-aliased.
Styles are changes of the shape, of the ink or of the colours that are done in one order, so any number of them can be
drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .digits import digit_distances

SIDE = 32
PIXEL = 2 / SIDE
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.10, 0.60, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "orange": (0.95, 0.55, 0.05),
    "purple": (0.55, 0.15, 0.65),
}
PAPER, NIGHT, FRAME = (0.97, 0.97, 0.97), (0.03, 0.03, 0.12), (0.10, 0.45, 0.50)
BROWN, CREAM = (0.25, 0.13, 0.05), (0.98, 0.90, 0.72)
STYLES = ("slanted", "outlined", "dotted", "watercolour", "neon", "sepia")
HOUSE = "framed"
EVERY_STYLE = (*STYLES, HOUSE)
PERSON = "cat"


def _arc(radius: float, start: float, stop: float, count: int, centre: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Points of an arc, angles in turns from the right, anticlockwise on the screen, [count, 2] as (x, y down)."""
    angle = 2 * math.pi * torch.linspace(start, stop, count)
    return torch.stack([centre[0] + radius * angle.cos(), centre[1] - radius * angle.sin()], 1)


def _star() -> Tensor:
    radius = torch.tensor([1.0, 0.42] * 5)[:, None]
    return radius * _arc(1.0, 0.25, 1.25, 11)[:-1]


def _heart() -> Tensor:
    t = 2 * math.pi * torch.arange(28) / 28
    y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([16 * t.sin().pow(3), -y - 2], 1) / 16


def _moon() -> Tensor:
    outer = _arc(1.0, 0.13, 0.87, 20)
    start, stop = math.atan2(0.729, 0.15) / (2 * math.pi), 1 - math.atan2(0.729, 0.15) / (2 * math.pi)
    return torch.cat([outer, _arc(0.745, stop, start, 14, (0.53, 0.0))])


def _points(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs)


def _mirrored(*pairs: tuple[float, float]) -> Tensor:
    """The right half of a shape from top to bottom, and its mirror image."""
    return _points(*pairs, *((-x, y) for x, y in reversed(pairs) if x))


# Outlines in a square of side 2; several loops of one shape: what is inside two of them is outside.
SHAPES: dict[str, list[Tensor]] = {
    "disc": [_arc(0.92, 0, 1, 29)[:-1]],
    "square": [_mirrored((0.82, -0.82), (0.82, 0.82))],
    "triangle": [_mirrored((0.0, -0.95), (1.0, 0.8))],
    "star": [_star()],
    "heart": [_heart()],
    "plus": [_mirrored((0.34, -0.95), (0.34, -0.34), (0.95, -0.34), (0.95, 0.34), (0.34, 0.34), (0.34, 0.95))],
    "moon": [_moon()],
    "arrow": [_mirrored((0.0, -1.0), (0.85, -0.1), (0.34, -0.1), (0.34, 0.95))],
    "hourglass": [_mirrored((0.8, -0.95), (0.14, 0.0), (0.8, 0.95))],
    "bolt": [_points((0.3, -1.0), (-0.75, 0.2), (-0.1, 0.2), (-0.35, 1.0), (0.75, -0.25), (0.1, -0.25))],
    PERSON: [
        _mirrored((0.0, -0.45), (0.35, -0.5), (0.8, -1.0), (0.92, 0.1), (0.6, 0.7), (0.0, 0.92)),
        _arc(0.19, 0, 1, 9, (0.4, 0.05))[:-1],
        _arc(0.19, 0, 1, 9, (-0.4, 0.05))[:-1],
    ],
}
CONTENTS = tuple(name for name in SHAPES if name != PERSON)


@dataclass(frozen=True)
class Scenes:
    """What is to be drawn: signed distances [k, 32, 32], and grain in -1 to 1 for watercolour; the prompts [k]."""

    distance: Tensor
    grain: Tensor
    content: Tensor
    colour: Tensor

    def __getitem__(self, chosen: Tensor) -> Scenes:
        return Scenes(self.distance[chosen], self.grain[chosen], self.content[chosen], self.colour[chosen])

    def __len__(self) -> int:
        return len(self.content)


def scenes(content: Tensor, colour: Tensor, seed: int, contents: str = "shapes") -> Scenes:
    """A scene of each prompt, with its own place, size and angle; ``content`` counts SHAPES, ``colour`` COLOURS.

    ``contents``: with ``digits`` handwritten ones take the place of the ten shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    distance = torch.empty(len(content), SIDE, SIDE)
    shifts = 0.05 * (2 * torch.rand(len(content), 2, generator=generator) - 1)
    sizes = 0.68 + 0.08 * torch.rand(len(content), generator=generator)
    angles = 0.06 * (2 * torch.rand(len(content), generator=generator) - 1)
    for number, name in enumerate(SHAPES):
        rows = (content == number).nonzero()[:, 0]
        for part in rows.split(256) if len(rows) else ():
            place = shifts[part], sizes[part], angles[part]
            if contents == "digits" and name != PERSON:
                distance[part] = digit_distances(number, *place, SIDE, generator)
            else:
                distance[part] = _distances(SHAPES[name], *place)
    coarse = 2 * torch.rand(len(content), 1, 7, 7, generator=generator) - 1
    grain = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True)[:, 0].clamp(-1, 1)
    return Scenes(distance, grain, content, colour)


def _distances(loops: list[Tensor], shift: Tensor, size: Tensor, angle: Tensor) -> Tensor:
    """Signed distances [k, 32, 32] of pixels to moved, scaled and turned polygons."""
    middle = (torch.arange(SIDE) + 0.5) * PIXEL - 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    points = torch.stack([x, y], -1).reshape(1, -1, 2) - shift[:, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    points = points @ turn / size[:, None, None]
    squares, crossings = torch.full(points.shape[:2], torch.inf), torch.zeros(points.shape[:2], dtype=torch.int64)
    for loop in loops:
        for start, stop in zip(loop, loop.roll(-1, 0), strict=True):
            edge, way = stop - start, points - start
            along = ((way @ edge) / edge.square().sum()).clamp(0, 1)
            squares = torch.minimum(squares, (way - along[..., None] * edge).square().sum(-1))
            if edge[1] != 0:
                crosses = (start[1] <= points[..., 1]) != (stop[1] <= points[..., 1])
                at = start[0] + way[..., 1] * edge[0] / edge[1]
                crossings += crosses & (points[..., 0] < at)
    sign = 1 - 2 * (crossings % 2)
    return (sign * squares.sqrt() * size[:, None]).reshape(-1, SIDE, SIDE)


def draw(found: Scenes, styles: Collection[str] = ()) -> Tensor:
    """[k, 3, 32, 32] pictures in 0 to 1, in these styles."""
    distance, soft = found.distance, 1.0
    if "slanted" in styles:
        shear = torch.tensor([[1.0, 0.45, 0.0], [0.0, 1.0, 0.0]]).expand(len(found), 2, 3)
        way = F.affine_grid(shear, [len(found), 1, SIDE, SIDE], align_corners=False)
        distance = F.grid_sample(distance[:, None], way, padding_mode="border", align_corners=False)[:, 0]
    if "watercolour" in styles:
        distance, soft = distance + 0.1 * found.grain, 3.0
    body = (0.5 - distance / PIXEL / soft).clamp(0, 1)
    if "outlined" in styles:
        body = (0.5 + (0.085 - (distance + 0.06).abs()) / PIXEL / soft).clamp(0, 1)
    if "dotted" in styles:
        body = body * (0.05 + 0.95 * _dots())
    if "watercolour" in styles:
        body = body * (0.62 + 0.38 * found.grain)
    ink, paper = _colours(torch.tensor(list(COLOURS.values())))[found.colour], _colours(torch.tensor(PAPER))
    if "neon" in styles:
        paper, ink = _colours(torch.tensor(NIGHT)), 0.25 + 0.95 * ink
        glow = 0.45 * torch.exp(-distance.clamp_min(0) / 0.16)[:, None]
        paper = paper + glow * ink
    picture = paper + body[:, None] * (ink - paper)
    if HOUSE in styles:
        edge = _edge()
        picture = picture + edge * (_colours(torch.tensor(FRAME)) - picture)
    if "sepia" in styles:
        light = (picture * _colours(torch.tensor([0.3, 0.5, 0.2]))).sum(1, keepdim=True)
        brown, cream = _colours(torch.tensor(BROWN)), _colours(torch.tensor(CREAM))
        picture = brown + light * (cream - brown)
    return picture.clamp(0, 1)


def _colours(values: Tensor) -> Tensor:
    return values[..., None, None]


def _dots(period: int = 4, radius: float = 1.45) -> Tensor:
    middle = (torch.arange(SIDE) % period) + 0.5 - period / 2
    return (0.5 + radius - (middle[:, None].square() + middle.square()).sqrt()).clamp(0, 1)


def _edge() -> Tensor:
    edge = torch.ones(SIDE, SIDE)
    edge[2:-2, 2:-2] = 0
    return edge
