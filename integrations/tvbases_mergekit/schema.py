"""The JSON schema of a merge's YAML, for editors: mergekit's own keys, and the parameters of every method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MISSING, MergeMethod, ParameterSpec
from mergekit.merge_methods.registry import registered_methods
from pydantic import TypeAdapter

from tvbases_hf.options import Option

from . import register
from .configuration import DTYPE_BYTES
from .constructions import yaml_options
from .methods import OVER, BasisMerge
from .registered import RegisteredMerge

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Models are written as one word, org/name@revision+adapter, or in parts.
WORD = {"type": "string"}


def yaml_schema() -> dict[str, Any]:
    """What ``tvbases mergekit-yaml`` and ``tvbases merge`` accept, as far as a schema can say it."""
    register()
    methods = sorted(registered_methods(), key=lambda method: method.spec.name)
    schema = MergeConfiguration.model_json_schema()
    parts = schema["$defs"]
    parts["ModelReference"] = {"anyOf": [WORD, parts["ModelReference"]]}
    parts["ModelPath"] = {"anyOf": [WORD, parts["ModelPath"]]}
    keys = schema["properties"]
    keys["merge_method"] = {"enum": [method.spec.name for method in methods]}
    for name in ("dtype", "out_dtype"):
        keys[name] = {"enum": [*DTYPE_BYTES, None]}
    return {"$schema": DIALECT, **schema, "additionalProperties": False, "allOf": [_rule(m) for m in methods]}


def _rule(method: MergeMethod) -> dict[str, Any]:
    """The parameters where the method is this one, of the whole merge and of one model."""
    options = options_of(method)
    whole = _settings(method.spec.parameters, options)
    models = _settings(method.spec.input_parameters, options)
    about = {"title": method.spec.pretty_name, "description": method.spec.reference_url}
    return {
        "if": {"properties": {"merge_method": {"const": method.spec.name}}, "required": ["merge_method"]},
        "then": {
            **{key: text for key, text in about.items() if text},
            "properties": {"parameters": whole, "models": {"items": {"properties": {"parameters": models}}}},
        },
    }


def options_of(method: MergeMethod) -> dict[str, Option]:
    """By parameter: what our own methods say of it beyond its type."""
    if isinstance(method, RegisteredMerge):
        return dict(method.method.options)
    if isinstance(method, BasisMerge):
        return {**yaml_options(method.bases), OVER.name: OVER}
    return {}


def _settings(specs: Iterable[ParameterSpec], options: dict[str, Option]) -> dict[str, Any]:
    settings = {spec.name: _setting(spec, options) for spec in specs}
    return {"type": ["object", "null"], "properties": settings, "additionalProperties": False}


def _setting(spec: ParameterSpec, options: dict[str, Option]) -> dict[str, Any]:
    """One value; a list, which runs through the layers; or values for the tensors that match filters."""
    value = options[spec.name].schema() if spec.name in options else _plain(spec)
    about = {key: value.pop(key) for key in ("description", "default") if key in value}
    several = {"type": "array", "items": value}
    filtered = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": {"anyOf": [value, several]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {**about, "anyOf": [value, several, filtered, {"type": "array", "items": filtered}]}


def _plain(spec: ParameterSpec) -> dict[str, Any]:
    known: Iterable[tuple[str, Any]] = (("description", spec.description), ("default", spec.default))
    given = {key: value for key, value in known if value is not None and value is not MISSING}
    return {**TypeAdapter(spec.value_type).json_schema(), **given}
