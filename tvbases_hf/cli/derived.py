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

    def common(self) -> Mapping[str, Mapping[str, Any]]:
        """The same by what they are of, where it is no method: any method may be given them."""
        return {}

    method_help = "How it is made."

    @cached_property
    def derived(self) -> list[Any]:
        methods = self.methods()
        known = {**methods, **self.common()}
        parameters = [_parameter("method", Literal[tuple(methods)], self.method_help)]
        for name in dict.fromkeys(name for options in known.values() for name in options):
            of = {method: options[name] for method, options in known.items() if name in options}
            parameters.append(_parameter(name, *_declared(of)))
        holder = typer.Typer(add_completion=False)
        holder.command(add_help_option=False)(_function(parameters))
        return list(typer.main.get_command(holder).params)

    def get_params(self, ctx: Any) -> list[Any]:
        *own, last = super().get_params(ctx)  # --help is the last one
        return [*own, *self.derived, last]


def given(context: typer.Context) -> dict[str, Any]:
    """The derived options that were set, by their names in the library; ``method`` is one of them.

    Raises ParameterError for an option of another method than the one that was chosen.
    """
    command, found = context.command, dict(context.meta.get(KEY, {}))
    assert isinstance(command, DerivedCommand)
    methods, common = command.methods(), command.common()
    for name in (name for name in found if name != "method"):
        of = [other for other, known in methods.items() if name in known]
        if found.get("method", "ae") not in of and not any(name in known for known in common.values()):
            flag = WRITTEN.get(name, ("--" + name.replace("_", "-"), ""))[0]
            raise ParameterError(f"{flag} goes with --method {' or '.join(of)}; add that, or leave {flag} out")
    return found


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
    """The type on the command line, and ``ae: ..., default: ...; cluster: ...``, the same words said once."""
    said: dict[str, list[str]] = {}
    for method, option in of.items():
        said.setdefault(f"{option.help}, default: {_shown(option.default)}", []).append(method)
    help = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in said.items())
    kind = next(iter(of.values())).kinds[0]
    if get_origin(kind) is Literal:
        kind = Literal[tuple(dict.fromkeys(word for option in of.values() for word in option.choices))]
    elif get_args(kind):  # a number for each task
        kind = list[str]
    return kind, f"{help}."


def _shown(default: Any) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return "yes" if default else "no"
        case _:
            return f"{default}"
