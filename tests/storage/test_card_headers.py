"""The headers of cards, as the Hub's own code reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tvbases_hf.merging.card import model_card
from tvbases_hf.storage.cards import header, hub_id

REPORT = {"base": "meta-llama/Llama-3.2-1B@main", "method": "ae_bases", "dtype": "bfloat16", "changed": 1, "tensors": 2}
REPORT |= {"missing": {}, "error": {"all": 0.0}, "ranks": {8: 2}, "models": ["me/math", "me/code@v1.0", "./local"]}


class Recipe:
    recipe = "merge_method: ae_bases\n"


def read(kind: str, **changed: object) -> ModelCard:
    return ModelCard(model_card(Recipe(), {**REPORT, "kind": kind, **changed}), ignore_metadata_errors=False)  # type: ignore[arg-type]


def test_a_merge_names_its_base_and_its_models_as_ids_without_a_revision() -> None:
    data: Any = read("checkpoint").data
    assert data.base_model == ["meta-llama/Llama-3.2-1B", "me/math", "me/code"]
    assert data["base_model_relation"] == "merge" and data.library_name == "transformers"
    assert "merge" in (data.tags or [])


def test_an_adapter_names_what_it_goes_on() -> None:
    card = read("adapter")
    data: Any = card.data
    assert (data.base_model, data["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "adapter")
    assert 'from_pretrained("meta-llama/Llama-3.2-1B")' in card.text


def test_local_models_are_not_named_to_the_hub(tmp_path: Path) -> None:
    data: Any = read("checkpoint", base=str(tmp_path), models=[str(tmp_path), "models/math/extra"]).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("me/math", "me/math"),
        ("me/math@main", "me/math"),
        ("me/base@main+me/lora@v2", "me/lora"),
        ("math", None),
        ("./math", None),
        ("/models/math", None),
        ("me/math\nlicense: mit", None),
    ],
)
def test_ids_of_the_hub(source: str, expected: str | None) -> None:
    assert hub_id(source) == expected


def test_a_header_is_what_the_hub_reads_back() -> None:
    lines = header("peft", "me/base@main", "adapter", ["lora", "task-arithmetic"])
    data = ModelCard("\n".join([*lines, "", "# Title"])).data
    assert data.to_dict() == {
        "library_name": "peft",
        "tags": ["lora", "task-arithmetic"],
        "base_model": "me/base",
        "base_model_relation": "adapter",
    }
