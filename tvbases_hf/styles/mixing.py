"""Style LoRAs side by side in one, each reduced to what is unique to it (DeVec, section 4.2); in factor space.

A style's part of a weight B A keeps one of its factors: with column spaces the edited left factor is (I - Z Z^T) B, Z
the directions that the styles share. The mix is the parts' factors put together, so that every style keeps a scale; or
what a merging method makes of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from .. import defaults
from ..algebra.delta import Delta, LowRank, dense
from ..algebra.linalg import negligible
from ..algebra.sums import side_by_side
from ..errors import CheckpointError, ParameterError
from ..methods.devec import MIN_SIDE, Decomposition, Options, WholeSpaceError, decompose
from .diffusers_files import open_lora
from .lora_layers import BIAS_SUFFIX
from .lora_source import Source, name_styles
from .method import StyleMethod
from .places import Lora, Place, check_one_family, find_places

KINDS = get_args(defaults.StyleComponent)


@dataclass(frozen=True)
class Recipe:
    """Which component of each style goes into the mix, and how it is found.

    ``shared_weight`` adds that much of *one* shared change (equation 14, the norm-weighted mean) to the unique ones.
    ``method`` merges the components; None adds them up, each times its style's scale.
    Raises ParameterError on values that mean nothing.
    """

    component: str = "unique"
    options: Options = field(default_factory=Options)
    shared_weight: float = 0.0
    method: StyleMethod | None = None

    def __post_init__(self) -> None:
        if self.component not in KINDS:
            raise ParameterError(f"unknown component {self.component!r}; choose one of {', '.join(KINDS)}")
        if self.options.pool == "pairs":
            raise ParameterError('pool "pairs" leaves every style whole; choose joint or iterative')
        if not math.isfinite(self.shared_weight):
            raise ParameterError(f"shared_weight {self.shared_weight} is not a finite number")
        if self.shared_weight and self.component != "unique":
            raise ParameterError(f"shared_weight goes with the unique component, not with {self.component!r}")

    def rank(self, place: Place, scales: Mapping[str, float] | None = None) -> int:
        """Of the mix of one weight; with ``scales`` without the styles of scale 0."""
        ranks = [rank for name, rank in place.ranks.items() if scales is None or scales[name] != 0]
        return sum(ranks) if self.method is None else self.method.rank(place.shape, ranks)


def recipe_of(
    component: str | None,
    options: Options,
    shared_weight: float | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The component None is that of the way: unique to be added up, the whole style (full) to be merged by a method.

    The shared weight None is 1 for unique components that are added up, 0 for all else: with one copy of what styles
    share more pictures of a small Flux show both styles than with none.

    Raises ParameterError as Recipe and METHODS do, and for options of no method.
    """
    if method is None and method_options:
        raise ParameterError(f"{', '.join(method_options)}: an option of a merging method; name the method too")
    chosen = None if method is None else StyleMethod.of(method, method_options)
    what = component or ("unique" if chosen is None else "full")
    once = 1.0 if what == "unique" and chosen is None else 0.0
    return Recipe(what, options, once if shared_weight is None else shared_weight, chosen)


@dataclass(frozen=True)
class Part:
    """What each style puts into one weight; squared norms of its shared change, its whole change, and what it puts."""

    place: Place
    changes: Mapping[str, LowRank]
    biases: Mapping[str, Tensor]
    shared: Mapping[str, float]
    whole: Mapping[str, float]
    kept: Mapping[str, float]
    fills: bool = False
    """A style spans all directions of this weight, which was therefore left as it is."""
    method: StyleMethod | None = None


