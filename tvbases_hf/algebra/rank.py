"""How many singular components to keep: the rank rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from ..errors import ParameterError
from .linalg import negligible

KINDS = ("absolute", "fraction", "energy", "gavish-donoho")


@dataclass(frozen=True)
class RankRule:
    """``absolute``: that many; ``fraction``: of min(n, m); ``energy``: the fewest with this share of the squared norm;
    ``gavish-donoho``: those above the optimal hard threshold for unknown noise (Gavish and Donoho, 2014)."""

    kind: str
    value: float = 0.0

    @classmethod
    def parse(cls, text: str | float | RankRule) -> RankRule:
        """From 16, 0.25, "16", "fraction:0.25", "energy:0.95" or "gavish-donoho"; ParameterError otherwise."""
        if isinstance(text, RankRule):
            return text
        name, _, number = str(text).partition(":")
        name = name.strip().lower()
        try:
            if name == "gavish-donoho" and not number:
                return cls(name)
            if not number:
                value = float(name)
                return cls("fraction", value)._checked(text) if 0 < value < 1 else cls("absolute", value)._checked(text)
            return cls(name, float(number))._checked(text)
        except ValueError as error:
            raise ParameterError(_complaint(text)) from error

    def _checked(self, text: object) -> RankRule:
        valid = {
            "absolute": self.value >= 1 and self.value == int(self.value) if math.isfinite(self.value) else False,
            "fraction": 0 < self.value <= 1,
            "energy": 0 < self.value <= 1,
        }
        if not valid.get(self.kind, False):
            raise ParameterError(_complaint(text))
        return self

    def __str__(self) -> str:
        if self.kind == "gavish-donoho":
            return self.kind
        return f"{self.value:.0f}" if self.kind == "absolute" else f"{self.kind}:{self.value:g}"

    @property
    def needs_spectrum(self) -> bool:
        """Whether the rank depends on all singular values, not only on the shape."""
        return self.kind in ("energy", "gavish-donoho")

    def of_shape(self, rows: int, columns: int) -> int:
        """The rank for a matrix of this shape, 1 to min(rows, columns); not for rules that need the spectrum."""
        small = min(rows, columns)
        # The nearest float to 1/49, times 98, is just below 2.
        wanted = int(self.value * small * (1 + 1e-12)) if self.kind == "fraction" else int(self.value)
        return max(1, min(small, wanted))

    def of_spectrum(self, values: Tensor, rows: int, columns: int) -> int:
        """The rank for these singular values (descending; the smallest side's others are zero); 0 for a zero matrix."""
        nonzero = int((values > negligible((rows, columns)) * values[:1].clamp_min(0)).sum())
        if nonzero == 0:
            return 0
        if self.kind == "energy":
            energy = values.double().square().cumsum(0)
            wanted = 1 + int((energy < self.value * energy[-1] * (1 - 1e-12)).sum())
        elif self.kind == "gavish-donoho":
            everything = torch.zeros(min(rows, columns), dtype=torch.float64, device=values.device)
            everything[: len(values)] = values
            wanted = int((everything > _gavish_donoho(rows, columns) * everything.quantile(0.5)).sum())
        else:
            wanted = self.of_shape(rows, columns)
        return max(1, min(wanted, nonzero))


def within_budget(spectra: Sequence[Tensor], costs: Sequence[float], budget: float) -> list[int]:
    """How many of the leading values of every spectrum to keep: most square per cost first, as far as ``budget`` goes.

    Args:
        spectra: singular values, descending; ``costs`` of one component of each.
    """
    if not spectra:
        return []
    gains = [values.square() / cost for values, cost in zip(spectra, costs, strict=True)]
    prices = [torch.full_like(values, cost) for values, cost in zip(spectra, costs, strict=True)]
    owners = torch.cat([torch.full((len(values),), index) for index, values in enumerate(spectra)])
    order = torch.cat(gains).argsort(descending=True, stable=True)
    kept = int((torch.cat(prices)[order].cumsum(0) <= budget).sum())
    return torch.bincount(owners[order[:kept]], minlength=len(spectra)).tolist()


def _is_rule(value: str | float) -> str | float:
    RankRule.parse(value)
    return value


# How an option that is a rank rule is declared.
Rank = Annotated[float | str, AfterValidator(_is_rule)]


def _complaint(text: object) -> str:
    return (
        f"rank {text!r} is not a rank rule; give a whole number (16), a fraction of min(n, m) (0.25 or fraction:0.25), "
        "energy:0.95, or gavish-donoho"
    )


def _gavish_donoho(rows: int, columns: int) -> float:
    """The threshold in units of the median singular value, by the published cubic fit in the aspect ratio."""
    beta = min(rows, columns) / max(rows, columns)
    return 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
