"""``tvbases tune``: a YAML's merge at the scale that its targets like best, or the word that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from commands.command_line import refused, snapshot, tvbases
from tvbases_hf.algebra.delta import dense
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_lm_eval.variants import Where, load
from zoo.hf_models import Family, make_family, make_llama, read_state, save_state

HERE = Where("cpu")
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    return make_family(root / "models", make_llama(root / "llama"), ["learnt", "spoilt"], seed=3)


@pytest.fixture(scope="module")
def text(family: Family) -> Path:
    file = family.base.parent / "text.txt"
    file.write_text("word1 word2 word3 word4\n" * 6, encoding="utf-8")
    return file


@pytest.fixture(scope="module", autouse=True)
def steps(family: Family, text: Path) -> None:
    """One model has taken a step down the loss of the text, the other the same step up."""
    model, tokenizer = load(family.base, HERE)
    ids = tokenizer(text.read_text("utf-8"), return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    steps = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    length = torch.stack([step.norm() for step in steps.values()]).norm()
    for task, sign in (("learnt", -1), ("spoilt", 1)):
        state = read_state(family.base)
        state |= {name: state[name] + sign * 0.2 * step / length for name, step in steps.items() if name in state}
        save_state(family.tasks[task], state, family.base)


def recipe(family: Family, tmp_path: Path, *tasks: str, **parameters: Any) -> Path:
    models = [{"model": str(family.tasks[task]), "parameters": {"weight": 1.0}} for task in tasks]
    config = {"merge_method": "task_arithmetic", "base_model": str(family.base), "models": models, "dtype": "float32"}
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(config | {"parameters": parameters}), encoding="utf-8")
    return file


def measured(report: Path) -> dict[str, Any]:
    return json.loads(report.read_text(encoding="utf-8"))


def change(family: Family, out: Path, name: str) -> Tensor:
    return read_state(out)[name].double() - read_state(family.base)[name].double()


def test_the_merge_is_written_at_the_best_scale_of_its_yaml(family: Family, text: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    file = recipe(family, tmp_path, "learnt", **{"lambda": 0.5})
    options = ["--target", f"text:{text}", "--alphas", "0.5,1,2", "--device", "cpu", "--json", report]
    shown = tvbases("tune", file, out, *options).out
    found = measured(report)
    curve = found["tuning"]["curve"]
    best = max(range(len(curve["alphas"])), key=lambda index: curve["scores"][index])
    assert found["alpha"] == curve["alphas"][best] > 0 and found["tuning"]["helps"]
    assert f"alpha {found['alpha']:g}: mean of the targets" in " ".join(shown.split())
    for name, weight in Checkpoint.open(family.base).tensors.items():
        if weight.dtype.is_floating_point and name in read_state(family.tasks["learnt"]):
            expected = 0.5 * found["alpha"] * change(family, family.tasks["learnt"], name)
            assert torch.allclose(change(family, out, name), expected, rtol=0, atol=1e-6)
    again = tmp_path / "again.json"
    tvbases("evaluate", out, "--base", family.base, "--target", f"text:{text}", "--device", "cpu", "--json", again)
    row = next(row for row in measured(again)["rows"] if row["metric"] == "byte_perplexity")
    assert abs(1 / row["values"]["out"]["value"] - curve["scores"][best]) <= 1e-4 * curve["scores"][best]


def test_models_that_destroy_each_other_are_not_merged(family: Family, text: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    before = snapshot(family.base.parent)
    options = ["--target", f"text:{text}", "--alphas", "0.5,1", "--device", "cpu", "--quiet", "--json", report]
    for tasks in (["spoilt"], ["learnt", "spoilt"]):
        message = refused(family.base.parent, "tune", recipe(family, tmp_path, *tasks), out, *options)
        assert "do not merge these: none of 2 alphas from 0.5 to 1" in message
        assert measured(report)["alpha"] == 0 and not measured(report)["tuning"]["helps"]
        assert not out.exists() and snapshot(family.base.parent) == before
        report.unlink()


def test_adapters_are_tuned_to_an_adapter(family: Family, text: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, _ = load(family.base, HERE)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    learner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    tokens = load(family.base, HERE)[1](text.read_text("utf-8"), return_tensors="pt").input_ids
    for _ in range(4):
        learner.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        learner.step()
    model.save_pretrained(str(tmp_path / "adapter"))
    config = {"merge_method": "task_arithmetic", "base_model": str(family.base)}
    config["models"] = [{"model": str(tmp_path / "adapter"), "parameters": {"weight": 1.0}}]  # type: ignore[assignment]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = ["--adapter", "--target", f"text:{text}", "--alphas", "0.5,1,2", "--device", "cpu", "--json", report]
    tvbases("tune", tmp_path / "merge.yml", out, *options)
    alpha, opened = measured(report)["alpha"], Checkpoint.open(family.base)
    before, after = (Adapter.open(path, opened, label="a") for path in (tmp_path / "adapter", out))
    for name in before.names:
        own, found = (dense(delta) for delta in (before.delta(name), after.delta(name)) if delta is not None)
        assert torch.allclose(found, alpha * own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert alpha in (0.5, 1.0, 2.0)


def test_what_cannot_be_tuned_is_refused_before_anything_is_measured(
    family: Family, text: Path, tmp_path: Path
) -> None:
    file, out = recipe(family, tmp_path, "learnt"), tmp_path / "out"
    for options, message in (
        ([], "nothing to measure"),
        (["--control", f"text:{text}"], "tuning needs a target"),
        (["--target", f"text:{text}", "--alphas", "a,b"], "not numbers with commas"),
        (["--target", f"text:{text}", "--adapter"], "full checkpoints"),
        (["--target", f"text:{text}", "--keep", "2"], r"lies in (0, 1]; got 2"),
    ):
        assert message in refused(family.base.parent, "tune", file, out, *options, "--device", "cpu")
    shown = tvbases("tune", file, out, "--target", f"text:{text}", "--dry-run").out
    assert "would" in shown and not out.exists()


def low_rank_pair(family: Family, folder: Path) -> list[Path]:
    """Two adapters of which the second takes away all that the first adds."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, _ = load(family.base, HERE)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for sign, name in ((1, "one"), (-2, "other")):
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data = 0.5 * torch.randn_like(weight) if sign > 0 else -weight.data
        model.save_pretrained(str(folder / name))
    return [folder / "one", folder / "other"]


