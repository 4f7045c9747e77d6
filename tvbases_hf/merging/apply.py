"""A merging method applied to vectors of any kind: task vectors, bases or reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..algebra.delta import Delta
from ..algebra.sums import scale
from ..errors import ParameterError
from ..methods.devec import Decomposition, Options, decompose_weight
from ..methods.registry import find_method
from ..methods.threshold import thresholds
from ..models.names import as_stored, is_transposed, matrices_in
from ..storage.run import track

if TYPE_CHECKING:
    from ..models.vectors import Vectors


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
        weights: [K] by vector; None for 1 each. To ``devec_unique`` 0 means: compared with the others, not added.
        options: of the method, see ``METHODS[method].options``. Thresholds of the whole model (``scope="model"``)
            are found here, in two passes over the vectors.

    Sums are exact: float64 block by block, rounded once, to the widest stored dtype, float32 at least.

    Raises ParameterError for an unknown method or option, a bad value, and a wrong number of weights.
    """
    chosen = find_method(method)
    options = chosen.checked(options)
    shares = [1.0] * len(vectors) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(vectors):
        raise ParameterError(f"{len(shares)} weights for {len(vectors)} vectors; give one per vector")
    density = chosen.of_whole_model(options)
    if density is not None:
        options["limits"] = model_thresholds(vectors, density)

    def change(name: str) -> Delta:
        shape = matrices_in(name, vectors.base)
        turned = chosen.has_side and is_transposed(name, vectors.base)
        found = chosen.change(name, shape, vectors.deltas(name), shares, options, transposed=turned)
        return scale(as_stored(found, name, vectors.base), alpha)

    return change


def decomposed(vectors: Vectors, name: str, options: Options, targets: Sequence[int] | None = None) -> Decomposition:
    """The shared and unique components of one weight's changes."""
    base, deltas = vectors.base, vectors.deltas(name)
    turned = is_transposed(name, base)
    found = decompose_weight(name, matrices_in(name, base), deltas, options, targets, transposed=turned)
    return found.each(lambda delta: as_stored(delta, name, base))


def model_thresholds(vectors: Vectors, density: float) -> list[float]:
    """[K] the magnitude of the smallest entry among the ``density`` largest of each vector, over all weights."""
    tensors = vectors.base.tensors

    def one_pass():
        return map(vectors.deltas, track(vectors.names, "Thresholds", lambda n: tensors[n].nbytes))

    return thresholds(one_pass, density)
