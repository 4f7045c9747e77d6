"""The paper's Figure 5: target and control over alpha, and one against the other; and the curves of a tuning."""

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

# Okabe and Ito's palette, distinct also for colour-blind readers; every line has a mark of its own besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"


def plot_negations(curves: Mapping[str, Mapping[str, Any]], forgotten: str, file: Path) -> None:
    """What draw_negations draws, as a file."""
    write_picture(file, draw_negations(curves, forgotten))


def draw_negations(curves: Mapping[str, Mapping[str, Any]], forgotten: str) -> bytes:
    """One PNG of a report's ``curves``; a line for every component, a star where the control rule stops it."""
    found = {name: Negation.from_json(curve) for name, curve in curves.items()}
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    for place, (component, negation) in enumerate(found.items()):
        alphas = negation.curve.alphas
        target = [negation.target_at(alpha) for alpha in alphas]
        kept = [negation.control_at(alpha) / negation.control_at(0.0) for alpha in alphas]
        how = {"color": COLOURS[place % 7], "marker": MARKS[place % 7], "markersize": 5}
        axes[0].plot(alphas, target, label=component, **how)
        axes[1].plot(alphas, kept, **how)
        axes[2].plot(kept, target, **how)
        star = {**how, "marker": "*", "markersize": 17, "markeredgecolor": "k", "linestyle": "none"}
        chosen = {"label": "strength that the rule chooses"} if place == len(found) - 1 else {}
        axes[0].plot(negation.alpha, negation.target_at(negation.alpha), **star, **chosen)
        axes[1].plot(negation.alpha, negation.kept, **star)
        axes[2].plot(negation.kept, negation.target_at(negation.alpha), **star)
    keep = next(iter(found.values())).keep
    axes[1].axhline(keep, color="0.4", linestyle="--", label=f"least to keep: {keep:.0%}")
    axes[2].axvline(keep, color="0.4", linestyle="--")
    left = f"metric of {in_picture(forgotten)} (lower: forgotten)"
    axes[0].set(xlabel="alpha", ylabel=left, title="What is forgotten")
    axes[1].set(xlabel="alpha", ylabel="share of the control metric that is kept", title="What it costs")
    axes[2].set(xlabel="share of the control metric that is kept", ylabel=left, title="One against the other")
    axes[2].invert_xaxis()
    figure.legend(loc="outside lower center", ncols=len(found) + 2)
    return _drawn(plt, figure)


def plot_tuning(tuning: Mapping[str, Any], file: Path) -> None:
    """What draw_tuning draws, as a file."""
    write_picture(file, draw_tuning(tuning))


def draw_tuning(tuning: Mapping[str, Any]) -> bytes:
    """One PNG of a report's ``tuning``: every metric as a share of the base's, dashed where it is a control."""
    found, plt = Tuning.from_json(tuning), _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, (task, values) in enumerate(found.curve.metrics.items()):
        shares = [value / values[0] if values[0] else float("nan") for value in values]
        control = task in found.controls
        how = {"color": COLOURS[place % 7], "marker": MARKS[place % 7], "linestyle": "--" if control else "-"}
        kind = "control" if control else "target"
        axes.plot(found.curve.alphas, shares, label=f"{in_picture(task)} ({kind})", markersize=5, **how)
    axes.axhline(1, color="0.4", linewidth=1, label="the base")
    if found.controls:
        axes.axhline(found.keep, color="0.4", linestyle=":", linewidth=1, label=f"least of a control: {found.keep:.0%}")
    if found.helps:
        axes.axvline(found.alpha, color="0.4", linestyle="-.", linewidth=1, label=f"chosen: alpha {found.alpha:g}")
    axes.set(xlabel="alpha", ylabel="share of the base's metric", title="How much of the merge to add")
    figure.legend(loc="outside right upper")
    return _drawn(plt, figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError('--plot needs matplotlib; pip install "tvbases-hf[plot]"') from error
    return plt


def _drawn(plt: Any, figure: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    plt.close(figure)
    return drawn.getvalue()