def test_adapters_that_destroy_each_other_are_not_merged(family: Family, text: Path, tmp_path: Path) -> None:
    config = {"merge_method": "task_arithmetic", "base_model": str(family.base)}
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in low_rank_pair(family, tmp_path)]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({**config, "models": models}), encoding="utf-8")
    options = ["--adapter", "--target", f"text:{text}", "--alphas", "0.5,1", "--device", "cpu", "--quiet"]
    message = refused(tmp_path, "tune", tmp_path / "merge.yml", tmp_path / "out", *options)
    assert "do not merge these: none of 2 alphas from 0.5 to 1" in message and not (tmp_path / "out").exists()


def test_every_model_gets_the_scale_that_helps_and_one_that_harms_gets_none(
    family: Family, text: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    learnt, spoilt = (change(family, family.tasks[task], NAME) for task in ("learnt", "spoilt"))
    half = read_state(family.base)  # a model that spoils half as much as the other has learnt
    for name, weight in read_state(family.tasks["spoilt"]).items():
        half[name] = half[name] + 0.5 * (weight - half[name])
    save_state(tmp_path / "half", half, family.base)
    file = recipe(family, tmp_path, "learnt")
    config = yaml.safe_load(file.read_text("utf-8"))
    config["models"].append({"model": str(tmp_path / "half"), "parameters": {"weight": 1.0}})
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    options = ["--target", f"text:{text}", "--alphas", "0.25,0.5,1", "--device", "cpu", "--per-basis", "--json", report]
    tvbases("tune", file, out, *options)
    found = measured(report)["coefficients"]
    assert [Path(label).name for label in found] == ["learnt", "half"]
    helping, harming = found.values()
    assert helping >= measured(report)["alpha"] and helping > harming == 0.25, "the least of the grid"
    expected = helping * learnt + harming * 0.5 * spoilt
    assert torch.allclose(change(family, out, NAME), expected, rtol=0, atol=1e-6)


def test_only_a_sum_has_scales_of_its_own(family: Family, text: Path, tmp_path: Path) -> None:
    file, out = recipe(family, tmp_path, "learnt", "spoilt"), tmp_path / "out"
    config = yaml.safe_load(file.read_text("utf-8"))
    for changed, reason in (
        ({"merge_method": "ties"}, "merge_method is ties"),
        ({"merge_method": "ae_bases", "parameters": {"num_bases": 2, "merge": "tsv"}}, "merge is tsv"),
    ):
        content = config | changed
        content["models"] = [{"model": model["model"]} for model in config["models"]]
        if changed["merge_method"] == "ties":
            content["parameters"] = {"weight": 1.0}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        options = ["--target", f"text:{text}", "--device", "cpu", "--per-basis"]
        assert reason in refused(family.base.parent, "tune", file, out, *options)


def test_task_files_of_ones_own_are_measured_from_their_folder(family: Family, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"prompt": f"word{k}", "answer": k % 2} for k in range(6)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task: dict[str, Any] = {"task": "own_choice", "output_type": "multiple_choice", "test_split": "test"}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "own.jsonl")}}}
    task |= {"doc_to_text": "{{prompt}}", "doc_to_choice": ["word7", "word8"], "doc_to_target": "answer"}
    task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    (folder / "own.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    report = tmp_path / "report.json"
    options = ["--include-path", folder, "--target", "own_choice", "--device", "cpu", "--json", report]
    tvbases("evaluate", family.base, *options)
    (row,) = (row for row in measured(report)["rows"] if row["metric"] == "acc")
    (value,) = row["values"].values()
    assert 0 <= value["value"] <= 1 and value["stderr"] is not None
    message = refused(tmp_path, "evaluate", family.base, "--include-path", tmp_path / "none", "--target", "own_choice")
    other = refused(tmp_path, "evaluate", family.base, "--include-path", folder, "--target", "own_choise")
    assert other.endswith('lm-eval has no task "own_choise" (did you mean own_choice?); `lm_eval ls tasks` lists them')
    assert "is no directory; --include-path takes one of lm-eval task files" in message


def test_coefficients_of_parts_are_trained_on_the_data_that_tuning_is_given(
    family: Family, text: Path, tmp_path: Path
) -> None:
    """The step down the loss gets more than the step up, which ``merge`` cannot know."""
    data, report, out = tmp_path / "story.jsonl", tmp_path / "report.json", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    file = recipe(family, tmp_path, "learnt", "spoilt", pairs="trained", rank="fraction:0.2")
    file.write_text(file.read_text().replace("task_arithmetic", "devec_unique"), encoding="utf-8")
    message = refused(family.base.parent, "merge", file, out)
    assert "pairs: trained needs data; use tvbases tune" in message
    options = ["--data", f"story={data}", "--alphas", "1,4", "--device", "cpu", "--quiet", "--json", report]
    tvbases("tune", file, out, *options)
    (line,) = [line for line in measured(report)["warnings"] if line.startswith("trained coefficients: ")]
    parts = [part.rsplit(" ", 1) for part in line.removeprefix("trained coefficients: ").split(", ")]
    found = {" & ".join(Path(own).name for own in label.split(" & ")): value for label, value in parts}
    assert list(found) == ["learnt", "spoilt", "learnt & spoilt"]
    assert float(found["learnt"]) > 0.3 > float(found["spoilt"])
    message = refused(
        family.base.parent, "tune", file, tmp_path / "other", "--target", f"text:{text}", "--device", "cpu"
    )
    assert "pairs: trained needs the data of a target" in message
