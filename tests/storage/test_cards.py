"""What an output may take the place of: directories that we wrote, in which nobody has put or changed anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from commands.command_line import compress, inputs, refused, root, snapshot, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf.basis import Basis
from tvbases_hf.errors import OutputError
from tvbases_hf.models.lora_files import is_adapter_directory
from tvbases_hf.storage.cards import CARD, is_untouched, write_card
from tvbases_hf.storage.output import check_apart
from zoo.adapter_families import random_adapters
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]


def test_a_card_lists_the_files_and_knows_whether_it_was_changed(tmp_path: Path) -> None:
    (tmp_path / "b`.json").touch()
    write_card(tmp_path, "# Title\n\ntext\n")
    card = tmp_path / CARD
    text = card.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\ntext\n\nFiles: `README.md`, ``b`.json``.\n\n<!-- tvbases ")
    assert is_untouched(card)
    for changed in (text.replace("text", "more"), text + "\n", text.rpartition("<!--")[0], text.upper(), ""):
        card.write_text(changed, encoding="utf-8")
        assert not is_untouched(card)


def run_compress(place: Family) -> list[object]:
    return compress(place, "-m", 1, "--quiet")


def run_merge(place: Family) -> list[object]:
    file = write_config(root(place) / "merge.yml", merge_config(place))
    return ["merge", file, root(place) / "basis", "--quiet"]


def run_decompose(place: Family) -> list[object]:
    return ["decompose", *inputs(place), "--out", root(place) / "basis", "--quiet"]


@pytest.mark.parametrize("command", [run_compress, run_merge])
def test_a_card_that_was_changed_is_kept(command: Callable[[Family], list[object]], pair: Family) -> None:
    arguments = command(pair)
    assert tvbases(*arguments).code == 0
    card = root(pair) / "basis" / CARD
    ours = card.read_bytes()
    for mine in (ours.replace(b"licences", b"licence"), b"mine\n"):
        card.write_bytes(mine)
        assert f'{CARD}" was changed since it was written' in refused(root(pair), *arguments)
    card.write_bytes(ours)
    assert tvbases(*arguments).code == 0


def test_components_with_something_more_are_kept(pair: Family) -> None:
    arguments = run_decompose(pair)
    assert tvbases(*arguments).code == 0
    assert tvbases(*arguments).code == 0
    (root(pair) / "basis" / "unique" / "math" / "notes.txt").write_text("mine")
    assert "did not write" in refused(root(pair), *arguments)


def test_an_adapter_that_was_trained_is_not_one_that_we_wrote(tmp_path: Path) -> None:
    """It has the same two files."""
    adapters = random_adapters(tmp_path / "models")
    first = next(iter(adapters.tasks))
    trained = tmp_path / "trained"
    shutil.copytree(adapters.tasks[first], trained)
    (trained / CARD).unlink(missing_ok=True)  # PEFT's own
    negate = ["negate", *adapters.options(), "--forget", first, "--alpha", 0.5, "--adapter", "--quiet", "--out"]
    assert "did not write" in refused(tmp_path, *negate, trained)
    assert tvbases(*negate, tmp_path / "new").code == 0 and is_adapter_directory(tmp_path / "new")
    assert tvbases(*negate, tmp_path / "new").code == 0
    weights = tmp_path / "new" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # trained further
    assert "did not write" in refused(tmp_path, *negate, tmp_path / "new")


def test_an_output_that_is_an_input_is_refused(pair: Family) -> None:
    """Even where it is an earlier output of ours."""
    out = root(pair) / "models" / "clean"
    arguments = ["negate", *inputs(pair), "--forget", "math", "--alpha", 0.5, "--quiet", "--out"]
    assert tvbases(*arguments, out).code == 0
    message = refused(root(pair), *arguments, out / ".." / "clean", "--task", f"clean={out}")
    assert "is one of the models that are read" in message
    for source in (str(out), f"{out}+x", f"x+{out}"):
        with pytest.raises(OutputError, match="is one of the models"):
            check_apart(out, ["other", source])
    check_apart(out, ["other", f"{out}2"])


def test_the_hub_is_given_the_files_that_the_card_lists(
    pair: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, RepoUrl

    assert tvbases(*run_compress(pair)).code == 0
    (root(pair) / "basis" / "id_rsa").write_text("secret")
    pushed: dict[str, str] = {}

    def upload_folder(*_: object, folder_path: str, **options: object) -> str:
        assert not options.get("allow_patterns") and not options.get("ignore_patterns")
        pushed.update(snapshot(Path(folder_path)))
        shutil.copyfile(Path(folder_path) / CARD, tmp_path / CARD)
        return "done"

    url = "https://huggingface.co/me/basis"
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl(url))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    Basis.from_pretrained(root(pair) / "basis").push_to_hub("me/basis")
    listed = (tmp_path / CARD).read_text(encoding="utf-8").partition("\nFiles: ")[2].partition(".\n")[0]
    assert set(listed.strip("`").split("`, `")) == set(pushed)
    assert set(pushed) == {CARD, "basis.safetensors", "basis_config.json"}
