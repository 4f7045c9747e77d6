"""Read a mergekit YAML as a careful colleague would: everything that can be known to fail is said before it starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from pydantic import ValidationError

from tvbases_hf.bases.weights import resolve_num_bases
from tvbases_hf.checkpoint import Checkpoint, locate
from tvbases_hf.errors import ParameterError
from tvbases_hf.taskvector import TaskVectors

from .methods import BasisMerge


def read_config(file: Path) -> MergeConfiguration:
    """The YAML as mergekit's own configuration; ParameterError for anything that is not one."""
    if not file.is_file():
        raise ParameterError(f'"{file}": no such file; give a mergekit YAML')
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f'"{file}" is not YAML: {error}') from error
    if not isinstance(content, dict):
        raise ParameterError(f'"{file}" is not a mergekit configuration: it needs merge_method and models')
    try:
        return MergeConfiguration.model_validate(content)
    except (ValidationError, RuntimeError) as error:
        raise ParameterError(f'"{file}" is not a mergekit configuration: {error}') from error


def check_config(
    config: MergeConfiguration, cache_dir: str | None = None, *, truncates_vocabulary: bool = False
) -> int:
    """Refuse what would fail or be silently ignored; return the bytes that the merged model will need, roughly.

    Raises:
        ParameterError: an unknown method or parameter (with the nearest known one), a value out of range.
        CheckpointError, MismatchError: a model that cannot be read or does not fit the base.
    """
    method = find_method(config.merge_method)
    for parameters in _parameter_sets(config):
        _check_names(parameters, method)
    models = _models(config)
    aligned = bool(config.tokenizer or config.tokenizer_source or truncates_vocabulary)
    opened = {ref: _open(ref, cache_dir) for ref in dict.fromkeys(models) if ref.lora is None}
    base = config.base_model
    if isinstance(method, BasisMerge):
        _check_basis_options(config, [ref for ref in models if ref != base])
    if base in opened and not config.slices and not config.modules:
        tuned = {str(ref): checkpoint for ref, checkpoint in opened.items() if ref != base}
        if tuned:
            TaskVectors(opened[base], tuned, skip_mismatched=aligned)
    return _output_bytes(config, opened)


def find_method(name: str) -> MergeMethod:
    """The registered method; ParameterError with the nearest known name."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    if name not in known:
        raise ParameterError(f"unknown merge_method {name!r}{_nearest(name, known)}; known: {', '.join(sorted(known))}")
    return known[name]


def _check_names(parameters: Mapping[str, Any], method: MergeMethod) -> None:
    known = [spec.name for spec in method.spec.parameters]
    for name in parameters:
        if name not in known:
            raise ParameterError(
                f"{method.spec.name} has no parameter {name!r}{_nearest(name, known)}; mergekit would ignore it. "
                f"It takes {', '.join(known) or 'none'}"
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _parameter_sets(config: MergeConfiguration) -> Iterable[Mapping[str, Any]]:
    """Every ``parameters:`` block of the file."""
    holders: list[Any] = [config, *(config.models or []), *(config.slices or []), *(config.modules or {}).values()]
    for module in (config.modules or {}).values():
        holders += [*(module.models or []), *(module.slices or [])]
    for part in list(holders):
        holders += getattr(part, "sources", [])
    return [holder.parameters for holder in holders if holder.parameters]


def _models(config: MergeConfiguration) -> list[Any]:
    """All inputs in the order of the file, the base first; ParameterError if one is named twice in a merge."""
    names = [item.model for item in config.models or []]
    twice = [str(ref) for ref in names if names.count(ref) > 1]
    if twice:
        raise ParameterError(f'"{twice[0]}" is named twice under models; name every model once and use its weight')
    others = sorted((ref for ref in config.referenced_models() if ref not in names), key=str)
    return [*others, *names]


def _open(reference: Any, cache_dir: str | None) -> Checkpoint:
    return Checkpoint.open(locate(reference.model.path, reference.model.revision, cache_dir), label=str(reference))


def _check_basis_options(config: MergeConfiguration, tasks: list[Any]) -> None:
    name = config.merge_method
    if config.base_model is None:
        raise ParameterError(f"{name} needs base_model: the model that all others were fine-tuned from")
    for output in config.slices or []:
        ranges = {tuple(source.layer_range) for source in output.sources}
        if len(ranges) > 1:
            raise ParameterError(
                f"{name} compares the same layers of all models; a slice has layer_range {sorted(ranges)}"
            )
    shared = config.parameters or {}
    num_bases = shared.get("num_bases", 0.5)
    if isinstance(num_bases, (int, float)):
        resolve_num_bases(num_bases, len(tasks))
    merge = shared.get("merge", "task_arithmetic")
    if isinstance(merge, str):
        find_method(merge)
    for parameters in _parameter_sets(config):
        _check_catch_all(parameters.get("weight"))


def _check_catch_all(weight: Any) -> None:
    """A weight with filters only would leave other tensors without one, where it means something else."""
    conditions = weight if isinstance(weight, list) else [weight]
    if any(isinstance(c, ConditionalParameter) for c in conditions) and not any(
        isinstance(c, ConditionalParameter) and c.filter in (None, "*") for c in conditions
    ):
        raise ParameterError("weight has filters only; add a last entry without filter, for example `- value: 1.0`")


def _output_bytes(config: MergeConfiguration, opened: Mapping[Any, Checkpoint]) -> int:
    model = opened.get(config.base_model) or next(iter(opened.values()), None)
    if model is None:
        return 0
    wide = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(config.out_dtype or config.dtype or "")
    return sum(info.numel * (wide or info.dtype.itemsize) for info in model.tensors.values())
