"""``tvbases merge``: a mergekit YAML executed on the changes of weights, without building any of the models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.parameter_resolver import resolve_parameters
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.fit import Limits
from tvbases_hf.merging.merge import Merge, Stream, is_merge
from tvbases_hf.merging.write import is_checkpoint_of_ours, write
from tvbases_hf.methods.sums import base_share, linear
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.storage import run
from tvbases_hf.storage.output import check_output, preview

from .changes import LINEAR, Weight, check_native, merged, merged_bases, not_native, streamed_bases, streams
from .command import reported
from .configuration import find_method, one_line, read_config
from .inputs import Inputs, open_inputs
from .methods import BasisMerge
from .places import places
from .preflight import check_basis_parameters, check_structure
from .sources import GroupGram
from .streamed import Pieces, streamed, streamed_linear

LOG = logging.getLogger("tvbases_mergekit")

Bound = Mapping[str, Any]
Combine = Callable[[str, Sequence[Delta]], Delta]


@dataclass(frozen=True)
class Request:
    """What the command line adds to the YAML."""

    adapter: bool = False
    rank: str | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and not self.adapter:
            raise ParameterError("--rank is that of a merged adapter; add --adapter, or leave --rank out")
        if self.adapter and str(self.device) != "cpu":
            raise ParameterError("--device is of merges into a checkpoint; factors of adapters are small: leave it out")
        if self.adapter and run.current().memory is not None:
            raise ParameterError("--memory is kept by merges into a checkpoint; an adapter is held whole: leave it out")


def merge(file: Path, out: Path, request: Request = Request()) -> dict[str, Any]:
    """Execute the merge of a YAML file and return its report.

    Raises:
        TvbasesError: whatever is wrong with the configuration, its models or the output; nothing is written then.
    """
    place = run.find_device(request.device) if isinstance(request.device, str) else request.device
    check_output(out, is_merge if request.adapter else is_checkpoint_of_ours)
    rank = None if request.rank is None else RankRule.parse(request.rank)
    config = read_config(file)
    method = find_method(config.merge_method)
    _check_supported(config)
    check_structure(config, method)
    dtype = request.dtype or _dtype(config)
    with reported():
        inputs = open_inputs(config, out, place)
        if request.dry_run:
            return _preview(config, method, inputs, out, request.adapter, dtype)
        planned = plan(config, method, inputs, file.read_text(encoding="utf-8"), request)
        if request.adapter:
            _check_adapter(planned, inputs)
            return write(planned, out, as_adapter=True, limits=Limits(rank, dtype or torch.float32))
        return write(planned, out, dtype=dtype)


def _preview(
    config: MergeConfiguration,
    method: MergeMethod,
    inputs: Inputs,
    out: Path,
    adapter: bool,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What would be written, once every parameter is known to fit; only headers are read."""
    tensors, names = inputs.vectors.base.tensors, inputs.vectors.names
    bound = resolve(config, method, inputs, inputs.floating if method.spec.name == LINEAR else names)
    check_native(method, bound)
    if isinstance(method, BasisMerge):
        check_basis_parameters(method, bound)
    if adapter:
        return preview(out, len(names), None)
    size = sum(info.numel * (dtype or info.dtype).itemsize for info in tensors.values())
    return preview(out, len(tensors), size)


def plan(config: MergeConfiguration, method: MergeMethod, inputs: Inputs, recipe: str, request: Request) -> Merge:
    """Every weight's parameters, resolved and checked, as one merging method."""
    is_linear, tensors = method.spec.name == LINEAR, inputs.vectors.base.tensors
    names = inputs.floating if is_linear else inputs.vectors.names
    bound = resolve(config, method, inputs, names)
    check_native(method, bound)
    weights = {name: Weight(name, tensors[name].shape, request.seed) for name in names}
    if is_linear:
        combine, stream = _linear(inputs, bound), _linear_stream(inputs, bound)
        names = tuple(n for n in names if n in inputs.vectors.names or _base_share(bound[n]))
    elif isinstance(method, BasisMerge):
        combine, stream = _over_bases(method, bound, _gram(inputs), weights)
    else:
        combine, stream = _by_weight(method, bound, weights)
    stream = stream if is_linear or (names and streams(method, bound[names[0]])) else None
    return Merge(inputs.vectors, combine, tuple(names), method.spec.name, recipe, stream, request.seed)


