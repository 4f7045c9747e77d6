"""Several merges in one file, as mergekit-multi has them: one that has a name is a model that the others may name."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from tvbases_hf.errors import ParameterError, TvbasesError
from tvbases_hf.storage.file_names import check_names
from tvbases_hf.storage.files import locate
from tvbases_hf.storage.output import preview

from .configuration import all_models, read_config
from .yaml_files import load_documents

# Where a model is named.
NAMING = ("model", "base_model", "source", "tokenizer_source", "path")
MergeOne = Callable[[Path, Path], "dict[str, Any] | None"]
# What can be known of one document, and of where it is written, without its models; raises TvbasesError.
CheckOne = Callable[[MergeConfiguration, Path], object]


@dataclass(frozen=True)
class Part:
    """One merge: its name, None of the last one, what its document says, and the merges that it names."""

    name: str | None
    content: Mapping[str, Any]
    needs: frozenset[str]


def is_several(file: Path) -> bool:
    return file.is_file() and len(load_documents(file)) > 1


def merge_all(
    file: Path, out: Path, folder: Path, merge_one: MergeOne, check_one: CheckOne, dry_run: bool = False
) -> dict[str, Any] | None:
    """``merge_one(file, out)`` of every document, each after those that it names; the report of the last.

    Merges with a name are written to ``folder`` / NAME, and stay there; the one without is written to ``out``. All
    documents, and that there are the models that they name, are checked before the first is merged. With ``dry_run``
    those that need no other are tried; the report has the others as ``waiting``.

    Raises:
        ParameterError: names that are not file names or are given twice, merges that need each other in a circle, not
            exactly one without a name, outputs inside one another, or whatever is wrong with a document.
        TvbasesError: what a merge is refused for; those that were made before it stay in ``folder``.
    """
    parts = _ordered(file, load_documents(file))
    places = {part.name: out if part.name is None else folder / part.name for part in parts}
    _check_apart(places)
    report: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        files = {part.name: Path(scratch) / f"{index}.yml" for index, part in enumerate(parts)}
        made = {name: str(place) for name, place in places.items() if name is not None}
        for part in parts:
            files[part.name].write_text(yaml.safe_dump(_placed(part.content, made), sort_keys=False), "utf-8")
            _run(file, part, files[part.name], lambda one, to=places[part.name]: _check(one, to, made, check_one))
        for part in parts:
            if not (dry_run and part.needs):
                report = _run(file, part, files[part.name], lambda one, to=places[part.name]: merge_one(one, to))
    if not dry_run:
        return report
    return preview(out, None, None) | {"waiting": [_title(part.name) for part in parts if part.needs]}


def _check(one: Path, to: Path, made: Mapping[str, str], check_one: CheckOne) -> None:
    config = read_config(one)
    check_one(config, to)
    for reference in all_models(config):
        for path in (reference.model, reference.lora):
            if path is not None and path.path not in made.values():
                locate(path.path, path.revision)


def _check_apart(places: Mapping[str | None, Path]) -> None:
    """ParameterError where one merge would be written over another one, or into it."""
    for (name, place), (other, inner) in itertools.permutations(places.items(), 2):
        if inner.resolve().is_relative_to(place.resolve()):
            raise ParameterError(
                f'{_title(other)} would be written to "{inner}", inside {_title(name)} at "{place}"; choose an '
                "OUT and an --intermediate-dir that are not inside one another"
            )


def _title(name: str | None) -> str:
    return name or "the merge without a name"


def _run(file: Path, part: Part, one: Path, step: Callable[[Path], Any]) -> Any:
    """A step, whose error names the user's file and the merge in it."""
    try:
        return step(one)
    except TvbasesError as error:
        raise type(error)(str(error).replace(f'"{one}"', f'"{file}" ({_title(part.name)})')) from error


def _ordered(file: Path, documents: Sequence[Any]) -> list[Part]:
    odd = next((index for index, document in enumerate(documents, 1) if not isinstance(document, dict)), None)
    if odd is not None:
        raise ParameterError(f'"{file}": document {odd} is not a mergekit configuration')
    names = [document.get("name") for document in documents]
    named = [name for name in names if name is not None]
    wrong = next((name for name in named if not isinstance(name, str)), None)
    if wrong is not None:
        raise ParameterError(f'"{file}": a merge is named {wrong!r}, which is no word; put it in quotation marks')
    check_names(named, "merge")
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ParameterError(f'"{file}": two merges are named "{twice}"; give each a name of its own')
    if names.count(None) != 1:
        raise ParameterError(
            f'"{file}": {names.count(None)} of {len(names)} merges have no name; exactly one has none, the one that is '
            "written to OUT"
        )
    parts = {}
    for document in documents:
        content = {key: value for key, value in document.items() if key != "name"}
        parts[document.get("name")] = Part(document.get("name"), content, frozenset(_needed(content, set(named))))
    try:
        order = TopologicalSorter({name: part.needs for name, part in parts.items()}).static_order()
        return [parts[name] for name in order]
    except CycleError as error:
        raise ParameterError(
            f'"{file}": merges need each other in a circle: {" -> ".join(map(str, error.args[1]))}'
        ) from error


def _needed(content: Mapping[str, Any], names: set[str]) -> set[str]:
    found: set[str] = set()

    def note(name: str) -> str:
        found.update(names & {name})
        return name

    _visit(content, note)
    return found


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    """The document with the place of every merge for its name."""
    return _visit(value, lambda name: places.get(name, name))


def _visit(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """``value`` with every model in it changed: ``name``, ``name@revision``, ``name+adapter``."""
    if isinstance(value, dict):
        return {inner: _visit(part, change, str(inner)) for inner, part in value.items()}
    if isinstance(value, list):
        return [_visit(part, change, key) for part in value]
    if not isinstance(value, str) or key not in NAMING:
        return value
    try:
        path = ModelReference.model_validate(value).model.path
    except ValueError:
        return value
    return change(path) + value[len(path) :] if value.startswith(path) else value
