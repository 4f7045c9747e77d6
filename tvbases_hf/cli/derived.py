"""Options that a command has because a registry declares them: added when it is parsed, or its help is shown.

``tvbases --help`` so imports no registry, and a new construction has its options on the command line.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from ..errors import ParameterError

KEY = "tvbases.options"
# By the option of the library: what it is called here, and how it is written.
WRITTEN: dict[str, tuple[str, str]] = {"target_weights": ("--weight", "NAME=NUMBER")}


class DerivedCommand(TyperCommand):
    """A command with more options than its function has parameters; ``given`` is what was said of them."""

    @abstractmethod
    def methods(self) -> Mapping[str, Mapping[str, Any]]:
        """The options.Option of every method, by name."""

    method_help = "How it is made."

    @cached_property
    def derived(self) -> list[Any]:
        methods = self.methods()
        names = dict.fromkeys(name for options in methods.values() for name in options)
        parameters = [_parameter("method", Literal[tuple(methods)], self.method_help)]
        parameters += [
            _parameter(name, *_declared({method: found[name] for method, found in methods.items() if name in found}))
            for name in names
        ]
        holder = typer.Typer(add_completion=False)
        holder.command(add_help_option=False)(_function(parameters))
        return list(typer.main.get_command(holder).params)

    def get_params(self, ctx: Any) -> list[Any]:
        *own, last = super().get_params(ctx)  # --help is the last one
        return [*own, *self.derived, last]


def given(context: typer.Context) -> dict[str, Any]:
    """The derived options that were set, by their names in the library; ``method`` is one of them."""
    return dict(context.meta.get(KEY, {}))


def check_method(method: str | None, options: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """ParameterError for an option of another method than the one that was chosen."""
    for name in options:
        of = [other for other, known in methods.items() if name in known]
        if (method or "ae") not in of:
            flag = WRITTEN.get(name, ("--" + name.replace("_", "-"), ""))[0]
            raise ParameterError(f"{flag} is of --method {' or '.join(of)}; add it, or leave {flag} out")


def _function(parameters: Sequence[inspect.Parameter]) -> Any:
    """What typer reads options from: a function with these parameters."""

    def options(**values: Any) -> None: ...

    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return options


def _parameter(name: str, kind: Any, help: str) -> inspect.Parameter:
    flag, metavar = WRITTEN.get(name, (None, None))

    def keep(context: typer.Context, value: Any) -> Any:
        if value is not None and value != []:
            context.meta.setdefault(KEY, {})[name] = value
        return value

    words = f"--{name.replace('_', '-')}"
    flags = [flag or (f"{words}/--no-{words[2:]}" if kind is bool else words)]
    option = typer.Option(*flags, help=help, metavar=metavar, callback=keep, expose_value=False)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _declared(of: Mapping[str, Any]) -> tuple[Any, str]:
    """The type on the command line, and ``ae: ...; cluster: ... default: ...``, the same words said once."""
    first = next(iter(of.values()))
    said: dict[str, list[str]] = {}
    for method, option in of.items():
        said.setdefault(option.help, []).append(method)
    help = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in said.items())
    defaults = dict.fromkeys(_shown(option.default) for option in of.values())
    kind = first.kinds[0]
    if get_origin(kind) is Literal:
        words = dict.fromkeys(word for option in of.values() for word in option.choices)
        kind = Literal[tuple(words)]
    elif get_origin(kind) is not None and get_args(kind):  # a number for each task
        kind = list[str]
    return kind, f"{help}; default: {' or '.join(defaults)}."


def _shown(default: Any) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return "yes" if default else "no"
        case _:
            return f"{default}"
