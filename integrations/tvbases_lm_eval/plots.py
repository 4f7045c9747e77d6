"""The paper's Figure 5: target and control over alpha, and one against the other."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvbases_hf.errors import MissingExtraError
from tvbases_hf.learning.negation import Negation
from tvbases_hf.learning.tuning import Tuning
from tvbases_hf.storage.reports import write_picture
from tvbases_hf.text import in_picture


def plot_negations(curves: Mapping[str, Mapping[str, Any]], forgotten: str, file: Path) -> None:
    """One PNG of a report's ``curves``; a line for every component, a star where the control rule stops it."""
    found = {name: Negation.from_json(curve) for name, curve in curves.items()}
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for component, negation in found.items():
        alphas = negation.curve.alphas
        target = [negation.target_at(alpha) for alpha in alphas]
        kept = [negation.control_at(alpha) / negation.control_at(0.0) for alpha in alphas]
        (line,) = axes[0].plot(alphas, target, "o-", label=component)
        axes[1].plot(alphas, kept, "o-", color=line.get_color())
        axes[2].plot(kept, target, "o-", color=line.get_color())
        axes[0].plot(negation.alpha, negation.target_at(negation.alpha), "*", color=line.get_color(), markersize=16)
        axes[2].plot(negation.kept, negation.target_at(negation.alpha), "*", color=line.get_color(), markersize=16)
    keep = next(iter(found.values())).keep
    axes[1].axhline(keep, color="0.6", linestyle="--")
    axes[2].axvline(keep, color="0.6", linestyle="--")
    axes[0].set(xlabel="alpha", ylabel=f"target: what is left of {in_picture(forgotten)}")
    axes[1].set(xlabel="alpha", ylabel="share of the control that is kept")
    axes[2].set(xlabel="share of the control that is kept", ylabel="target")
    axes[2].invert_xaxis()
    axes[0].legend()
    _write(plt, figure, file)


def plot_tuning(tuning: Mapping[str, Any], file: Path) -> None:
    """One PNG of a report's ``tuning``: every metric as a share of the base's, dashed where it is a control."""
    found, plt = Tuning.from_json(tuning), _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for task, values in found.curve.metrics.items():
        shares = [value / values[0] if values[0] else float("nan") for value in values]
        style = "s--" if task in found.controls else "o-"
        axes.plot(found.curve.alphas, shares, style, label=in_picture(task))
    axes.axhline(1, color="0.6", linewidth=1)
    axes.axhline(found.keep, color="0.6", linestyle=":", linewidth=1)
    if found.helps:
        axes.axvline(found.alpha, color="0.6", linewidth=1)
    axes.set(xlabel="alpha", ylabel="share of the base's metric")
    axes.legend()
    _write(plt, figure, file)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError('--plot needs matplotlib; pip install "tvbases-hf[plot]"') from error
    return plt


def _write(plt: Any, figure: Any, file: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    plt.close(figure)
    write_picture(file, drawn.getvalue())
