"""Cards of what is restored, forgotten or split: as the Hub's own code reads them, and replaced with their output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from commands.command_line import inputs, root, tvbases
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.errors import OutputError
from tvbases_hf.merging.card import edit_card
from tvbases_hf.models.vectors import Vectors
from zoo.adapter_zoo import make_zoo
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]


def card(directory: Path, library: str = "transformers") -> ModelCard:
    """The card of a directory: valid for the Hub, and it lists the files beside it."""
    found: Any = ModelCard.load(directory / "README.md", ignore_metadata_errors=False)
    assert found.data.library_name == library and found.data.base_model is None, "a local base is no model of the Hub"
    assert all(f"`{file.name}`" in found.text for file in directory.iterdir())
    return found


def test_a_restored_task_says_which(pair: Family) -> None:
    out = root(pair) / "restored"
    basis = Basis.build(Vectors.open(pair.base, pair.tasks), 1)
    basis.restore("math", pair.base, out)
    assert "# math restored from a basis of 2 tasks, alpha 1" in card(out).text
    basis.restore({"math": 0.5, "code": -1.0}, pair.base, out)  # it is ours to replace
    assert "# 0.5 math + -1 code restored" in card(out).text
    (out / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="README"):
        basis.restore("math", pair.base, out)


def test_what_is_forgotten_is_said(pair: Family) -> None:
    out = root(pair) / "clean"
    assert tvbases("negate", *inputs(pair), "--forget", "math", "--alpha", 0.5, "--out", out).code == 0
    found = card(out)
    assert "math forgotten, plain, 0.5" in found.text and "made of `math`, `code`" in found.text


def test_every_component_has_a_card_and_all_of_them_one(pair: Family) -> None:
    out = root(pair) / "parts"
    for _ in range(2):
        assert tvbases("decompose", *inputs(pair), "--out", out).code == 0
    assert "| math |" in card(out).text and "`unique/code`" in card(out).text
    assert "# What is unique to code" in card(out / "unique" / "code").text
    assert "# What the tasks share" in card(out / "shared").text


def test_an_adapter_says_what_it_goes_on(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    basis = LoraBasis.build(Vectors.open(zoo.base, zoo.adapters), 2)
    for _ in range(2):
        basis.adapter("math").save_pretrained(tmp_path / "math")
    found = card(tmp_path / "math", "peft")
    assert "# math from a basis of 3 tasks, alpha 1" in found.text and "PeftModel.from_pretrained" in found.text
    data: Any = ModelCard(edit_card("math", "me/base@main", adapter=True), ignore_metadata_errors=False).data
    assert (data.base_model, data["base_model_relation"]) == ("me/base", "adapter")
    data = ModelCard(edit_card("math", "me/base@main", adapter=False), ignore_metadata_errors=False).data
    assert (data.base_model, data["base_model_relation"]) == ("me/base", "finetune")
