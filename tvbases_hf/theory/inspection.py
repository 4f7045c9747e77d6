"""What task vectors are like before anything is made of them: lengths, similarities, bases, layers, error bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bases import BasisWeights, ae_bases
from ..bases.weights import resolve_num_bases
from ..defaults import TEMPLATE
from ..errors import ParameterError
from ..learning.batches import Columns
from ..learning.taskfiles import TaskModel
from ..models.gram import Gram, gram_matrix
from ..models.layers import LayerReport, examine_layers
from ..models.vectors import Vectors, open_model
from .bounds import Bounds, measure_bounds
from .hessian import cross_entropy
from .order import by_similarity

# Bases that leave less than this of the task vectors' energy unexplained are suggested.
SUGGESTED_LOSS = 0.2


@dataclass(frozen=True)
class Inspection:
    """``bases[m - 1]`` are the balanced bases of m vectors; ``layers`` and ``bounds`` where they were asked for."""

    vectors: Vectors
    gram: Gram
    bases: tuple[BasisWeights, ...]
    layers: LayerReport | None = None
    bounds: Bounds | None = None
    notes: tuple[str, ...] = ()

    @property
    def unexplained(self) -> list[float]:
        """Share of the total squared norm that m balanced bases lose, for every m."""
        return [bases.bound / self._total for bases in self.bases]

    @property
    def suggested_num_bases(self) -> int:
        """The fewest bases that leave little unexplained."""
        return next((m for m, loss in enumerate(self.unexplained, 1) if loss <= SUGGESTED_LOSS), len(self.bases))

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys([*self.vectors.coverage.notes(), *self.gram.warnings(), *self.notes]))

    @property
    def _total(self) -> float:
        return float(self.gram.matrix.trace()) or 1.0

    def to_json(self) -> dict[str, Any]:
        gram, vectors = self.gram, self.vectors
        least = [bases.spectral_bound / self._total for bases in self.bases]
        return {
            "base": vectors.base.label,
            "tasks": list(vectors.tasks),
            "parameters": vectors.numel,
            "tensors": len(vectors.names),
            "norm": gram.norms.tolist(),
            "norm_ratio": None if gram.norm_ratios is None else gram.norm_ratios.tolist(),
            "cosine": gram.cosine.tolist(),
            "order": by_similarity(gram.cosine),
            "unexplained": {"any_vectors": least, "balanced_bases": self.unexplained},
            "suggested_num_bases": self.suggested_num_bases,
            "warnings": self.warnings,
            **({} if self.bounds is None else {"bounds": self.bounds.to_json()}),
            **({} if self.layers is None else {"layers": asdict(self.layers)}),
        }


def inspect(
    vectors: Vectors,
    *,
    layers: bool = False,
    merged: str | Path | None = None,
    data: Mapping[str, str] | None = None,
    num_bases: float | None = None,
    alpha: float = 1.0,
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    max_rows: int = 256,
    batch_size: int = 16,
    classes: Mapping[str, str] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
) -> Inspection:
    """One pass over all models; another one, of several SVDs per matrix, for ``layers``.

    Args:
        layers: also interference, sharing and decay of the singular values, by layer.
        merged: a merge of these models, a checkpoint or an adapter: also its interference, by layer.
        data: by task, a folder of images, a file (.npz, .jsonl, .json, .csv) or a data set of the Hub: also the error
            bounds (Theorems 3.5 to 3.7), both sides, over ``num_bases`` bases (None: as many as are suggested),
            negation with ``alpha``.
        text_column, label_column, image_column, max_rows, batch_size, classes, templates: how it is read; see Columns.

    Raises:
        ParameterError: data of no task, that cannot be read, or of task vectors that are not on the CPU.
        CheckpointError: NaN or infinity in a tensor, which is named.
    """
    if data and vectors.device.type != "cpu":
        raise ParameterError("--bounds are computed on the CPU; leave --device out")
    losses, model = {}, None
    notes: tuple[str, ...] = ()
    if data:
        named = {"image": image_column, "classes": classes or {}, "templates": templates}
        read = Columns(text_column, label_column, max_rows, batch_size, **named)
        loaded = TaskModel.load(vectors.base)
        model = loaded.model
        losses = {name: cross_entropy(loaded.data(name, source, read)) for name, source in data.items()}
        notes = tuple(loaded.notes())
    change = None if merged is None else _change_of(merged, vectors)
    notes += () if change is None else tuple(change.coverage.notes())
    gram = gram_matrix(vectors)
    found = Inspection(vectors, gram, tuple(ae_bases(gram.matrix, m) for m in range(1, len(vectors) + 1)))
    bounds = None
    if model is not None:
        count = resolve_num_bases(found.suggested_num_bases if num_bases is None else num_bases, len(vectors))
        bounds = measure_bounds(model, vectors, losses, count, gram=gram, alpha=alpha)
    examined = examine_layers(vectors, merged=change) if layers or change else None
    return Inspection(vectors, gram, found.bases, examined, bounds, notes)


def _change_of(merged: str | Path, vectors: Vectors) -> Vectors:
    """The one vector of a merge over the same base."""
    model = open_model(merged, vectors.base)
    return Vectors.of_models(vectors.base, {str(merged): model}, device=vectors.device)
