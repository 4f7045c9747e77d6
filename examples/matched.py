"""Ways to forget compared where they have forgotten equally much: equal alphas mean different things for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Rises:
    """Rises of the loss over alpha: ``rises`` [alphas, tasks, windows]; task 0 is the unwanted one, the first is 0."""

    alphas: tuple[float, ...]
    rises: Tensor

    def alpha_at(self, level: float, windows: Tensor | None = None) -> float | None:
        """The least alpha, interpolated, at which the unwanted task's mean loss has risen by ``level``; None: never."""
        return _crossing(self.alphas, self._means(windows)[:, 0].tolist(), level)

    def harm_at(self, level: float, windows: Tensor | None = None) -> float | None:
        """The mean rise of the other tasks at that alpha, interpolated."""
        means = self._means(windows)
        alpha = _crossing(self.alphas, means[:, 0].tolist(), level)
        return None if alpha is None else _interpolated(self.alphas, means[:, 1:].mean(dim=1).tolist(), alpha)

    def _means(self, windows: Tensor | None) -> Tensor:
        return (self.rises if windows is None else self.rises[:, :, windows]).mean(dim=2)

    def to_json(self, tasks: Sequence[str]) -> dict[str, Any]:
        means = self._means(None)
        return {"alphas": list(self.alphas), **{task: means[:, i].tolist() for i, task in enumerate(tasks)}}


def compare(
    runs: Sequence[Mapping[str, Rises]], levels: Sequence[float], *, reference: str, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for every level and way: alpha, harm, and harm relative to ``reference``, with 95 % intervals.

    The intervals resample runs (seeds of the fine-tuning) and windows of test text together, and are paired: each
    resample compares all ways on the same runs and windows. With one run they cover the windows only.
    A way that does not reach a level in some run has no row for it.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = runs[0][reference].rises.shape[2]
    draws = [
        (
            torch.randint(len(runs), (len(runs),), generator=generator).tolist(),
            torch.randint(windows, (windows,), generator=generator),
        )
        for _ in range(RESAMPLES)
    ]
    rows = []
    for level in levels:
        drawn = {name: [_harm(runs, name, level, *draw) for draw in draws] for name in runs[0]}
        for name in runs[0]:
            harm = _harm(runs, name, level, range(len(runs)), None)
            alphas = [alpha for run in runs if (alpha := run[name].alpha_at(level)) is not None]
            if harm is None:
                continue
            row = {"level": level, "name": name, "alpha": sum(alphas) / len(alphas), "rise": harm}
            row["interval"] = interval([value for value in drawn[name] if value is not None])
            plain = _harm(runs, reference, level, range(len(runs)), None)
            pairs = zip(drawn[name], drawn[reference], strict=True)
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            known = name != reference and plain is not None
            row["difference"] = harm - plain if known and plain is not None else None
            row["difference_interval"] = interval(differences) if known else None
            rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The central 95 % of resampled values."""
    if not values:
        return (float("nan"), float("nan"))
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    )
    return (float(quantiles[0]), float(quantiles[1]))


def _harm(
    runs: Sequence[Mapping[str, Rises]], name: str, level: float, chosen: Sequence[int], windows: Tensor | None
) -> float | None:
    found = [runs[index][name].harm_at(level, windows) for index in chosen]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def _crossing(alphas: Sequence[float], values: Sequence[float], level: float) -> float | None:
    for index in range(1, len(values)):
        if values[index] >= level:
            low, high = values[index - 1], values[index]
            share = (level - low) / (high - low)
            return alphas[index - 1] + share * (alphas[index] - alphas[index - 1])
    return None


def _interpolated(alphas: Sequence[float], values: Sequence[float], alpha: float) -> float:
    for index in range(1, len(alphas)):
        if alpha <= alphas[index]:
            share = (alpha - alphas[index - 1]) / (alphas[index] - alphas[index - 1])
            return values[index - 1] + share * (values[index] - values[index - 1])
    return values[-1]
