"""Several merges in one file: each after those that it names, with every check of one; the last is written to OUT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands.command_line import refused, snapshot, tvbases
from oracles.merge_oracle import family_vectors
from zoo.hf_models import Family, make_family, make_llama, read_state

COMMANDS = ("merge", "mergekit-yaml")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("several")
    return make_family(root / "models", make_llama(root / "llama"), ["a", "b", "c", "d"], seed=5)


def one(base: object, *models: object, name: str | None = None, **options: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": listed, "dtype": "float32"}
    return ({} if name is None else {"name": name}) | config | options


def documents(llama: Family) -> list[dict[str, Any]]:
    """The last first, so that the order in the file is not the order of the work."""
    a, b, c, d = llama.tuned()
    final = one(llama.base, "left", "right", parameters={"lambda": 0.5})
    return [final, one(llama.base, c, d, name="right"), one(llama.base, a, b, name="left")]


def written(file: Path, parts: list[dict[str, Any]]) -> Path:
    file.write_text(yaml.safe_dump_all(parts, sort_keys=False), encoding="utf-8")
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_a_merge_of_merges_is_the_merge_of_all(command: str, llama: Family, tmp_path: Path) -> None:
    file, out, parts = written(tmp_path / "all.yml", documents(llama)), tmp_path / "out", tmp_path / "parts"
    outcome = tvbases(command, file, out, "--intermediate-dir", parts, "--quiet")
    assert outcome.code == 0, outcome
    assert sorted(place.name for place in parts.iterdir()) == ["left", "right"]
    vectors = family_vectors(llama)
    for place, tasks, scale in (
        (out, (0, 1, 2, 3), 0.5),
        (parts / "left", (0, 1), 1.0),
        (parts / "right", (2, 3), 1.0),
    ):
        state = read_state(place)
        for name, tau in vectors.tau.items():
            expected = vectors.base[name] + scale * tau[list(tasks)].sum(0)
            assert torch.allclose(state[name].double(), expected, rtol=0, atol=1e-6), (place, name)
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    assert recipe["models"][0]["model"] == str(parts / "left")  # it can be run again


def test_merged_adapters_are_merged_again_as_adapters(llama: Family, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from tvbases_hf.algebra.delta import dense
    from tvbases_hf.models.adapter import Adapter
    from tvbases_hf.storage.checkpoint import Checkpoint

    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(llama.base), lora).save_pretrained(str(tmp_path / name))
    parts = [
        one(llama.base, tmp_path / "x", tmp_path / "y", name="both"),
        one(llama.base, "both", tmp_path / "x", parameters={"lambda": 0.5}),
    ]
    file, out = written(tmp_path / "all.yml", parts), tmp_path / "out"
    assert tvbases("merge", file, out, "--adapter", "-I", tmp_path / "parts").code == 2  # of mergekit-yaml alone
    assert tvbases("merge", file, out, "--adapter", "--intermediate-dir", tmp_path / "parts", "--quiet").code == 0
    base = Checkpoint.open(llama.base)
    x, y, found = (Adapter.open(path, base, label="l") for path in (tmp_path / "x", tmp_path / "y", out))
    for name in x.names:
        own = [dense(delta) for delta in (x.delta(name), y.delta(name), found.delta(name)) if delta is not None]
        assert torch.allclose(own[2], own[0] + 0.5 * own[1], rtol=0, atol=1e-6)


def test_a_dry_run_checks_all_and_writes_nothing(llama: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "all.yml", documents(llama))
    before = snapshot(tmp_path)
    for command in COMMANDS:
        shown = tvbases(command, file, tmp_path / "out", "--intermediate-dir", tmp_path / "parts", "--dry-run")
        assert shown.code == 0 and "would be written to" in shown.out and snapshot(tmp_path) == before


Change = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[2].pop("name"), "2 of 3 merges have no name; exactly one has none"),
        (lambda p: p[0].update(name="final"), "0 of 3 merges have no name"),
        (lambda p: p[2].update(name="right"), 'two merges are named "right"'),
        (lambda p: p[2].update(name="../left"), 'merge "../left" cannot be the name of a file'),
        (lambda p: p[2].update(name=3), "a merge is named 3, which is no word"),
        (lambda p: p[2]["models"][0].update(model="right") or p[1]["models"][0].update(model="left"), "in a circle: "),
        (lambda p: p[1]["models"][0].update(model="right"), "in a circle: right -> right"),
        (lambda p: p[1].update(merge_method="tise"), "unknown merge_method 'tise' (did you mean ties?)"),
        (lambda p: p[2]["models"][0]["parameters"].update(wieght=1), "has no parameter 'wieght'"),
        (lambda p: p.append(["no", "merge"]), "document 4 is not a mergekit configuration"),
    ],
)
def test_what_is_wrong_with_any_of_them_is_said_before_the_first(
    command: str, change: Change, message: str, llama: Family, tmp_path: Path
) -> None:
    parts = copy.deepcopy(documents(llama))
    change(parts)
    file = written(tmp_path / "all.yml", parts)
    said = refused(tmp_path, command, file, tmp_path / "out", "--intermediate-dir", tmp_path / "parts")
    assert message in said and "/tmp/tmp" not in said, said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "parts", "message"),
    [
        ("out", "out", "would be written to"),
        ("parts/left", "parts", "would be written to"),
        ("parts/left/out", "parts", "the merge without a name would be written to"),
    ],
)
def test_merges_that_would_be_written_into_one_another_are_refused_before_the_first(
    command: str, out: str, parts: str, message: str, llama: Family, tmp_path: Path
) -> None:
    file = written(tmp_path / "all.yml", documents(llama))
    said = refused(tmp_path, command, file, tmp_path / out, "--intermediate-dir", tmp_path / parts)
    assert message in said and "not inside one another" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["merge", "dry run"])
def test_a_model_that_is_not_there_and_a_place_that_is_taken_are_said_before_the_first(
    command: str, dry: tuple[str, ...], llama: Family, tmp_path: Path
) -> None:
    parts, out = copy.deepcopy(documents(llama)), tmp_path / "out"
    parts[0]["models"].append({"model": str(tmp_path / "gone"), "parameters": {"weight": 1.0}})
    file, more = written(tmp_path / "all.yml", parts), ("--intermediate-dir", tmp_path / "parts", *dry)
    assert 'gone": no such file or directory' in refused(tmp_path, command, file, out, *more)
    (tmp_path / "parts" / "right").mkdir(parents=True)
    (tmp_path / "parts" / "right" / "notes.txt").write_text("mine")
    assert "1 entries, first: notes.txt" in refused(
        tmp_path, command, written(tmp_path / "all.yml", documents(llama)), out, *more
    )


def test_what_only_mergekit_does_is_refused_before_the_first(llama: Family, tmp_path: Path) -> None:
    parts = documents(llama)
    last = {key: value for key, value in parts[0].items() if key != "models"}
    last["slices"] = [{"sources": [{"model": "left", "layer_range": [0, 1]}]}]
    file = written(tmp_path / "all.yml", [last, *parts[1:]])
    said = refused(tmp_path, "merge", file, tmp_path / "out", "--intermediate-dir", tmp_path / "parts")
    assert "slices is not done on changes of weights" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_place_for_the_parts_several_are_refused(command: str, llama: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "all.yml", documents(llama))
    assert "add --intermediate-dir DIR" in refused(tmp_path, command, file, tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_checks_of_one_merge_hold_for_each(command: str, llama: Family, tmp_path: Path) -> None:
    """NaN in a model of the second: nothing of it is written, and the message names the merge."""
    from zoo.hf_models import save_state

    state = read_state(llama.tuned()[0])
    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name][0, 0] = torch.nan
    save_state(tmp_path / "broken", state, llama.base)
    parts = [one(llama.base, *llama.tuned()[2:], name="good"), one(llama.base, "good", tmp_path / "broken")]
    file, out = written(tmp_path / "all.yml", parts), tmp_path / "out"
    outcome = tvbases(command, file, out, "--intermediate-dir", tmp_path / "parts", "--quiet")
    assert outcome.code == 2 and "NaN" in outcome.err and name in outcome.err and "broken" in outcome.err
    assert not out.exists() and outcome.err.count("\n") == 1
