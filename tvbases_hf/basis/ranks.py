"""How many singular components of which matrix and task to keep (TSV-Compress)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.rank import RankRule, within_budget
from ..algebra.svd import singular_values
from ..bases import BasisWeights
from ..errors import ParameterError
from ..methods.tsv import default_rank
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..storage.run import track
from .info import BasisInfo, describe
from .sources import TruncatedVectors


@dataclass(frozen=True)
class Spectra:
    """Singular values of every matrix and task, float64, descending; ``other`` [T] the squared norms of the rest."""

    matrices: dict[str, list[Tensor]]
    shapes: dict[str, tuple[int, int]]
    other: Tensor

    def lost(self, ranks: dict[str, list[int]]) -> Tensor:
        """[T] squared norm that these ranks cut off (Eckart-Young); matrices without ranks are kept whole."""
        total = torch.zeros_like(self.other)
        for name, kept in ranks.items():
            total += torch.stack(
                [values[k:].square().sum() for values, k in zip(self.matrices[name], kept, strict=True)]
            )
        return total


def spectra(vectors: Vectors) -> Spectra:
    """One pass over the models; per matrix the eigenvalues of the small side's Gram matrix."""
    base = vectors.base.tensors
    matrices: dict[str, list[Tensor]] = {}
    other = torch.zeros(len(vectors), dtype=torch.float64)
    for name in track(vectors.names, "Singular values", lambda n: base[n].nbytes):
        deltas = vectors.deltas(name)
        if len(base[name].shape) == 2:
            matrices[name] = [singular_values(delta).cpu() for delta in deltas]
        else:
            other += torch.stack([delta.block(0, base[name].numel).square().sum() for delta in deltas]).cpu()
    shapes = {name: (base[name].shape[0], base[name].shape[1]) for name in matrices}
    return Spectra(matrices, shapes, other)


def ranks_by_rule(found: Spectra, rule: RankRule | None, num_tasks: int) -> dict[str, list[int]]:
    """The same rule for every matrix and task; None for 1/T of the components (section 4.1)."""
    rule = rule or default_rank(num_tasks)
    ranks = {
        name: [rule.of_spectrum(v, *found.shapes[name]) for v in values] for name, values in found.matrices.items()
    }
    return _worth_factoring(found, ranks)


def ranks_by_budget(
    found: Spectra, vectors: Vectors, budget: float, itemsize: int | None = None
) -> dict[str, list[int]]:
    """Ranks that lose least within ``budget``, a share of the task vectors' bytes: most sigma^2 per byte first.

    Raises ParameterError when the budget does not even hold what is kept whole.
    """
    base = vectors.base.tensors
    size = {name: itemsize or base[name].dtype.itemsize for name in vectors.names}
    whole = sum(base[n].numel * size[n] for n in vectors.names if n not in found.matrices) * len(vectors)
    available = budget * sum(base[n].nbytes for n in vectors.names) * len(vectors) - whole
    if available < 0:
        raise ParameterError(
            f"budget {budget:g} is smaller than the biases and norms, which are kept whole ({whole} bytes)"
        )
    keys = [(name, task) for name, values in found.matrices.items() for task in range(len(values))]
    costs = [sum(found.shapes[name]) * size[name] for name, _ in keys]
    counts = within_budget([found.matrices[name][task] for name, task in keys], costs, available)
    ranks: dict[str, list[int]] = {name: [] for name in found.matrices}
    for (name, _), count in zip(keys, counts, strict=True):
        ranks[name].append(count)
    return _worth_factoring(found, ranks)


def _worth_factoring(found: Spectra, ranks: dict[str, list[int]]) -> dict[str, list[int]]:
    """Only where the factors are smaller than the matrices themselves, k < nm / (n + m) on average over the tasks."""
    kept = {}
    for name, chosen in ranks.items():
        rows, columns = found.shapes[name]
        if sum(chosen) * (rows + columns) < len(chosen) * rows * columns:
            kept[name] = chosen
    return kept


def truncate(
    vectors: Vectors,
    gram: Gram,
    rank: str | float | RankRule | None,
    budget: float | None,
    dtype: torch.dtype | None,
) -> tuple[BasisInfo, TruncatedVectors]:
    """Every task vector, its matrices cut to their leading singular components; neither rank nor budget: to 1/T."""
    rule, found = None if rank is None else RankRule.parse(rank), spectra(vectors)
    ranks = (
        ranks_by_rule(found, rule, len(vectors))
        if budget is None
        else ranks_by_budget(found, vectors, budget, dtype.itemsize if dtype else None)
    )
    identity = torch.eye(len(vectors), dtype=torch.float64)
    lost = found.lost(ranks)
    loss = float(lost.sum())
    weights = BasisWeights("tsv", identity, identity, loss, loss, loss, total=float(gram.matrix.trace()))
    options = {"rank": str(rule) if rule else None, "budget": budget}
    info = describe(vectors, gram, weights, options, ranks).with_errors(lost)
    return info, TruncatedVectors(vectors, ranks, dtype)
