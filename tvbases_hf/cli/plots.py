"""Pictures of inspections; matplotlib is asked for only here."""

from __future__ import annotations

import io
from typing import Any

from ..errors import MissingExtraError
from ..text import in_picture
from .interference import draw_interference, draw_overlaps, in_cluster_order


def picture_of(found: dict[str, Any]) -> bytes:
    """Similarities, energy left by M bases, interference by layer, decay and overlap of singular spaces, as one PNG.

    Raises MissingExtraError without matplotlib.
    """
    figure, axes = _figure(3, 2, (12, 13))
    _similarity(axes[0, 0], in_cluster_order(found))
    _losses(axes[0, 1], found)
    draw_interference(axes[1, 0], found["layers"])
    _decay(axes[1, 1], found["layers"])
    draw_overlaps(axes[2], found)
    return _drawn(figure)


def library_picture(found: dict[str, Any]) -> bytes:
    """What a byte buys in a library, and where it is. Raises MissingExtraError without matplotlib."""
    figure, axis = _figure(1, 1, (8, 5))
    whole, curve = found["bytes_of_task_vectors"], [row for row in found["curve"] if row["error"] > 0]
    axis.plot([row["bytes"] / whole for row in curve], [row["error"] for row in curve], "o-", label="as planned")
    axis.plot([found["share"]], [found["mean_square_error"] ** 0.5], "D", color="tab:red", label="as stored")
    axis.set(xlabel="share of the adapters' bytes", ylabel="relative error (root mean square)", yscale="log")
    axis.set_title(f"{len(found['tasks'])} adapters in {found['clusters']} clusters")
    axis.legend()
    return _drawn(figure)


def _figure(rows: int, columns: int, size: tuple[int, int]) -> tuple[Any, Any]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError('a picture needs matplotlib; pip install "tvbases-hf[plot]"') from error
    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def _drawn(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    plt.close(figure)
    return drawn.getvalue()


def _similarity(axis: Any, found: dict[str, Any]) -> None:
    tasks, cosine = [in_picture(task) for task in found["tasks"]], found["cosine"]
    image = axis.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axis.set_yticks(range(len(tasks)), tasks)
    if len(tasks) <= 12:
        for row, values in enumerate(cosine):
            for column, value in enumerate(values):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if abs(value) > 0.6 else "k")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set_title("Cosine similarity of the task vectors")


def _losses(axis: Any, found: dict[str, Any]) -> None:
    unexplained = found["unexplained"]
    bases = range(1, len(found["tasks"]) + 1)
    axis.plot(bases, unexplained["any_vectors"], "o--", label="any M vectors (spectral bound)")
    axis.plot(bases, unexplained["balanced_bases"], "s-", label="M balanced bases")
    axis.axvline(found["suggested_num_bases"], color="0.7", zorder=0)
    axis.set(xlabel="bases M", ylabel="energy left unexplained", ylim=(0, 1), title="How many bases")
    axis.set_xticks(list(bases))
    axis.legend()


def _decay(axis: Any, layers: dict[str, Any]) -> None:
    for task, curve in layers["decay"].items():
        axis.plot([(step + 1) / len(curve) for step in range(len(curve))], curve, label=in_picture(task))
    axis.set(xlabel="share of singular components kept", ylabel="share of energy", ylim=(0, 1.02))
    axis.set_title("Decay of the singular values (mean over matrices)")
    axis.legend(fontsize="small")
