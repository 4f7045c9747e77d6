"""The house: an import goes to a lower floor or stays in its room, none closes a circle, no integration below cli/.

The floors are those of the table in CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from imports import circles, floors, imports, modules, room, upward

ROOT = Path(__file__).parents[1]
FLOORS = floors(ROOT / "CONTRIBUTING.md")


def test_every_room_is_in_the_table_of_contributing() -> None:
    assert {room(module) for module in modules(ROOT)} == set(FLOORS)


def test_no_import_runs_upward_or_into_another_integration() -> None:
    assert upward(imports(ROOT), FLOORS) == []


def test_no_circle() -> None:
    assert circles(imports(ROOT)) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("tvbases_hf", "integrations"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def plant(root: Path, file: str, line: str) -> str:
    """Add a line at the end of a file; returns where it is."""
    path = root / file
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}{line}\n", encoding="utf-8")
    return f"{file}:{len(text.splitlines()) + line.count(chr(10)) + 1}"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("tvbases_hf/algebra/svd.py", "from ..models.gram import Gram"),
        ("tvbases_hf/methods/tsv.py", "def lazy() -> None:\n    from tvbases_hf.basis import Basis"),
        ("tvbases_hf/models/gram.py", "import tvbases_hf.cli.app"),
        ("tvbases_hf/bases/ae.py", "from ..methods import tsv"),
        ("tvbases_hf/basis/basis.py", "import tvbases_peft"),
        ("tvbases_hf/theory/bounds.py", "if TYPE_CHECKING:\n    from tvbases_mergekit import register"),
        ("tvbases_hf/basis/lora.py", 'import_module("tvbases_peft")'),
        ("integrations/tvbases_peft/combine.py", "from tvbases_mergekit import register"),
        ("integrations/tvbases_mergekit/native.py", "from tvbases_hf.cli.app import app"),
    ],
)
def test_a_planted_import_is_named_with_file_and_line(copy: Path, file: str, line: str) -> None:
    place = plant(copy, file, line)
    (found,) = upward(imports(copy), FLOORS)
    assert found.startswith(place)


def test_a_planted_circle_is_named_with_file_and_line(copy: Path) -> None:
    place = plant(copy, "tvbases_hf/algebra/linalg.py", "from .svd import svd")
    (found,) = circles(imports(copy))
    assert found.startswith(("tvbases_hf/algebra/", place)) and "tvbases_hf.algebra.svd" in found


KIND = re.compile(r"\b(isinstance\(.*|case )\b(Dense|LowRank|Dora|Stacked)\b")


def test_the_kinds_of_a_change_are_told_apart_in_one_place() -> None:
    """Elsewhere a change is asked for what it has (``low``, ``factors``, ...); a few need stored differences."""
    files = [file for root in ("tvbases_hf", "integrations") for file in sorted((ROOT / root).rglob("*.py"))]
    found = {
        file.relative_to(ROOT).as_posix(): len(lines)
        for file in files
        if (lines := [line for line in file.read_text("utf-8").splitlines() if KIND.search(line)])
    }
    assert found.pop("tvbases_hf/algebra/delta.py")
    assert sum(found.values()) <= 12, found


def test_no_file_of_the_library_is_long() -> None:
    files = [file for root in ("tvbases_hf", "integrations") for file in (ROOT / root).rglob("*.py")]
    assert [file.name for file in files if len(file.read_text("utf-8").splitlines()) > 400] == []
