"""The public names: what README, guides and examples show can be had from ``tvbases_hf``, and nothing else is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tvbases_hf

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "examples" / "guides").glob("*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "examples").glob("*.py"))}
BLOCKS = {
    f"{name} block {i}": block
    for name, page in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
}
SHOWN = {**EXAMPLES, **BLOCKS}


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of every ``from tvbases_hf... import name``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tvbases_hf":
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("source", [source for source in SHOWN if not source.startswith("add_a_method")])
def test_what_is_shown_comes_from_the_package_itself(source: str) -> None:
    found = list(imports(SHOWN[source]))
    ours = [pair for pair in found if pair != ("tvbases_hf.basis", "libraries")]  # a module, with what its commands do
    assert all(module == "tvbases_hf" and name in tvbases_hf.__all__ for module, name in ours), found


def test_the_package_holds_nothing_that_is_not_shown() -> None:
    imported = {name for source in SHOWN.values() for _, name in imports(source)}
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", " ".join(PAGES.values())))))
    assert set(tvbases_hf.__all__) - imported - told == set()


def test_type_checkers_see_the_same_names_from_the_same_homes() -> None:
    tree = ast.parse(Path(tvbases_hf.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == tvbases_hf._HOME


@pytest.mark.parametrize("name", tvbases_hf.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(tvbases_hf, name) is not None and name in dir(tvbases_hf)


def test_names_are_loaded_when_they_are_used() -> None:
    light = "import sys, tvbases_hf, tvbases_hf.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{light}; from tvbases_hf import *; Basis"], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Bases'"):
        _ = tvbases_hf.Bases  # type: ignore[attr-defined]