class Styles:
    """LoRAs of one model under names, checked against each other; nothing is read before it is mixed."""

    def __init__(self, loras: Mapping[str, Lora]) -> None:
        """Raises ParameterError for fewer than two, CheckpointError for DoRA, MismatchError for different models."""
        if len(loras) < 2:
            raise ParameterError(f"{len(loras)} style given; mixing takes two or more")
        self.loras = dict(loras)
        for lora in self.loras.values():
            _refuse_dora(lora)
        self.places = tuple(find_places(self.loras))

    @classmethod
    def open(cls, sources: Mapping[str, Source] | Sequence[Source]) -> Styles:
        """From files, directories, Hub ids or state dicts, in any of diffusers' formats; see name_styles.

        Raises MismatchError also for styles of which no one model has all modules.
        """
        sources = name_styles(sources)
        names = {name: source if isinstance(source, (str,)) else name for name, source in sources.items()}
        opened = cls({name: open_lora(source, label=str(names[name])) for name, source in sources.items()})
        check_one_family(opened.loras)
        return opened

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.loras)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.component for place in self.places))

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all factors."""
        found = [layers.dtype for lora in self.loras.values() for layers in lora.values()]
        result = found[0]
        for dtype in found[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def changes(self, place: Place) -> dict[str, LowRank]:
        """The whole change of each style that has this weight."""
        found: dict[str, LowRank] = {}
        for name in place.ranks:
            low = self.loras[name][place.component][place.module].low
            assert low is not None  # DoRA is refused
            found[name] = low
        return found

    def biases(self, place: Place) -> dict[str, Tensor]:
        name = f"{place.module}{BIAS_SUFFIX}"
        layers = {style: self.loras[style][place.component] for style in place.ranks}
        return {style: dense(own[name], torch.float32) for style, own in layers.items() if name in own}


def split(styles: Styles, recipe: Recipe) -> Iterator[Part]:
    """Every weight's parts, one weight in memory at a time. Sharing is among the styles that change the weight.

    A style whose rank fills all directions of a weight (a last layer of 64 rows and rank 64) has no subspace to share;
    the styles then go into that weight whole, and the part says so.
    """
    method = recipe.method
    if method is not None:
        plain = replace(recipe, method=None)
        method = method.of_styles(styles.names, lambda: (part.changes for part in split(styles, plain)))
    _check_angles(styles, recipe.options)
    for place in styles.places:
        changes = styles.changes(place)
        norms = {name: _Norms(change, recipe.options.side) for name, change in changes.items()}
        whole = {name: norms[name].square(change) for name, change in changes.items()}
        live = {name: change for name, change in changes.items() if whole[name] > 0}
        found, fills = _decompose(live, recipe.options)
        unique = {name: _unique(change, found, i) for i, (name, change) in enumerate(live.items())}
        shared = {name: _minus(changes[name], part, recipe.options.side) for name, part in unique.items()}
        squares = {name: norms[name].square(part) for name, part in shared.items()}
        parts = _wanted(changes, unique, shared, squares, recipe)
        kept = {name: norms[name].square(part) for name, part in parts.items()}
        for name, part in parts.items():  # of identical styles the rounding of a subtraction is left
            if kept[name] <= negligible(place.shape, torch.float32) ** 2 * part.rank * whole[name]:
                parts[name], kept[name] = _zeroed(part), 0.0
        zeros = dict.fromkeys(changes, 0.0)
        yield Part(place, parts, styles.biases(place), zeros | squares, whole, kept, fills, method)


def combine(part: Part, scales: Mapping[str, float], *, keep_zeros: bool = False) -> LowRank:
    """The mix of the styles' parts of one weight; in a sum, factors side by side, scale 0 is left out, or kept."""
    if part.method is not None:
        return part.method.mixed(part.place.name, part.changes, scales)
    terms = [(part.changes[name], scales[name]) for name in part.changes if keep_zeros or scales[name] != 0]
    return side_by_side(terms) if terms else LowRank.zeros(part.place.shape)


def bias(part: Part, scales: Mapping[str, float]) -> Tensor:
    """The mix of the styles' LoRA biases of one weight; they have no columns and are never shared."""
    if part.method is not None and part.biases:
        return part.method.mixed_bias(f"{part.place.name}.bias", part.biases, scales)
    return sum((scales[name] * own for name, own in part.biases.items()), torch.zeros(part.place.shape[0]))


def _decompose(changes: Mapping[str, LowRank], options: Options) -> tuple[Decomposition | None, bool]:
    """None where nothing can be shared; whether that is because a style spans everything."""
    if len(changes) < 2:
        return None, False
    deltas: list[Delta] = list(changes.values())
    try:
        return decompose(deltas, options), False
    except WholeSpaceError:
        return None, min(deltas[0].shape) >= MIN_SIDE


def _unique(change: LowRank, found: Decomposition | None, index: int) -> LowRank:
    unique = change if found is None else found.unique[index].low
    assert unique is not None  # of a low-rank change
    return unique


def _minus(change: LowRank, unique: LowRank, side: str) -> LowRank:
    """change - unique, which have one factor in common, at the rank of the change."""
    if side == "row":
        return LowRank(change.left, change.right - unique.right)
    return LowRank(change.left - unique.left, change.right)


def _wanted(
    changes: Mapping[str, LowRank],
    unique: Mapping[str, LowRank],
    shared: Mapping[str, LowRank],
    squares: Mapping[str, float],
    recipe: Recipe,
) -> dict[str, LowRank]:
    if recipe.component == "full":
        return dict(changes)
    if recipe.component == "shared":
        return {name: shared.get(name, _zeroed(change)) for name, change in changes.items()}
    total = sum(math.sqrt(square) for square in squares.values())
    found = {}
    for name, change in changes.items():
        part = unique.get(name, change)
        weight = recipe.shared_weight * math.sqrt(squares.get(name, 0.0)) / total if total else 0.0
        found[name] = _plus(part, shared[name], weight, recipe.options.side) if weight else part
    return found


def _plus(unique: LowRank, shared: LowRank, weight: float, side: str) -> LowRank:
    if side == "row":
        return LowRank(unique.left, unique.right + weight * shared.right)
    return LowRank(unique.left + weight * shared.left, unique.right)


class _Norms:
    """Squared norms of a change and of its parts, which have one factor in common: its Gram matrix is formed once."""

    def __init__(self, change: LowRank, side: str) -> None:
        self.side = side
        common = (change.left.T if side == "row" else change.right).to(torch.float64)
        self.gram = common @ common.T

    def square(self, part: LowRank) -> float:
        own = (part.right if self.side == "row" else part.left.T).to(torch.float64)
        return float((self.gram * (own @ own.T)).sum().clamp_min(0))


def _zeroed(change: LowRank) -> LowRank:
    return replace(change, left=torch.zeros_like(change.left))


def _check_angles(styles: Styles, options: Options) -> None:
    if options.subspace == "angles" and options.pool == "joint" and len(styles.names) != 2:
        raise ParameterError(f"subspace: angles is defined for two styles, not {len(styles.names)}; use chain or mean")


def _refuse_dora(lora: Lora) -> None:
    for layers in lora.values():
        dora = [module for module in layers.modules if layers.is_dora(module)]
        if dora:
            raise CheckpointError(
                f"{layers.label}: {len(dora)} of {len(layers.modules)} modules are DoRA (first: {dora[0]}), which "
                "rescales the base's rows and has no column space of its own; mix plain LoRAs"
            )
