"""``tvbases merge``: a mergekit YAML executed on the changes of weights, without building any of the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from tvbases_hf.defaults import ExtraRows, Host
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.fit import Limits
from tvbases_hf.merging.merge import Merge, is_merge
from tvbases_hf.merging.write import check_adapter, is_checkpoint_of_ours, write
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.travel import beside
from tvbases_hf.storage import run
from tvbases_hf.storage.output import check_output, preview

from .command import reported
from .configuration import find_method, one_line, read_config
from .inputs import Inputs, open_inputs
from .kernels import LINEAR, Linear, Weight, check_native, kernel_of, not_native
from .methods import BasisMerge
from .places import places
from .preflight import check_basis_parameters, check_structure
from .several import is_several, merge_all
from .sources import Models
from .streamed import Pieces

Bound = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What the command line adds to the YAML."""

    adapter: bool = False
    rank: str | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    extra_rows: ExtraRows | None = None
    device: str | torch.device = "cpu"
    dry_run: bool = False
    equal_rank: bool = False
    host: Host | None = None
    intermediate_dir: Path | None = None
    """Where the merges of a file go that have a name; None: the file holds one merge."""

    def __post_init__(self) -> None:
        if (self.equal_rank or self.host) and not self.adapter:
            raise ParameterError("--equal-rank and --for are of a merged adapter; add --adapter, or leave them out")
        if self.rank is not None and not self.adapter:
            raise ParameterError("--rank is that of a merged adapter; add --adapter, or leave --rank out")
        if self.adapter and str(self.device) != "cpu":
            raise ParameterError("--device is of merges into a checkpoint; factors of adapters are small: leave it out")
        if self.adapter and run.current().memory is not None:
            raise ParameterError("--memory is kept by merges into a checkpoint; an adapter is held whole: leave it out")

    def limits(self, dtype: torch.dtype) -> Limits:
        """Of the adapter that is written, its factors in ``dtype``."""
        rank = None if self.rank is None else RankRule.parse(self.rank)
        return Limits(rank, dtype, self.equal_rank, self.host)


@dataclass(frozen=True)
class Job:
    """A YAML with its models opened and every word of it checked: what is left is to plan it and to write it."""

    config: MergeConfiguration
    method: MergeMethod
    inputs: Inputs
    request: Request
    recipe: str

    @classmethod
    def open(cls, file: Path, out: Path, request: Request) -> Job:
        """Raises TvbasesError for whatever is wrong with the configuration, its models or the output."""
        place = run.find_device(request.device) if isinstance(request.device, str) else request.device
        limits = request.limits(torch.float32)
        config = read_config(file)
        method = _checked(config, out, request)
        inputs = open_inputs(config, out, place, request.extra_rows)
        if request.adapter and request.host:
            check_adapter(inputs.vectors, limits)
        return cls(config, method, inputs, request, file.read_text(encoding="utf-8"))

    @property
    def dtype(self) -> torch.dtype | None:
        return self.request.dtype or _dtype(self.config)

    @property
    def how(self) -> dict[str, Any]:
        """How ``write`` writes it."""
        if not self.request.adapter:
            return {"dtype": self.dtype}
        return {"as_adapter": True, "limits": self.request.limits(self.dtype or torch.float32)}

    @property
    def trained(self) -> Options | None:
        """How the vectors are decomposed, where the coefficients of the parts are trained on data (devec_unique)."""
        if self.method.spec.name != "devec_unique":
            return None
        names = self.inputs.vectors.names[:1]
        found = resolve(self.config, self.method, self.inputs, names)[names[0]]
        if found["pairs"] != "trained":
            return None
        return Options(found["threshold"], found["subspace"], "pairs", found["side"], found["rank"])

    def plan(self) -> Merge:
        planned = plan(self.config, self.method, self.inputs, self.recipe, self.request)
        if self.request.adapter:
            _check_adapter(planned, self.inputs)
        return planned


def merge(file: Path, out: Path, request: Request = Request()) -> dict[str, Any]:
    """Execute the merge of a YAML file and return its report.

    Raises:
        TvbasesError: whatever is wrong with the configuration, its models or the output; nothing is written then.
    """
    if request.intermediate_dir is not None and is_several(file):
        found = merge_all(
            file,
            out,
            request.intermediate_dir,
            lambda one, to: _merge(one, to, request),
            lambda config, to: _checked(config, to, request),
            request.dry_run,
        )
        assert found is not None
        return found
    return _merge(file, out, request)


