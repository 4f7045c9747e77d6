"""What can be known to fail in a merge of these models with this configuration is said before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.merge_methods.base import BasePolicy, MergeMethod
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from tvbases_hf.errors import CheckpointError, OutputError, ParameterError, TvbasesError
from tvbases_hf.methods.sums import NO_SUM, base_share
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import WEIGHT_FILES, home_path, locate, weight_files
from tvbases_hf.storage.inputs import Input
from tvbases_hf.storage.side_files import is_chat_template, is_tokenizer_file, side_files

from .configuration import DTYPE_BYTES, all_models, find_method, input_lists, one_line, output_slices
from .methods import BasisMerge
from .registered import RegisteredMerge

DELLA = ("della", "della_linear")


def check_config(config: MergeConfiguration, options: MergeOptions, out: Path) -> tuple[int, list[Input]]:
    """Refuse what would fail; return roughly the bytes of the merged model, and the weight files as they are now.

    Raises:
        ParameterError: a value out of range, a model named twice, or what mergekit itself refuses to plan.
        CheckpointError, MismatchError: a model that cannot be read or does not fit the base.
        OutputError: ``out`` is one of the models.
    """
    method = find_method(config.merge_method)
    check_structure(config, method)
    opened = {ref: _open(ref, options) for ref in all_models(config)}
    inputs = [Input(file, str(ref)) for ref, model in opened.items() for file in _weights(ref, model, options)]
    check_distinct({ref: (model.path, ref.lora) for ref, model in opened.items()}, out)
    _check_fit(config, method, {ref: model for ref, model in opened.items() if ref.lora is None}, options)
    _side_files(config, options)
    tasks = _plan(config, options)
    _check_whole(config, tasks, opened, options)
    for task in tasks:
        check_together(method, _bound(task))
        if isinstance(method, RegisteredMerge):
            method.check(_bound(task))
    if isinstance(method, BasisMerge):
        check_basis_parameters(method, {task.output_weight.name: _bound(task) for task in tasks})
    return _output_bytes(config, opened), inputs


def check_structure(config: MergeConfiguration, method: MergeMethod) -> None:
    """What a merge compares: a base where one is needed, every model once, the same layers of all models."""
    bases = [config.base_model, *(part.base_model for part in output_slices(config))]
    if method.spec.contract.base == BasePolicy.REQUIRED and not any(bases):
        raise ParameterError(f"{method.spec.name} needs base_model: the model that all others were fine-tuned from")
    for models in input_lists(config):
        names = [str(item.model) for item in models]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ParameterError(f'"{twice[0]}" is named twice; name every model once, and use its weight')
    for part in output_slices(config) if isinstance(method, BasisMerge) else []:
        ranges = sorted({tuple(source.layer_range) for source in part.sources})
        if len(ranges) > 1:
            raise ParameterError(
                f"{method.spec.name} compares the same layers of all models; one slice has layer_range "
                + " and ".join(str(list(layers)) for layers in ranges)
            )


def _open(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """The model, for ``model+adapter`` the model below the adapter."""
    path = locate(reference.model.path, reference.model.revision, options.transformers_cache)
    checkpoint = Checkpoint.open(path, label=str(reference.model))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f'"{reference.model}": has no config.json, which tells mergekit the architecture; copy it from the model '
            "that this one was fine-tuned from, or merge plain weight files with mergekit-pytorch"
        )
    if checkpoint.quantised:
        name, weight = next(iter(checkpoint.quantised.items()))
        raise CheckpointError(
            f'"{reference.model}": {len(checkpoint.quantised)} weights are quantised (first: {name}, {weight.format}), '
            "and mergekit takes the codes for numbers; `tvbases merge` reads the numbers that they stand for"
        )
    if reference.lora is not None:
        if not options.lora_merge_cache:
            raise ParameterError(
                f'"{reference}": mergekit keeps the merged model in a directory of your choice; '
                "add --lora-merge-cache DIR to the command"
            )
        if not (_adapter(reference.lora, options) / "adapter_config.json").is_file():
            raise CheckpointError(f'"{reference.lora}": not a PEFT adapter: it has no adapter_config.json')
    return checkpoint


def _adapter(reference: ModelPath, options: MergeOptions) -> Path:
    return locate(reference.path, reference.revision, options.transformers_cache)


def _weights(reference: ModelReference, model: Checkpoint, options: MergeOptions) -> list[Path]:
    """The files that mergekit reads, those of the adapter included."""
    assert model.path is not None
    files, _ = weight_files(model.path, model.label)
    return [*files, *([] if reference.lora is None else _adapter(reference.lora, options).glob("adapter_model.*"))]


def check_distinct(places: Mapping[ModelReference, tuple[Path | None, Any]], out: Path) -> None:
    """A model (a path, and what is added to it) under two spellings would be merged twice; the output must be none."""
    seen: dict[Any, ModelReference] = {}
    for reference, (path, addition) in places.items():
        assert path is not None
        place = path.resolve()
        place = place.parent if place.name in WEIGHT_FILES and place.is_file() else place  # the file, for its folder
        if place == home_path(out).resolve():
            raise OutputError(f'"{out}" is one of the models of this merge; write the result to another directory')
        other = seen.setdefault((place, addition), reference)
        if other != reference:
            raise ParameterError(
                f'"{other}" and "{reference}" are the same model; write it in one way and name it once'
            )


def _check_fit(
    config: MergeConfiguration, method: MergeMethod, opened: Mapping[ModelReference, Checkpoint], options: MergeOptions
) -> None:
    """Every model has the base's architecture and shapes, unless mergekit is told to align or to mix them."""
    tuned = {str(ref): checkpoint for ref, checkpoint in opened.items() if ref != config.base_model}
    base = opened.get(config.base_model) if config.base_model else None
    mixed = options.allow_crimes and not isinstance(method, BasisMerge)
    if base is not None and tuned and config.models and not mixed:
        aligned = bool(config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings)
        Vectors.of_models(base, tuned, skip_mismatched=aligned)