def _over_bases(
    method: BasisMerge, bound: Mapping[str, Bound], gram: GroupGram, weights: Mapping[str, Weight]
) -> tuple[Combine, Stream]:
    for parameters in bound.values():
        method.prepare(gram, range(len(gram.ids)), parameters)
    gram.share()
    return (
        lambda name, deltas: merged_bases(method, deltas, bound[name], gram, weights[name]),
        lambda name, deltas: streamed_bases(method, deltas, bound[name], gram, weights[name]),
    )


def _gram(inputs: Inputs) -> GroupGram:
    found = gram_matrix(inputs.vectors)
    for line in found.warnings():
        LOG.warning("%s", line)
    return GroupGram(found, inputs.models)


def _linear(inputs: Inputs, bound: Mapping[str, Bound]) -> Combine:
    def combine(name: str, deltas: Sequence[Delta]) -> Delta:
        weights, normalize = dict(bound[name]["weight"]), bound[name]["normalize"]
        own = weights.pop(inputs.base, 0.0)
        base = inputs.vectors.base.read(name) if _base_share(bound[name]) else None
        return linear(deltas, list(weights.values()), base_weight=own, normalize=normalize, base=base)

    return combine


def _linear_stream(inputs: Inputs, bound: Mapping[str, Bound]) -> Stream:
    def stream(name: str, deltas: Sequence[Dense]) -> Iterator[Tensor]:
        weights, normalize = dict(bound[name]["weight"]), bound[name]["normalize"]
        own = weights.pop(inputs.base, 0.0)
        return streamed_linear(deltas, list(weights.values()), own, normalize, inputs.vectors.base.read(name))

    return stream


def _by_weight(
    method: MergeMethod, bound: Mapping[str, Bound], weights: Mapping[str, Weight]
) -> tuple[Combine, Stream]:
    settings = _in_order(method, bound)
    return (
        lambda name, deltas: merged(method, deltas, settings[name], weights[name]),
        lambda name, deltas: streamed(method, Pieces(deltas), settings[name], weights[name].own_seed),
    )


def _in_order(method: MergeMethod, bound: Mapping[str, Bound]) -> dict[str, Bound]:
    """By tensor: one value, or a list of one per model in their order."""
    per_model = {parameter.name for parameter in method.spec.input_parameters}
    return {
        name: {key: list(value.values()) if key in per_model else value for key, value in parameters.items()}
        for name, parameters in bound.items()
    }


def resolve(
    config: MergeConfiguration, method: MergeMethod, inputs: Inputs, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By tensor: every parameter as the method gets it, one value or one per model, by mergekit's own rules.

    Raises ParameterError where a parameter that the method needs has no value.
    """
    spec, place = method.spec, places(config, inputs.base, inputs.vectors.base.tensors)
    own = {item.model: item.parameters for item in config.models or []}
    has_base = any(parameter.scope == ParameterScope.INPUT for parameter in spec.parameters) and inputs.base_is_model
    models = (*inputs.models, *([inputs.base] if has_base else []))

    def sources(model: ModelReference | None) -> list[Any]:
        return [config.parameters] if model is None else [own.get(model), config.parameters]

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        called, t = place(name)
        try:
            shared, per_model = resolve_parameters(
                spec, tensor_name=called, inputs=dict.fromkeys(models, called), sources=sources, t=t
            )
        except RuntimeError as error:
            raise ParameterError(f"{spec.name}: {one_line(error)}; add it under parameters") from error
        found[name] = dict(shared)
        for parameter in spec.input_parameters:
            found[name][parameter.name] = {model: per_model[model][parameter.name] for model in models}
    return found


def _check_supported(config: MergeConfiguration) -> None:
    for key in ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template"):
        if getattr(config, key):
            raise ParameterError(not_native(key))


def _dtype(config: MergeConfiguration) -> torch.dtype | None:
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise ParameterError(f"weights cannot be stored as {config.out_dtype or config.dtype}; choose a float dtype")
    return dtype


def _base_share(bound: Bound) -> float:
    return base_share(list(bound["weight"].values()), bound["normalize"])


def _check_adapter(planned: Merge, inputs: Inputs) -> None:
    extra = set(planned.names) - set(inputs.vectors.names)
    if planned.method == LINEAR and extra:
        raise ParameterError(
            "linear with normalize: false and weights that do not sum to 1 also scales the base, which an adapter "
            "cannot do; set normalize: true, use task_arithmetic, or leave --adapter out"
        )
