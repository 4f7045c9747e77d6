"""Labels: which number each means, of what the model knows, the source says or a file of class names says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from ..storage.files import home_path
from ..storage.json_files import parse_json


@dataclass(frozen=True)
class Classes:
    """``names`` in the order of the labels, ``count`` of them; ``aliases`` {what the source calls one: its name}."""

    names: tuple[str, ...]
    count: int
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def named(cls, names: Sequence[str], aliases: Mapping[str, str] | None = None) -> Classes:
        return cls(tuple(names), len(names), aliases or {})

    @classmethod
    def of_model(cls, config: Any) -> Classes:
        """Those of a classifier's configuration."""
        known = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        return cls(tuple(known[index] for index in sorted(known)), config.num_labels)

    def called(self, names: Sequence[str]) -> Classes:
        """The same, for a source whose labels are numbers of ``names``: where all are known, they tell their class."""
        known = {_plain(name) for name in self.names}
        if not names or not all(_plain(name) in known for name in names):
            return self
        return replace(self, aliases={str(i): name for i, name in enumerate(names)})

    @classmethod
    def read(cls, file: str | Path) -> Classes:
        """A text file of one name per line, a JSON list of names, or a JSON object {folder or label: name}.

        Raises ParameterError for a file that is none of these, or that says a name twice.
        """
        path = home_path(file)
        try:
            text = path.read_text(encoding="utf-8-sig")
            found = parse_json(text) if path.suffix.lower() == ".json" else _lines(text)
        except (OSError, ValueError) as error:
            raise ParameterError(f'--classes "{file}" cannot be read ({error})') from error
        aliases = {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
        names = list(dict.fromkeys(aliases.values())) if aliases else found
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ParameterError(f'--classes "{file}" holds no names of classes, one a line or a JSON list of them')
        twice = [name for name in names if sum(_plain(name) == _plain(other) for other in names) > 1]
        if twice:
            raise ParameterError(f'--classes "{file}" holds "{twice[0]}" twice; two classes cannot be told apart so')
        return cls.named(names, aliases)

    def numbers(self, name: str, labels: Sequence[Any]) -> list[int]:
        """The number of every label of a task's rows: a name's place, or the number that it is already.

        Raises ParameterError for a label that is neither.
        """
        places = {_plain(known): i for i, known in enumerate(self.names)}
        aliases = {alias: places[_plain(known)] for alias, known in self.aliases.items()}
        return [self._number(name, row, label, places, aliases) for row, label in enumerate(labels, 1)]

    def _number(self, name: str, row: int, label: Any, places: Mapping[str, int], aliases: Mapping[str, int]) -> int:
        found = aliases.get(str(label), label)
        if isinstance(found, str):
            found = places.get(_plain(found), found)
        try:
            index = int(found)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < self.count or (not isinstance(found, str) and index != found):
            raise ParameterError(
                f'the data of "{name}", row {row}: {label!r} is not a label of this model; it knows 0 to '
                f"{self.count - 1} ({_some(self.names) or 'without names'})"
            )
        return index


def prompt_name(label: str) -> str:
    """A folder's name as a text has it: golden_retriever is a golden retriever."""
    return label.replace("_", " ").strip()


def _plain(name: str) -> str:
    return prompt_name(name).casefold()


def _some(names: Sequence[str], shown: int = 10) -> str:
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
