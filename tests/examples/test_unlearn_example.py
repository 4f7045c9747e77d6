"""The unlearning example, much smaller: the same code from training to the table, on its generated text."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def modules() -> Any:
    """The example and its text, imported as the script imports them."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("unlearn_behaviour"), importlib.import_module("unlearn_text")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def small(modules: Any) -> Any:
    return modules[0].Recipe(
        hidden=32,
        layers=2,
        context=48,
        steps=150,
        batch=8,
        learning_rate=1e-2,
        rank=4,
        tuning_steps=30,
        tuning_rate=1e-2,
        seeds=(0,),
        thresholds=(0.5,),
        alphas=(0, 0.25, 0.5, 1, 2),
        levels=(0.02, 0.05),
        windows=12,
        samples=8,
    )


@pytest.fixture(scope="module")
def result(modules: Any, small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("unlearn")
    return directory, modules[0].main(directory, small, modules[1].generated(400))


def test_negation_forgets_the_unwanted_domain_and_is_compared_at_equal_forgetting(result: Any) -> None:
    _, found = result
    assert found["text"] == "made" and set(found["before"]) == {"bible", "prose", "shakes", "python"}
    names = {row["name"] for row in found["matched"]}
    assert {"plain", "unique, 0.5"} <= names
    for curve in found["curves"][0].values():
        assert curve["bible"][0] == 0 and curve["bible"][-1] > 0.02
    for row in found["matched"]:
        assert row["interval"][0] <= row["rise"] <= row["interval"][1] and row["alpha"] > 0


def test_a_second_run_uses_the_models_of_the_first(modules: Any, small: Any, result: Any) -> None:
    directory, found = result
    files = [*directory.rglob("*.safetensors")]
    written = {file: file.stat().st_mtime_ns for file in files}
    assert len(written) == 5
    again = modules[0].main(directory, small, modules[1].generated(400))
    assert {file: file.stat().st_mtime_ns for file in files} == written
    assert json.dumps(again) == json.dumps(found)
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(found))


def test_the_generated_domains_are_told_apart_by_the_marker_words_alone(modules: Any) -> None:
    text = modules[1].generated(200)
    lines = {domain: part.split("\n") for domain, part in text.test.items()}
    assert all(text.marked(line) == 1 for line in lines["bible"][:-1])
    assert not any(text.marked(line) for domain in ("prose", "shakes", "python") for line in lines[domain])


def test_text_of_ones_own_is_read_from_the_directory_that_is_named(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    for domain in modules[1].DOMAINS:
        for split in ("train", "test"):
            with gzip.open(tmp_path / f"{domain}.{split}.txt.gz", "wt", encoding="utf-8") as file:
                file.write(f"{domain} {split}")
    monkeypatch.setenv("TVBASES_DATA", str(tmp_path))
    found = modules[1].corpus()
    assert (found.source, found.train["prose"], found.test["bible"]) == ("real", "prose train", "bible test")
    monkeypatch.delenv("TVBASES_DATA")
    assert modules[1].corpus().source == "made"


def test_bytes_survive_the_tokenizer(modules: Any) -> None:
    tokenizer = modules[1].byte_tokenizer()
    text = "thou\n\tart — né"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text
