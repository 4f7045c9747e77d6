"""The models of a merge as a whole: the checkpoints behind a YAML file, or the tensors handed over.

mergekit hands a method one tensor at a time; Gram matrices and thresholds of whole models need them all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import GroupMergeMethod, MergeMethodSpec, TensorEntry, TensorGroup
from torch import Tensor

from tvbases_hf.bases import BasisWeights
from tvbases_hf.bases.registry import Construction
from tvbases_hf.errors import MismatchError
from tvbases_hf.merging.apply import model_thresholds
from tvbases_hf.models.gram import Gram, gram_matrix
from tvbases_hf.models.vectors import Model, Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import current

from .tokens import aligned, rows_cut, tokens_merged

LOG = logging.getLogger("tvbases_mergekit")


@dataclass(eq=False)
class Models:
    """The models of one merge, their Gram matrix, what was solved from it, and thresholds: each found once."""

    vectors: Vectors
    ids: tuple[Hashable, ...]
    _gram: Gram | None = None
    _limits: dict[Hashable, list[float]] = field(default_factory=dict)
    _solved: dict[Hashable, BasisWeights] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def gram(self) -> Gram:
        with self._lock, torch.device("cpu"):  # mergekit's --multi-gpu makes a GPU the default device of its threads
            if self._gram is None:
                self._check_whole()
                self._gram = gram_matrix(self.vectors)
                for line in self._gram.warnings():
                    LOG.warning("%s", line)
            return self._gram

    def columns(self, group: TensorGroup) -> list[int]:
        """Rows of the encoder for the models of this group; a model that lacks the tensor has no change there."""
        return [self.ids.index(entry.id) for entry in group.non_base]

    def solve(self, bases: Construction, num_bases: float | None, options: Mapping[str, Any]) -> BasisWeights:
        """Encoder and decoder, once per set of options (parameters may differ between tensors)."""
        key = (bases.name, num_bases, tuple(sorted(options.items())))
        with self._lock, torch.device("cpu"):
            if key not in self._solved:
                self._solved[key] = weights = bases.solve(self.gram.matrix, num_bases, **options)
                LOG.info("%s", _summary(bases.yaml, self.gram.tasks, weights))
            return self._solved[key]

    def limits(self, density: float, weights: BasisWeights | None = None, over: str = "bases") -> list[float]:
        """By model, basis or reconstruction: the magnitude of the smallest of its ``density`` largest entries."""
        mixing = () if weights is None else (weights.encoder if over == "bases" else weights.reconstruction).tolist()
        key = (density, str(mixing))
        with self._lock, torch.device("cpu"):
            if key not in self._limits:
                self._check_whole()
                vectors = self.vectors if weights is None else self.vectors.mixed(weights, over)
                self._limits[key] = model_thresholds(vectors, density)
            return self._limits[key]

    def _check_whole(self) -> None:
        """MismatchError where tensors are left out of what is said of whole models.

        Plain mergekit cuts rows of tokens, or matches them by a tokenizer, and its methods are not told which.
        """
        skipped = self.vectors.coverage.skipped
        if skipped:
            raise MismatchError(
                f"{len(skipped)} tensors differ in shape between the models (first: {skipped[0]}), and plain mergekit "
                "does not tell a method how it matches their rows; run `tvbases mergekit-yaml` or `tvbases merge` with "
                "the same YAML"
            )

    def share(self) -> None:
        """Of several processes all use what the first has solved: other processors round otherwise."""
        self._solved.update(current().team.same(self._solved))
        self._limits.update(current().team.same(self._limits))


def _summary(name: str, tasks: Sequence[str], weights: BasisWeights) -> str:
    shares = ", ".join(f"{task} {w:.2f}" for task, w in zip(tasks, weights.effective_weights.tolist(), strict=True))
    total = weights.total or 1.0
    return (
        f"{name}: {weights.num_tasks} task vectors in {weights.num_bases} "
        f"{'basis' if weights.num_bases == 1 else 'bases'}, {weights.loss / total:.1%} of their energy "
        f"unexplained (least possible {weights.bound / total:.1%}); "
        f"weight of each task in the sum of the bases: {shares}"
    )


_CACHE: dict[Hashable, Models] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class WholeMerge(GroupMergeMethod):
    """A method that notes which models a tensor was planned with: some may turn out to lack it."""

    spec: MergeMethodSpec
    planned: dict[str | None, tuple[Hashable, ...]] = field(default_factory=dict, kw_only=True)

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name is None or ".slices[" in group_name:  # the first thing that mergekit asks in every merge
            self.planned.clear()
        self.planned.setdefault(group_name, tuple(key for key in input_ids if key != base_id))

    def _bind_parameters(self, groups, parameters):
        self.planned.clear()  # a direct call has no plan, and must not use that of an earlier merge
        return super()._bind_parameters(groups, parameters)


def models_of(groups: Sequence[TensorGroup], planned: Mapping[str | None, tuple[Hashable, ...]]) -> Models | None:
    """The models of the merge that these groups belong to; None if there is nothing but a base.

    From files, what is asked of a merge for the first time reads all models once while other threads wait, with readers
    of its own (mergekit's loaders hold one shard each, and would thrash); it is kept for the merge's other tensors.
    From memory, all groups of the merge are given at once. ``planned`` tells the models of each tensor, those that
    lack it included.
    """
    merged = [group for group in groups if group.non_base]
    if not merged:
        return None
    with torch.device("cpu"):
        if all(isinstance(entry.id, ModelReference) for entry in merged[0].entries):
            models = planned.get(merged[0].metadata.name) or tuple(entry.id for entry in merged[0].non_base)
            return _from_files(merged[0].base, models)
        return _from_memory(merged)


def _from_files(base_entry: TensorEntry | None, models: tuple[Any, ...]) -> Models:
    assert base_entry is not None
    base: Any = base_entry.id
    config = tokens_merged()
    paths = {reference: _path(reference) for reference in (base, *models)}
    key = (
        _identity(paths[base]),
        tuple((model, _identity(paths[model])) for model in models),
        str(config),
        rows_cut(),
    )
    with _LOCK:
        if key not in _CACHE:
            opened: dict[str, Model] = {str(m): Checkpoint.open(paths[m], label=str(m)) for m in models}
            origin = Checkpoint.open(paths[base], label=str(base))
            if config is not None:
                origin, opened, _ = aligned(config, base, origin, {m: opened[str(m)] for m in models})
            rows = "drop" if rows_cut() else None
            vectors = Vectors.of_models(origin, opened, skip_mismatched=True, extra_rows=rows)
            for line in vectors.coverage.notes():
                LOG.warning("%s", line)
            _CACHE[key] = Models(vectors, models)
        return _CACHE[key]


def _path(reference: Any) -> Path:
    """The directory (or file, for mergekit-pytorch) of a model, adapters merged and Hub ids resolved by mergekit."""
    path = Path(reference.model.path)
    return path if path.is_file() else Path(LoaderCache().get(reference).index.base_path)


def _identity(path: Path) -> Hashable:
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return (str(path.resolve()), tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def _from_memory(groups: Sequence[TensorGroup]) -> Models:
    ids = tuple(dict.fromkeys(entry.id for group in groups for entry in group.non_base))
    base: dict[str, Tensor] = {}
    models: dict[Hashable, dict[str, Tensor]] = {key: {} for key in ids}
    for index, group in enumerate(groups):
        assert group.base is not None
        name = f"{index}:{group.metadata.name}"
        base[name] = group.base.tensor
        for entry in group.non_base:
            models[entry.id][name] = entry.tensor
    checkpoints = {str(key): Checkpoint.from_state_dict(state, str(key)) for key, state in models.items()}
    return Models(Vectors.of_models(Checkpoint.from_state_dict(base, "base"), checkpoints), ids)
