"""Ids of the Hub: revisions and folders, adapters on a base, and what of them is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.command_line import refused, tvbases
from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.storage.files import at_revision, locate, without_revision
from zoo.adapter_zoo import make_zoo
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]

Asked = list[tuple[str, "str | None"]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A Hub whose repository owner/name at a revision is hub/owner/name/revision in ``tmp_path``; what it is asked."""
    asked: Asked = []

    def download(repository: str, *, revision: str | None = None, **_: Any) -> str:
        asked.append((repository, revision))
        found = tmp_path / "hub" / repository / (revision or "main")
        if not found.is_dir():
            raise OSError(f"{repository} has no revision {revision}")
        return str(found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("source", "revision", "folder"),
    [
        ("org/model", "main", ""),
        ("org/model@v2", "v2", ""),
        ("org/model@refs/pr/3", "refs/pr/3", ""),
        ("org/model@a/branch", "a/branch", ""),
        ("hf://org/model@v2", "v2", ""),
        ("hf://org/model@v2/inside", "v2", "inside"),
        ("hf://org/model@refs/pr/3/inside/more", "refs/pr/3", "inside/more"),
        ("hf://org/model/inside", "main", "inside"),
    ],
)
def test_an_id_names_a_revision_and_a_folder(
    source: str, revision: str, folder: str, hub: Asked, tmp_path: Path
) -> None:
    place = tmp_path / "hub" / "org" / "model" / revision / folder
    place.mkdir(parents=True)
    assert locate(source) == place
    assert hub == [("org/model", None if revision == "main" else revision)]


def test_what_an_id_names_goes_before_what_is_asked_for(hub: Asked, tmp_path: Path) -> None:
    for revision in ("v1", "v2"):
        (tmp_path / "hub" / "org" / "model" / revision).mkdir(parents=True)
    assert locate("org/model@v1", "v2").name == "v1" and locate("org/model", "v2").name == "v2"


def test_a_path_may_have_these_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Asked) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model@v1+x").mkdir(parents=True)
    assert locate("org/model@v1+x") == Path("org/model@v1+x") and not hub
    assert without_revision("org/model@v1+x") == ("org/model@v1+x", None)
    assert at_revision("org/model@v1+x", "v2") == "org/model@v1+x"


@pytest.mark.parametrize("source", ["model@v1", "org/mo del@v1", "org/model/inside@v1", "/none/such@v1"])
def test_what_is_no_id_is_refused_with_its_form(source: str, hub: Asked) -> None:
    with pytest.raises(CheckpointError, match='"owner/name@revision"'):
        locate(source)
    assert not hub


def test_ids_take_a_revision_where_they_name_none() -> None:
    for source, expected in {
        "org/model": "org/model@v2",
        "org/model@v1": "org/model@v1",
        "hf://org/model/inside": "hf://org/model@v2/inside",
        "org/model+org/lora@v1": "org/model@v2+org/lora@v1",
        "./local": "./local",
    }.items():
        assert at_revision(source, "v2") == expected
    assert without_revision("org/model@refs/pr/3") == ("org/model", "refs/pr/3")
    assert without_revision("org/model") == ("org/model", None)


@pytest.fixture
def family(llama: Family, tmp_path: Path) -> Family:
    """A base and its fine-tunes, on the Hub as revision v2 of a repository each."""
    for name, path in {"base": llama.base, **llama.tasks}.items():
        shutil.copytree(path, tmp_path / "hub" / "org" / name / "v2")
    return llama


@pytest.mark.parametrize("first", [True, False])
def test_the_revision_of_a_command_is_that_of_all_ids_that_name_none(
    first: bool, family: Family, hub: Asked, tmp_path: Path
) -> None:
    shutil.copytree(family.tasks["code"], tmp_path / "hub" / "org" / "code" / "v3")
    revision = ["--revision", "v2"]
    models = ["--base", "org/base", "--task", "math=org/math", "--task", "code=org/code@v3"]
    models += ["--task", f"local={family.tasks['law']}"]
    arguments = [*revision, *models] if first else [*models, *revision]
    outcome = tvbases("inspect", *arguments, "--json", tmp_path / "found.json", "--quiet")
    assert outcome.code == 0, outcome
    assert set(hub) == {("org/base", "v2"), ("org/math", "v2"), ("org/code", "v3")}
    assert json.loads((tmp_path / "found.json").read_text())["base"] == "org/base@v2"


def test_a_revision_that_the_hub_lacks_is_named(family: Family, hub: Asked, tmp_path: Path) -> None:
    message = refused(tmp_path, "inspect", "--base", "org/base@v9", "--task", "math=org/math@v2", "--quiet")
    assert '"org/base@v9"' in message and "org/base has no revision v9" in message


def test_an_adapter_on_the_base_is_that_adapter(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    name, path = next(iter(zoo.adapters.items()))
    plain = Vectors.open(zoo.base, {name: path})
    added = Vectors.open(zoo.base, {name: f"{zoo.base}+{path}"})
    assert plain.names == added.names and added.are_adapters
    for weight in plain.names:
        assert torch.equal(dense(plain.deltas(weight)[0]), dense(added.deltas(weight)[0]))
    (tmp_path / "other").mkdir()
    message = refused(tmp_path, "inspect", "--base", zoo.base, "--task", f"a={tmp_path / 'other'}+{path}", "--quiet")
    assert f"the adapter is on {tmp_path / 'other'}, but the base is {zoo.base}" in message


def test_an_adapter_that_is_written_names_its_base_and_its_revision_apart(hub: Asked, tmp_path: Path) -> None:
    """PEFT's loader takes them so; an id with an @ it would not find."""
    zoo = make_zoo(tmp_path / "zoo")
    shutil.copytree(zoo.base, tmp_path / "hub" / "org" / "base" / "v2")
    tasks = []
    for name, path in zoo.adapters.items():
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
        tasks += ["--task", f"{name}={path}"]
    first = next(iter(zoo.adapters))
    arguments = ["--base", "org/base@v2", *tasks, "--forget", first, "--alpha", 1, "--adapter", "--quiet"]
    outcome = tvbases("negate", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v2")
