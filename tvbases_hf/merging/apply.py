"""The merging methods that need no data, by name: each takes the K changes of one weight and gives one change.

None of them knows whether the changes are task vectors, bases or reconstructions; ``merged`` applies one to ``Vectors``
of any kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..algebra.delta import Delta, Dense, reshaped
from ..algebra.sums import scale
from ..errors import ParameterError, did_you_mean
from ..methods.elementwise import magmax
from ..methods.sparse import ties, top_k
from ..methods.sums import task_arithmetic
from ..methods.threshold import check_scope, thresholds
from ..methods.tsv import tsv_merge
from ..storage.run import track

if TYPE_CHECKING:
    from ..models.vectors import Vectors


@dataclass(frozen=True)
class Method:
    """``combine(deltas, weights, **options)`` merges one weight.

    ``trims``: it keeps the largest entries, of one weight or (``scope``, the default) of the whole model.
    ``of_matrices``: it treats matrices otherwise than other shapes.
    """

    name: str
    summary: str
    combine: Callable[..., Delta]
    trims: bool = False
    of_matrices: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What may be set, and the defaults."""
        found = inspect.signature(self.combine).parameters.values()
        given = {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.name != "limits"}
        return given | ({"scope": "model"} if self.trims else {})


def mean(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """sum_i w_i delta_i / sum_i w_i (model soups); low-rank changes stay low-rank."""
    return task_arithmetic(deltas, weights, normalize=True)


def summed(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """sum_i w_i delta_i; low-rank changes stay low-rank."""
    return task_arithmetic(deltas, weights)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("mean", "the mean of the vectors", mean),
        Method("task_arithmetic", "their sum", summed),
        Method("top_k", "the mean of their largest entries", top_k, trims=True),
        Method("ties", "their largest entries where these agree in sign", ties, trims=True),
        Method("magmax", "every entry from the vector where it is largest", magmax),
        Method("tsv", "their leading singular components, decorrelated", tsv_merge, of_matrices=True),
    )
}


def find_method(name: str) -> Method:
    """ParameterError with the nearest known name."""
    if name not in METHODS:
        raise ParameterError(
            f"unknown merging method {name!r}{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}"
        )
    return METHODS[name]


def merged(
    vectors: Vectors,
    method: str,
    weights: Sequence[float] | None = None,
    *,
    alpha: float = 1.0,
    **options: Any,
) -> Callable[[str], Delta]:
    """``name -> alpha * method(vectors)``, the merged change of one weight, computed when asked for.

    Args:
        vectors: task vectors, bases or reconstructions.
        method: a name in METHODS.
        weights: [K] by vector; None for 1 each.
        options: of the method, see ``METHODS[method].options``. Thresholds of the whole model (``scope="model"``)
            are found here, in two passes over the vectors.

    Raises ParameterError for an unknown method or option, and a wrong number of weights.
    """
    chosen, options = find_method(method), check_options(method, options)
    shares = [1.0] * len(vectors) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(vectors):
        raise ParameterError(f"{len(shares)} weights for {len(vectors)} vectors; give one per vector")
    if chosen.trims:
        scope = options.pop("scope", "model")
        if scope == "model":
            density = options.get("density", chosen.options["density"])
            options["limits"] = model_thresholds(vectors, density)

    def change(name: str) -> Delta:
        deltas, shape = vectors.deltas(name), vectors.base.tensors[name].shape
        if chosen.of_matrices and len(shape) != 2:  # the factors of a convolution look like a matrix
            deltas = [reshaped(delta, shape) for delta in deltas]
        return scale(chosen.combine(deltas, shares, **options), alpha)

    return change


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """ParameterError for an unknown method or option, and for what the method has against a value."""
    method = find_method(name)
    for option in options:
        if option not in method.options:
            takes = ", ".join(method.options) or "none"
            raise ParameterError(f"{option} is not an option of {name}{did_you_mean(option, method.options)}: {takes}")
    if "scope" in options:
        check_scope(options["scope"])
    method.combine([Dense(torch.ones(1, 1))], [1.0], **{n: v for n, v in options.items() if n != "scope"})
    return dict(options)


def model_thresholds(vectors: Vectors, density: float) -> list[float]:
    """[K] the magnitude of the smallest entry among the ``density`` largest of each vector, over all weights."""
    tensors = vectors.base.tensors

    def one_pass():
        return map(vectors.deltas, track(vectors.names, "Thresholds", lambda n: tensors[n].nbytes))

    return thresholds(one_pass, density)
