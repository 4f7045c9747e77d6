"""Names that become paths: what is refused, by the one check and by the commands that use it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from commands.command_line import inputs, refused, root, tvbases
from tvbases_hf.errors import CheckpointError, OutputError, ParameterError
from tvbases_hf.merging.components import write_components
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.file_names import LONGEST, check_name, check_names
from tvbases_hf.storage.output import check_output, check_output_file
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]
WRONG = {
    "": "empty",
    " ": "empty",
    ".": "another directory",
    "..": "another directory",
    "../..": "/ in it",
    "../../evil": "/ in it",
    "/etc/passwd": "/ in it",
    "a/b": "/ in it",
    "a\\b": "\\ in it",
    "c:evil": ": in it",
    "what?": "? in it",
    "a\0b": "cannot be seen",
    "a\nb": "cannot be seen",
    "\x1b[2J": "cannot be seen",
    "a\u202eb": "cannot be seen",
    "\udcff": "cannot be seen",
    "x" * 300: "300 bytes",
    "数" * 100: "300 bytes",
    "CON": "device",
    "nul.txt": "device",
    "Com1": "device",
    "a.": "ends with a dot",
    "a ": "begins or ends with a space",
}


@pytest.mark.parametrize("name", WRONG, ids=ascii)
def test_a_name_that_is_no_file_of_its_own_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ParameterError, match=r"^task .* cannot be the name of a file: ") as caught:
        check_name(name, "task")
    assert WRONG[name] in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["math", "math[v1]", "v1.5", ".hidden", "数学", "a b", "console", "x" * LONGEST, "-o"])
def test_a_name_that_is_a_file_everywhere_is_kept(name: str, tmp_path: Path) -> None:
    assert check_name(name, "task") == name
    (tmp_path / name).touch()
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("one", "other"), [("Math", "math"), ("\u00e9", "e\u0301"), ("STRASSE", "straße")])
def test_two_names_that_some_file_system_takes_for_one_are_refused(one: str, other: str) -> None:
    check_names([one, "between"], "task")
    with pytest.raises(ParameterError, match=re.escape(f'"{one}" and "{other}" would be one file')):
        check_names([one, "between", other], "task")


@pytest.mark.parametrize("name", ["../../../escaped", "../../evil", ".", "..", "math/b", "x" * 300, "aux"])
def test_no_task_is_written_outside_the_output(name: str, pair: Family) -> None:
    """On disk beside, above or in place of another's; the message comes before anything is read."""
    given = ["--task", f"math={pair.tasks['math']}", "--task", f"{name}={pair.tasks['code']}"]
    message = refused(root(pair), "decompose", "--base", pair.base, *given, "--out", root(pair) / "parts")
    assert "cannot be the name of a file" in message


def test_python_is_told_the_same(pair: Family) -> None:
    models = {"a\0b": pair.tasks["math"], "code": pair.tasks["code"]}
    with pytest.raises(ParameterError, match="cannot be the name of a file"):
        write_components(Vectors.open(pair.base, models), Options(), root(pair) / "parts")
    assert not (root(pair) / "parts").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x07", "a\u202eb", "a\x9b"], ids=ascii)
def test_a_task_with_characters_that_nobody_can_see_is_refused_by_every_command(name: str, pair: Family) -> None:
    message = refused(root(pair), "inspect", *inputs(pair), "--task", f"{name}={pair.tasks['code']}")
    assert "characters that cannot be seen" in message and message.isprintable()


@pytest.mark.parametrize("shard", ["..", "../model.safetensors", "", "x" * 300, "a\0.safetensors", 7, None], ids=ascii)
def test_a_shard_is_a_file_beside_its_index(shard: object, tmp_path: Path) -> None:
    index = {"weight_map": {"x": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a shard index") as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x" * 300 + "/out"], ids=["long", "NUL", "below a long one"])
def test_an_output_whose_name_no_system_takes_is_refused(name: str, tmp_path: Path) -> None:
    for check in (check_output, check_output_file):
        with pytest.raises(OutputError) as caught:
            check(tmp_path / name, lambda _: True)
        assert "cannot be" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_same_from_the_command_line(pair: Family) -> None:
    long = root(pair) / ("x" * 300)
    for more in (["decompose", *inputs(pair), "--out", long], ["inspect", *inputs(pair), "--json", long]):
        assert "cannot be written" in refused(root(pair), *more)


def test_the_names_that_are_left_still_work(pair: Family) -> None:
    given = ["--task", f"math[v1]={pair.tasks['math']}", "--task", f"数 学={pair.tasks['code']}"]
    done = tvbases("decompose", "--base", pair.base, *given, "--out", root(pair) / "parts")
    assert done.code == 0 and "math[v1]" in done.out and "数 学" in done.out
    assert {file.name for file in (root(pair) / "parts" / "unique").iterdir()} == {"math[v1]", "数 学"}
    assert torch.isfinite(Checkpoint.open(root(pair) / "parts" / "unique" / "math[v1]").read("lm_head.weight")).all()
