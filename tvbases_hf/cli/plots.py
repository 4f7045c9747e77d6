"""Pictures of inspections; matplotlib is asked for only here."""

from __future__ import annotations

import io
from typing import Any

from ..errors import MissingExtraError
from .interference import COLOURS, draw_interference, draw_overlaps, in_cluster_order, named

CAPTION = (
    "Above: how much alike the task vectors are, and how much energy (squared norm) is lost with few bases. Then: "
    "where tasks interfere, and how fast the singular values of their changes fall. Last: whose spaces overlap."
)
# Lines of one colour differ in their marks.
MARKS = "osD^vPX"
# So many tasks have room for a number in every cell of a matrix.
NUMBERED = 10


def picture_of(found: dict[str, Any]) -> bytes:
    """Similarities, energy left by M bases, interference by layer, decay and overlap of singular spaces, as one PNG.

    Raises MissingExtraError without matplotlib.
    """
    figure, axes = _figure(3, 2, (13, 14.5))
    _similarity(axes[0, 0], in_cluster_order(found))
    _losses(axes[0, 1], found)
    draw_interference(axes[1, 0], found["layers"])
    _decay(axes[1, 1], found["layers"])
    draw_overlaps(axes[2], found)
    return _drawn(figure)


LIBRARY_CAPTION = (
    "What a byte buys: the relative error of the adapters (root mean square) against the share of their bytes, as "
    "planned when the library began, and what is stored"
)


def library_picture(found: dict[str, Any]) -> bytes:
    """What a byte buys in a library, and where it is. Raises MissingExtraError without matplotlib."""
    figure, axis = _figure(1, 1, (8, 5))
    whole, curve = found["bytes_of_task_vectors"], [row for row in found["curve"] if row["error"] > 0]
    planned = [row["bytes"] / whole for row in curve]
    axis.plot(planned, [row["error"] for row in curve], "o-", color=COLOURS[0], label="as planned")
    stored = {"color": COLOURS[1], "markersize": 10, "label": "as stored"}
    axis.plot([found["share"]], [found["mean_square_error"] ** 0.5], "D", **stored)
    axis.set(xlabel="share of the adapters' bytes", ylabel="relative error (root mean square)", yscale="log")
    axis.set_title(f"{len(found['tasks'])} adapters in {found['clusters']} clusters")
    axis.legend()
    return _drawn(figure)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
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
    """The scale is that of the pairs: the ones of the diagonal would leave all of them pale, and are grey."""
    tasks, cosine, count = named(found["tasks"]), found["cosine"], len(found["tasks"])
    limit = max([abs(cosine[i][j]) for i in range(count) for j in range(i)], default=1.0) or 1.0
    pairs = [[float("nan") if i == j else cosine[i][j] for j in range(count)] for i in range(count)]
    axis.set_facecolor("#e4e4e4")
    image = axis.imshow(pairs, vmin=-limit, vmax=limit, cmap="RdBu_r")
    axis.set_xticks(range(count), tasks, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(count), tasks)
    if count <= NUMBERED:
        for i, row in enumerate(cosine):
            for j, value in enumerate(row):
                colour = "w" if i != j and abs(value) > 0.6 * limit else "k"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    axis.figure.colorbar(image, ax=axis, shrink=0.8, label="cosine (the diagonal is 1)")
    axis.set_title("How much alike the task vectors are")


def _losses(axis: Any, found: dict[str, Any]) -> None:
    unexplained = found["unexplained"]
    bases = range(1, len(found["tasks"]) + 1)
    axis.plot(bases, unexplained["balanced_bases"], "-s", color=COLOURS[0], label="balanced bases")
    axis.plot(bases, unexplained["any_vectors"], "--o", color=COLOURS[1], label="no vectors can lose less")
    suggested = found["suggested_num_bases"]
    axis.axvline(suggested, color="0.5", linestyle=":", zorder=0, label=f"suggested: {suggested}")
    axis.set(xlabel="number of bases M", ylabel="share of the energy (squared norm) lost", ylim=(0, 1))
    axis.set_xticks(list(bases) if len(bases) <= 20 else list(bases)[:: len(bases) // 10])
    axis.set_title("How many bases")
    axis.legend()


def _decay(axis: Any, layers: dict[str, Any]) -> None:
    for place, (task, name) in enumerate(zip(layers["decay"], named(list(layers["decay"])), strict=True)):
        curve = layers["decay"][task]
        how = {"color": COLOURS[place % 7], "marker": MARKS[place // 7 % 7], "markevery": 4, "markersize": 5}
        axis.plot([(step + 1) / len(curve) for step in range(len(curve))], curve, label=name, **how)
    axis.set(xlabel="share of the singular components kept", ylabel="share of the energy kept", ylim=(0, 1.02))
    axis.set_title("How far the changes are of low rank (mean over matrices)")
    axis.legend(fontsize="small", ncols=1 + len(layers["decay"]) // 10)
