"""The models of a YAML file, opened as task vectors over one base: checkpoints, adapters, and ``base+adapter``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from tvbases_hf.defaults import ExtraRows
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.adapter_files import adapter_folder, is_adapter
from tvbases_hf.models.vectors import Model, Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import locate

from .kernels import not_native
from .preflight import check_distinct
from .tokens import aligned, asks_for_tokens, made_files


@dataclass(frozen=True)
class Inputs:
    """``models`` are the task vectors in their order, named as in the file; ``base`` is what they are changes of.

    ``base_is_model``: the base is itself one of the models that are merged, with a weight where all models have one.
    """

    vectors: Vectors
    models: tuple[ModelReference, ...]
    base: ModelReference
    base_is_model: bool
    made: Mapping[str, Path | bytes] | None = None
    """The files of a tokenizer or a chat template that the YAML asks for."""

    @property
    def floating(self) -> tuple[str, ...]:
        """The base's tensors that a merge may touch."""
        tensors = self.vectors.base.tensors
        skipped = set(self.vectors.coverage.skipped)
        return tuple(n for n, info in tensors.items() if info.dtype.is_floating_point and n not in skipped)

    @property
    def checkpoints(self) -> list[ModelReference]:
        opened = self.vectors.models
        return [model for model in self.models if isinstance(opened[str(model)], Checkpoint)]


def open_inputs(
    config: MergeConfiguration,
    out: Path,
    device: str | torch.device = "cpu",
    extra_rows: ExtraRows | None = None,
) -> Inputs:
    """Open everything, headers only; changes of weights will be on ``device``.

    Raises:
        ParameterError: no base that all adapters share, no model, or one model under two spellings.
        CheckpointError, MismatchError: a model that cannot be read or does not fit the base.
        OutputError: ``out`` is one of the models.
    """
    listed = [item.model for item in config.models or []]
    reference = _base_reference(config, listed)
    base_path = locate(reference.model.path, reference.model.revision)
    if is_adapter(base_path):
        raise ParameterError(f'"{reference}" is an adapter where a base is needed; name the model below it base_model')
    base = Checkpoint.open(base_path, label=str(reference))
    models = [model for model in listed if model != reference]
    if not models:
        raise ParameterError(f'no model is named besides the base "{reference}"; add at least one under models')
    paths = {model: _locate(model, reference, base_path) for model in models}
    check_distinct({ref: (path, None) for ref, path in {reference: base_path, **paths}.items()}, out)
    opened: dict[str, Model] = {str(model): _open(model, path, base) for model, path in paths.items()}
    tokenizer = None
    if asks_for_tokens(config):
        _check_alone(extra_rows)
        base, opened, tokenizer = aligned(config, reference, base, {model: opened[str(model)] for model in models})
    vectors = Vectors.of_models(base, opened, device=device, extra_rows=extra_rows)
    _check_changeable(vectors)
    is_model = config.base_model is not None or reference in listed
    return Inputs(vectors, tuple(models), reference, is_model, made_files(config, tokenizer))


def _check_alone(extra_rows: ExtraRows | None) -> None:
    if extra_rows is not None:
        raise ParameterError("a tokenizer in the YAML matches rows by token; leave --extra-rows out, or the tokenizer")


def _base_reference(config: MergeConfiguration, listed: list[ModelReference]) -> ModelReference:
    """base_model; a method that needs none measures changes from the model below the adapters, or from the first."""
    if config.base_model is not None:
        if config.base_model.lora is not None:
            raise ParameterError(not_native("a base_model with an adapter"))
        return config.base_model
    below = list(dict.fromkeys(model.model for model in listed if model.lora is not None))
    return ModelReference(model=below[0]) if below else listed[0]


def _locate(model: ModelReference, base: ModelReference, base_path: Path) -> Path:
    """Where the adapter or the checkpoint is; MismatchError for an adapter on another model than the base."""
    if model.lora is None:
        return adapter_folder(locate(model.model.path, model.model.revision))
    if model.model != base.model and locate(model.model.path, model.model.revision).resolve() != base_path.resolve():
        raise MismatchError(
            f'"{model}": the adapter is on {model.model}, but the base of this merge is {base}; its change cannot be '
            "added there"
        )
    return locate(model.lora.path, model.lora.revision)


def _open(model: ModelReference, path: Path, base: Checkpoint) -> Model:
    if model.lora is not None or is_adapter(path):
        return Adapter.open(path, base, label=str(model))
    return Checkpoint.open(path, label=str(model))


def _check_changeable(vectors: Vectors) -> None:
    """A quantised base stores integers, whose change by an adapter cannot be added."""
    for task, model in vectors.models.items():
        lost = [name for name in model.names if name not in vectors.names] if isinstance(model, Adapter) else []
        if lost:
            dtype = str(vectors.base.tensors[lost[0]].dtype).removeprefix("torch.")
            raise CheckpointError(
                f'"{task}" changes {len(lost)} tensors that the base stores as {dtype} (first: {lost[0]}); '
                "give the base before its quantisation"
            )
