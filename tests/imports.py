"""Which module of this project imports which, read from the source: annotations and lazy imports too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LIBRARY, INTEGRATION = "tvbases_hf", "tvbases_*"


@dataclass(frozen=True)
class Import:
    """``file:line`` of ``source`` imports ``target``; both are full module names."""

    source: str
    target: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target}"


def modules(root: Path) -> dict[str, Path]:
    """Full name of every module of the library and the integrations, and its file."""
    found = {}
    for start in (root / LIBRARY, *sorted((root / "integrations").glob(INTEGRATION))):
        for file in sorted(start.rglob("*.py")):
            parts = file.relative_to(start.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(root: Path) -> list[Import]:
    """Every import of one of our modules by another of them."""
    known = modules(root)
    return [
        Import(name, target, file.relative_to(root), line)
        for name, file in known.items()
        for target, line in _targets(name, file, known)
        if target != name
    ]


def _targets(name: str, file: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
            case ast.ImportFrom():
                here = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                origin = ".".join([*here, *([node.module] if node.module else [])])
                for alias in node.names:
                    target = f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin
                    if target in known:
                        yield target, node.lineno
            case ast.Call(func=function, args=[ast.Constant(value=str() as text), *_]) if text in known:
                if ast.unparse(function).rpartition(".")[2] in ("import_module", "__import__"):
                    yield text, node.lineno


def room(module: str) -> str:
    """The folder of a module, or the module itself where it lies at the top; ``integrations`` for all of them."""
    top, *rest = module.split(".")
    return "integrations" if top != LIBRARY else rest[0] if rest else LIBRARY


def floors(contributing: Path) -> dict[str, int]:
    """{room: floor} of the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| (\d+) \|([^|]*)\|", contributing.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.rstrip("/"): int(floor) for floor, names in rows for name in re.findall(r"`([^`]+)`", names)}


def upward(found: list[Import], floor: Mapping[str, int]) -> list[str]:
    """Imports that do not go down: to a room as high or higher, or to another integration."""
    wrong = []
    for item in found:
        source, target = room(item.source), room(item.target)
        if source == target == "integrations":
            if item.source.split(".")[0] != item.target.split(".")[0]:
                wrong.append(f"{item}, another integration")
        elif source != target and floor[target] >= floor[source]:
            wrong.append(f"{item}, from floor {floor[source]} to floor {floor[target]}")
    return wrong


def circles(found: list[Import]) -> list[str]:
    """One line per group of modules that import each other, with an import that closes the circle."""
    arrows: dict[str, list[Import]] = {}
    for item in found:
        arrows.setdefault(item.source, []).append(item)
    reach = {name: _reachable(name, arrows) for name in arrows}
    closing = [item for item in found if item.source in reach.get(item.target, set())]
    groups = {frozenset([item.source, *(reach[item.source] & _sources(reach, item.source))]): item for item in closing}
    return [f"{item}, a circle of {', '.join(sorted(group))}" for group, item in groups.items()]


def _reachable(name: str, arrows: Mapping[str, list[Import]]) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for item in arrows.get(waiting.pop(), []):
            if item.target not in seen:
                seen.add(item.target)
                waiting.append(item.target)
    return seen


def _sources(reach: Mapping[str, set[str]], name: str) -> set[str]:
    return {other for other, targets in reach.items() if name in targets}