def _plan(config: MergeConfiguration, options: MergeOptions) -> list[ExecuteMergeMethodTask]:
    """mergekit's own plan, one task per tensor with its parameters resolved. Reads configurations and headers only.

    Models with adapters are merged into --lora-merge-cache, where the merge itself will find them.
    """
    config = config.model_copy(deep=True)  # planning rewrites it
    try:
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options)
        out_config = _model_out_config(config, architecture, options.trust_remote_code)
        planned = MergePlanner(config, architecture, options, out_config).plan_to_disk("")
    except TvbasesError:
        raise
    except Exception as error:  # whatever mergekit, transformers or pydantic say to this configuration
        # What mergekit does not know of a model's class. Of its weights nothing need be known.
        unknown = isinstance(error, NotImplementedError) or "no attribute" in str(error)
        way = "; `tvbases merge` takes the same YAML" if unknown else ""
        raise ParameterError(f"mergekit cannot plan this merge: {one_line(error)}{way}") from error
    merges = [task.tensor_task for task in planned if isinstance(task, SaveTensor)]
    return [merge for merge in merges if isinstance(merge, ExecuteMergeMethodTask)]


def _check_whole(
    config: MergeConfiguration,
    tasks: list[ExecuteMergeMethodTask],
    opened: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> None:
    """Whatever the layers that slices take of it, mergekit has to know all tensors of the model."""
    from .complete import check_complete  # loads transformers' code of models

    reference, base = _first(config, opened)
    if output_slices(config):
        whole = {"merge_method": "passthrough", "models": [{"model": reference}]}
        tasks = _plan(MergeConfiguration.model_validate(whole), options)
    check_complete(base, [task.output_weight for task in tasks])


def _first(
    config: MergeConfiguration, opened: Mapping[ModelReference, Checkpoint]
) -> tuple[ModelReference, Checkpoint]:
    """The base; of a merge without base the first model, which mergekit takes the configuration from."""
    reference = config.base_model or next(iter(opened))
    return reference, opened[reference]


def _side_files(config: MergeConfiguration, options: MergeOptions) -> dict[str, Path]:
    """What lies beside the weights of the model that mergekit copies from. CheckpointError for a link out of it."""
    model = all_models(config)[0].model
    return side_files(locate(model.path, model.revision, options.transformers_cache))


def side_files_left_out(config: MergeConfiguration, options: MergeOptions, written: Path) -> dict[str, Path]:
    """What mergekit does not copy: code, processors, folders of sentence-transformers, more chat templates, terms.

    Of the tokenizer it writes what it knows; where the YAML makes another, nothing that numbers tokens is taken.
    """
    made = bool(config.tokenizer or config.tokenizer_source)
    files = _side_files(config, options)
    left = {name: file for name, file in files.items() if not is_tokenizer_file(name) and not (written / name).exists()}
    if made or config.chat_template:
        left = {name: file for name, file in left.items() if not is_chat_template(name)}
    return {name: file for name, file in left.items() if not (made and name == "generation_config.json")}


def _bound(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """The parameters as the method will get them: one value, or one per model."""
    bound: dict[str, Any] = dict(task.parameters.items())
    for model, values in task.input_parameters.items():
        for name, value in values.items():
            bound.setdefault(name, {})[model] = value
    return bound


def check_together(method: MergeMethod, parameters: Mapping[str, Any]) -> None:
    """Parameters of mergekit's own methods, of one tensor, that are fine each and not with one another.

    Raises ParameterError for a mean whose weights cancel, and for chances of DELLA that are none.
    """
    weights = [weight for weight in dict(parameters.get("weight") or {}).values() if weight is not None]
    if method.spec.name == "linear":
        base_share(weights, parameters["normalize"])
    if method.spec.name == "multislerp" and parameters["normalize_weights"] and abs(sum(weights)) < NO_SUM:
        raise ParameterError(
            f"the weights of multislerp sum to {sum(weights):g}, and it divides by their sum; set normalize_weights: "
            "false, or choose weights that do not cancel"
        )
    for model, epsilon in dict(parameters["epsilon"]).items() if method.spec.name in DELLA else ():
        density = parameters["density"][model]
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise ParameterError(
                f"{method.spec.name} keeps entries with chances from density - epsilon to density + epsilon, here "
                f"{density - epsilon:g} to {density + epsilon:g}; choose them so that both are between 0 and 1"
            )


def check_basis_parameters(method: BasisMerge, bound: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parameters, resolved by tensor, with which some tensor's merge would fail or mean something else."""
    weighted: dict[bool, str] = {}
    for tensor, parameters in bound.items():
        weights = parameters["weight"].values()
        method.check(parameters, len(weights))
        weighted[any(value is not None for value in weights)] = tensor
    if len(weighted) > 1:
        raise ParameterError(
            f"weight applies to some tensors ({weighted[True]}) and not to others ({weighted[False]}), where the bases "
            "would be added up instead; end its list with an entry without filter, for example `- value: 1.0`"
        )


def _output_bytes(config: MergeConfiguration, opened: Mapping[ModelReference, Checkpoint]) -> int:
    _, model = _first(config, opened)
    wide = DTYPE_BYTES.get(config.out_dtype or config.dtype or "")
    return sum(info.numel * (wide or info.dtype.itemsize) for info in model.tensors.values())
