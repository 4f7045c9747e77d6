"""YAML of a merge as its text says it: every key once, and no more than a merge has use for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tvbases_hf.errors import ParameterError

# Bytes of the file; values once every alias has been replaced by what it stands for; mappings and lists in each other.
LARGEST = 200_000
MOST_VALUES = 100_000
DEEPEST = 100
# Characters of one number.
LONGEST_NUMBER = 300
TOO_DEEP = f"it is nested more than {DEEPEST} deep"


class KeysOnce(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping: of two the loaders would silently take the last."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > DEEPEST:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.get_mark())
        return super().add_indent(column)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            word = key.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge") else None
            if word is not None and word in seen:
                raise _error(f"{word} is given twice", key)
            seen.add(word)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > LONGEST_NUMBER:
            raise _error(f"a number of {len(node.value)} digits, more than {LONGEST_NUMBER}", node)
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for kind in ("int", "float"):
    KeysOnce.add_constructor(f"tag:yaml.org,2002:{kind}", KeysOnce.construct_number)


def load_yaml(file: Path) -> Any:
    """The value in a file. ParameterError for text that is not YAML, for several documents, or for too much of it."""
    documents = load_documents(file)
    if len(documents) > 1:
        raise ParameterError(
            f'"{file}" holds {len(documents)} documents, of which this makes one model; add --intermediate-dir DIR to '
            "tvbases merge or mergekit-yaml, where the merges that have a name are written"
        )
    return documents[0] if documents else None


def load_documents(file: Path) -> list[Any]:
    """The values of all documents in a file. ParameterError for text that is not YAML, or more than merges need."""
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise ParameterError(f'"{file}" is not the YAML of a merge: it has {size} bytes, more than {LARGEST}')
        return _load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ParameterError(f'"{file}" is not YAML: {place}{error.problem}') from error
    except RecursionError as error:
        raise ParameterError(f'"{file}" is not YAML: {TOO_DEEP}') from error
    except (OSError, yaml.YAMLError, ValueError, OverflowError) as error:
        raise ParameterError(f'"{file}" is not YAML: {" ".join(str(error).split())}') from error


def _load(text: str) -> list[Any]:
    loader = KeysOnce(text)
    found = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node says so
            _count(node, {}, 1)
            found.append(loader.construct_document(node))
    finally:
        loader.dispose()
    return [value for value in found if value is not None]


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """The values in a node, aliases written out: a few lines of them can stand for more than any memory holds."""
    if id(node) in known:
        if not known[id(node)]:
            raise _error("an alias stands inside of what it stands for", node)
        return known[id(node)]
    if depth > DEEPEST:
        raise _error(TOO_DEEP, node)
    known[id(node)] = 0
    match node:
        case yaml.MappingNode(value=pairs):
            inner = [part for pair in pairs for part in pair]
        case yaml.SequenceNode(value=values):
            inner = values
        case _:
            inner = []
    found = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if found > MOST_VALUES:
        raise _error(f"it holds more than {MOST_VALUES} values", node)
    known[id(node)] = found
    return found


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
