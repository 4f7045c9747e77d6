"""Options declared once, by the signature of the function that takes them.

A keyword-only parameter with a description is an option:

    def ties(deltas, weights, *, density: Annotated[float, Field(gt=0, le=1, description="share ...")] = 0.2): ...

What its annotation says serves the checks of the Python API, mergekit's parameters, ``--help``, the JSON schema of the
YAML and the tables of the guides.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .errors import ParameterError, did_you_mean

BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Option:
    """One option: ``annotation`` with its ``Field``, and ``default``."""

    name: str
    annotation: Any
    default: Any

    @functools.cached_property
    def field(self) -> FieldInfo:
        return FieldInfo.from_annotation(self.annotation)

    @property
    def help(self) -> str:
        return self.field.description or ""

    @property
    def kind(self) -> Any:
        """The plain type: float, bool, ``float | str``, a Literal; None is part of it where it is allowed."""
        return self.field.annotation

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types it may have, without None."""
        return tuple(kind for kind in _members(self.kind) if kind is not NoneType)

    @property
    def may_be_none(self) -> bool:
        return NoneType in _members(self.kind)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be, where only some are known."""
        return tuple(word for kind in self.kinds if get_origin(kind) is Literal for word in get_args(kind))

    @property
    def bounds(self) -> str:
        """``above 0 and at most 1``, empty without bounds."""
        found = {name: getattr(part, name) for part in self.field.metadata for name in BOUNDS if hasattr(part, name)}
        return " and ".join(f"{BOUNDS[name]} {value:g}" for name, value in found.items())

    def check(self, value: Any, of: str) -> Any:
        """The value as it is used. ParameterError, with what is allowed, for one that ``of`` cannot take."""
        if isinstance(value, float) and value.is_integer() and int in self.kinds and float not in self.kinds:
            value = int(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ParameterError(f"{self.name} of {of} {self._rule(value)}; got {value!r}")
        try:
            return self._adapter.validate_python(value, strict=True)
        except ValidationError as error:
            if isinstance(reason := error.errors()[0].get("ctx", {}).get("error"), ParameterError):
                raise reason from None  # a rule of its own has said it better
            raise ParameterError(f"{self.name} of {of} {self._rule(value)}; got {value!r}") from None

    def schema(self) -> dict[str, Any]:
        """As a property of a JSON schema."""
        default = {} if self.default is inspect.Parameter.empty else {"default": self.default}
        return {**self._adapter.json_schema(), "description": self.help, **default}

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation)

    def _rule(self, value: Any) -> str:
        if self.choices:
            return f"must be {' or '.join(self.choices)}{did_you_mean(str(value), self.choices)}"
        words = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
        kind = " or ".join(words.get(kind, str(kind)) for kind in self.kinds)
        return f"({self.help}) must be {kind}" + (f", {self.bounds}" if self.bounds else "")


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, each without what it is annotated with."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(member for part in get_args(kind) for member in _members(part))
    return (kind,)


class Declared(Protocol):
    """What is declared by a function: a merging method, or a construction of bases."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def own_options(self) -> Mapping[str, Option]: ...


def markdown_table(declared: Iterable[Declared], kind: str) -> str:
    """A row for each: its name, what it does, and its options with default and what they may be."""
    rows = [f"| {kind} | what it makes of the vectors | options |", "|---|---|---|"]
    for one in declared:
        options = ", ".join(_told(option) for option in one.own_options.values())
        rows.append(f"| `{one.name}` | {one.summary.rstrip('.')} | {options}{' ' if options else ''}|")
    return "\n".join(rows)


def _told(option: Option) -> str:
    if option.default is None:
        return f"`{option.name}`"
    value = option.default if isinstance(option.default, str) else json.dumps(option.default)
    others = [f"`{word}`" for word in option.choices if word != option.default]
    return f"`{option.name}: {value}`" + (f" (or {', '.join(others)})" if others else "")


@functools.cache
def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """By name, in their order: the keyword-only parameters, or the fields of a dataclass, that have a description."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {
        name: Option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or inspect.isclass(function)
    }
    return {name: option for name, option in found.items() if option.help}


def checked(of: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, each value checked. ParameterError for a name that is no option, with the nearest that is."""
    for name in given:
        if name not in options:
            raise ParameterError(
                f"{name} is no option of {of}{did_you_mean(name, options)}; it has {', '.join(options) or 'none'}"
            )
    return {name: options[name].check(value, of) for name, value in given.items()}
