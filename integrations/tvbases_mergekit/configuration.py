"""The YAML file of a merge: every word in it must mean something to mergekit and to the merge method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import MergeMethod, ParameterScope, ParameterSpec
from pydantic import BaseModel, ValidationError

from tvbases_hf.errors import ParameterError, did_you_mean

from .yaml_files import load_yaml

# What each part of the file is made of; mergekit ignores every key that its part does not have.
PARTS: dict[type[BaseModel], dict[str, type[BaseModel]]] = {
    MergeConfiguration: {
        "models": InputModelDefinition,
        "slices": OutputSliceDefinition,
        "modules": OutputModuleDefinition,
    },
    OutputModuleDefinition: {"models": InputModelDefinition, "slices": OutputSliceDefinition},
    OutputSliceDefinition: {"sources": InputSliceDefinition},
}
FILTERED = ConditionalParameter.model_fields.keys()
# Of mergekit's own methods, what a parameter may be: it would end in a traceback otherwise, or in another merge.
SHARES = {
    "density": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "select_topk": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "gamma": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "epsilon": (lambda x: x >= 0, "at least 0"),
}
# More numbers than any model has layers.
LONGEST_GRADIENT = 1000
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def read_config(file: Path) -> MergeConfiguration:
    """The YAML as mergekit's own configuration.

    Raises ParameterError for anything that is not one, and for what mergekit would silently ignore: names that the
    method does not know (with the nearest that it knows), or that stand in the wrong place.
    """
    if not file.is_file():
        raise ParameterError(f'"{file}": no such file; give a mergekit YAML')
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise ParameterError(f'"{file}" is not a mergekit configuration: it needs merge_method and models')
    try:
        config = MergeConfiguration.model_validate(content)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise ParameterError(f'"{file}" is not a mergekit configuration: {"; ".join(reasons[:3])}') from error
    except Exception as error:  # of mergekit's own readers, for example of a model's name
        raise ParameterError(f'"{file}" is not a mergekit configuration: {one_line(error)}') from error
    method = find_method(config.merge_method)
    _check_keys(content, MergeConfiguration, [spec.name for spec in method.spec.parameters], f'"{file}"')
    for where, parameters, of_model in _parameter_blocks(config):
        _check_parameters(where, parameters, of_model, method)
    for name in (config.dtype, config.out_dtype):
        _check_dtype(name)
    return config


def find_method(name: str) -> MergeMethod:
    """The registered method; ParameterError with the nearest known name."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    if name not in known:
        raise ParameterError(
            f"unknown merge_method {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]


def _check_keys(part: Mapping[str, Any], schema: type[BaseModel], parameters: Sequence[str], where: str) -> None:
    """Refuse keys that mergekit would ignore: misspelt ones, and parameters that do not stand under ``parameters``."""
    for key in part:
        if key in schema.model_fields:
            continue
        if key in parameters:
            raise ParameterError(
                f"{where}: {key} is a parameter, and mergekit would ignore it here; put it under parameters:"
            )
        close = did_you_mean(str(key), schema.model_fields, cutoff=0.8)
        if close or schema is not MergeConfiguration:  # at the top, other programs have keys of their own
            raise ParameterError(f"{where}: mergekit would ignore the unknown key {key!r}{close}")
    for name, setting in (part.get("parameters") or {}).items():
        _check_filters(setting, f"{where}, {name}")
    for key, inner in PARTS.get(schema, {}).items():
        children = part.get(key) or []
        named = children.items() if isinstance(children, Mapping) else enumerate(children)
        for index, child in named:
            _check_keys(child, inner, parameters, f"{where}, {key}[{index}]")


def _check_filters(setting: Any, where: str) -> None:
    """Refuse what mergekit would ignore beside a value and its filter: the value would hold everywhere."""
    for entry in setting if isinstance(setting, list) else [setting]:
        odd = [str(key) for key in entry if key not in FILTERED] if isinstance(entry, Mapping) else []
        if odd:
            near = did_you_mean(odd[0], FILTERED)
            raise ParameterError(f"{where}: a value has no {odd[0]!r}{near}; it is {{filter: NAME, value: ...}}")


def _parameter_blocks(config: MergeConfiguration) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Every ``parameters:`` of the file: where it stands, what it holds, and whether it belongs to one model."""
    yield "parameters", config.parameters or {}, False
    for models in input_lists(config):
        for item in models:
            yield f'parameters of "{item.model}"', item.parameters or {}, True
    for part in (*output_slices(config), *(config.modules or {}).values()):
        yield "parameters of a slice or module", part.parameters or {}, False


def output_slices(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    modules = (config.modules or {}).values()
    return [*(config.slices or []), *(part for module in modules for part in module.slices or [])]


def input_lists(config: MergeConfiguration) -> list[Sequence[InputModelDefinition | InputSliceDefinition]]:
    """The models that are merged with one another: one list per output slice or module."""
    modules = [module.models for module in (config.modules or {}).values() if module.models]
    return [*([config.models] if config.models else []), *modules, *(part.sources for part in output_slices(config))]


def all_models(config: MergeConfiguration) -> list[ModelReference]:
    """All models, the base first and the others in the order of the file."""
    listed = [item.model for models in input_lists(config) for item in models]
    bases = [config.base_model, *(part.base_model for part in output_slices(config))]
    return list(dict.fromkeys([*(ref for ref in bases if ref is not None), *listed]))


def _check_parameters(where: str, parameters: Mapping[str, Any], of_model: bool, method: MergeMethod) -> None:
    specs = {spec.name: spec for spec in method.spec.parameters}
    for name, setting in parameters.items():
        if name not in specs:
            near = did_you_mean(name, specs)
            takes = "" if near else f". It takes {', '.join(specs) or 'none'}"
            raise ParameterError(
                f"{where}: {method.spec.name} has no parameter {name!r}{near}, and mergekit would ignore it{takes}"
            )
        if of_model and specs[name].scope == ParameterScope.SHARED:
            raise ParameterError(
                f"{where}: {name} is one value for the whole merge, and mergekit would ignore it here; "
                "move it to the top-level parameters"
            )
        _check_value(where, specs[name], setting)


def _check_value(where: str, spec: ParameterSpec, setting: Any) -> None:
    """Every value of a setting: a number or word, a list (gradient or filters), or a filter's value."""
    if isinstance(setting, list):
        if len(setting) > LONGEST_GRADIENT:
            raise ParameterError(
                f"{where}: {spec.name} is a list of {len(setting)} values, more than any model has layers "
                f"({LONGEST_GRADIENT} are the most)"
            )
        for part in setting:
            _check_value(where, spec, part)
        return
    value = setting.value if isinstance(setting, ConditionalParameter) else setting
    if isinstance(value, list):
        return _check_value(where, spec, value)
    kinds = get_args(spec.value_type) or (spec.value_type,)
    if isinstance(value, bool) and bool not in kinds:
        raise ParameterError(f"{where}: {spec.name} is {str(value).lower()}, where a number or a word is needed")
    try:
        number = spec.validate(value)
    except ValidationError as error:
        raise ParameterError(f"{where}: {spec.name}: {error.errors()[0]['msg']} (got {value!r})") from error
    if isinstance(number, float) and not math.isfinite(number):
        raise ParameterError(f"{where}: {spec.name} is {number}; give a finite number")
    fits, bounds = SHARES.get(spec.name, (None, ""))
    if fits is not None and isinstance(number, float) and not fits(number):
        raise ParameterError(f"{where}: {spec.name} is {number:g}; give a number {bounds}")


def _check_dtype(name: str | None) -> None:
    try:
        dtype_from_name(name)
    except RuntimeError as error:
        raise ParameterError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPE_BYTES)}") from error


# Of what another library says, such as a whole configuration.
LONGEST = 400


def one_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{e['msg']} (got {e['input']!r})" for e in error.errors()[:3])
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