def _merge(file: Path, out: Path, request: Request) -> dict[str, Any]:
    with reported():
        job = Job.open(file, out, request)
        return _preview(job, out) if request.dry_run else write(job.plan(), out, **job.how)


def _preview(job: Job, out: Path) -> dict[str, Any]:
    """What would be written, once every parameter is known to fit; only headers are read."""
    inputs, method = job.inputs, job.method
    tensors, names = inputs.vectors.base.tensors, inputs.vectors.names
    bound = resolve(job.config, method, inputs, inputs.floating if method.spec.name == LINEAR else names)
    check_native(method, bound)
    if isinstance(method, BasisMerge):
        check_basis_parameters(method, bound)
    if job.request.adapter:
        return preview(out, len(names), None)
    inputs.vectors.base.check_storable()
    beside(inputs.vectors.base, inputs.vectors.models, inputs.made)
    size = sum(info.numel * (job.dtype or info.dtype).itemsize for info in tensors.values())
    return preview(out, len(tensors), size)


def plan(config: MergeConfiguration, method: MergeMethod, inputs: Inputs, recipe: str, request: Request) -> Merge:
    """Every weight's parameters, resolved and checked, as one merging method."""
    vectors = inputs.vectors
    tensors, is_linear = vectors.base.tensors, method.spec.name == LINEAR
    names = inputs.floating if is_linear else vectors.names
    bound = resolve(config, method, inputs, names)
    check_native(method, bound)
    models = Models(vectors, inputs.models)
    kernel = Linear(vectors.base, inputs.base) if is_linear else kernel_of(method, models)
    if isinstance(kernel, Linear):
        names = tuple(name for name in names if name in vectors.names or kernel.moves_base(bound[name]))
    settings = bound if is_linear or isinstance(method, BasisMerge) else _in_order(method, bound)
    weights = {name: Weight(name, tensors[name].shape, request.seed) for name in names}
    for name in names:
        kernel.prepare(settings[name])
    models.share()

    def combine(name: str, deltas: Sequence[Delta]) -> Delta:
        return kernel.combine(deltas, settings[name], weights[name])

    def stream(name: str, deltas: Sequence[Dense]) -> Iterator[Tensor]:
        return kernel.pieces(Pieces(deltas), settings[name], weights[name])

    streams = bool(names) and kernel.streams(settings[names[0]])
    by_rows = bool(names) and all(kernel.by_rows(settings[name]) for name in names)
    return Merge(
        vectors,
        combine,
        tuple(names),
        method.spec.name,
        recipe,
        stream=stream if streams else None,
        seed=request.seed,
        by_rows=by_rows,
        tokenizer=inputs.made,
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


def _checked(config: MergeConfiguration, out: Path, request: Request) -> MergeMethod:
    """The method, after all that is known without the models; TvbasesError for what this cannot do or write."""
    check_output(out, is_merge if request.adapter else is_checkpoint_of_ours)
    method = find_method(config.merge_method)
    _check_supported(config, request.adapter)
    check_structure(config, method)
    _dtype(config)
    return method


def _check_supported(config: MergeConfiguration, adapter: bool) -> None:
    for key in ("slices", "modules"):
        if getattr(config, key):
            raise ParameterError(not_native(key))
    for key in ("tokenizer", "tokenizer_source", "chat_template"):
        if adapter and getattr(config, key):
            raise ParameterError(f"{key} is of a whole model, which an adapter is not; leave it or --adapter out")


def _dtype(config: MergeConfiguration) -> torch.dtype | None:
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise ParameterError(f"weights cannot be stored as {config.out_dtype or config.dtype}; choose a float dtype")
    return dtype


def _check_adapter(planned: Merge, inputs: Inputs) -> None:
    extra = set(planned.names) - set(inputs.vectors.names)
    if planned.method == LINEAR and extra:
        raise ParameterError(
            "linear with normalize: false and weights that do not sum to 1 also scales the base, which an adapter "
            "cannot do; set normalize: true, use task_arithmetic, or leave --adapter out"
        )
