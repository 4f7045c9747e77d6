"""``tvbases evaluate`` and ``tvbases negate``: what is measured, the alpha that is chosen, and what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands.command_line import misused, refused, snapshot, tvbases
from tvbases_hf import Basis, Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_hf.learning.directions import COMPONENTS
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_lm_eval.evaluate import Session
from tvbases_lm_eval.forget import TARGET, negate_task, units, worth
from tvbases_lm_eval.plan import Plan
from tvbases_lm_eval.variants import Where, load, variants
from zoo.hf_models import Family, make_family, make_llama, read_state, save_state
from zoo.toxic_data import toxigen_rows, write_rows

HERE = Where("cpu")
IDS = torch.arange(4, 24)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    return make_family(root / "models", make_llama(root / "llama"), ["math", "toxic"], seed=3)


@pytest.fixture(scope="module")
def adapters(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, family.base, seed) for seed, name in enumerate(("math", "toxic"))}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("word1 word2 word3 word4\n" * 8, encoding="utf-8")
    return file


def make_adapter(directory: Path, base: Path, seed: int, dora: bool = False) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(str(directory))
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def logits_of(directory: Path) -> Tensor:
    return logits(load(directory, HERE)[0])


def shown(source: Path | str, base: Path | None = None, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What each variant answers, while it is the current one."""
    return {v.label: logits(v.model) for v in variants(str(source), base and str(base), tasks, HERE)}


def options(family: Family, tasks: dict[str, Path] | None = None) -> list[object]:
    named = family.tasks if tasks is None else tasks
    return ["--base", family.base, *(part for name, path in named.items() for part in ("--task", f"{name}={path}"))]


# Models to evaluate


def test_a_basis_of_checkpoints_is_evaluated_as_its_restored_tasks(family: Family, tmp_path: Path) -> None:
    vectors = Vectors.open(family.base, {name: str(path) for name, path in family.tasks.items()})
    basis = Basis.build(vectors, 1)
    basis.save_pretrained(tmp_path / "basis")
    found = shown(tmp_path / "basis", family.base)
    assert list(found) == ["before", "math", "toxic"]
    torch.testing.assert_close(found["before"], logits_of(family.base), rtol=0, atol=0)
    for task in family.tasks:
        restored = basis.restore(task, family.base, tmp_path / task)
        torch.testing.assert_close(found[task], logits_of(restored), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["math"], found["before"])


def test_a_basis_of_adapters_is_evaluated_as_its_single_adapters(
    family: Family, adapters: dict[str, Path], tmp_path: Path
) -> None:
    vectors = Vectors.open(family.base, {name: str(path) for name, path in adapters.items()})
    Basis.build(vectors, 2).save_pretrained(tmp_path / "basis")
    found = shown(tmp_path / "basis", family.base, ["toxic", "math"])
    assert list(found) == ["before", "toxic", "math"]
    for task, path in adapters.items():
        torch.testing.assert_close(found[task], shown(path, family.base)[path.name], rtol=1e-3, atol=1e-3)
    assert (found["toxic"] - found["math"]).abs().max() > 0.01


def test_an_adapter_is_compared_with_the_base_that_it_names(family: Family, adapters: dict[str, Path]) -> None:
    found = shown(adapters["math"])
    torch.testing.assert_close(found["before"], logits_of(family.base), rtol=0, atol=0)
    assert (found["math"] - found["before"]).abs().max() > 0.01


def test_an_adapter_is_named_together_with_its_base(family: Family, adapters: dict[str, Path]) -> None:
    both = f"{family.base}+{adapters['math']}"
    assert all(torch.equal(a, b) for a, b in zip(shown(both).values(), shown(adapters["math"]).values(), strict=True))
    with pytest.raises(ParameterError, match=r"the adapter is on .*, and --base is .*; leave --base out"):
        variants(both, str(family.tasks["math"]))
    with pytest.raises(CheckpointError, match="not a PEFT adapter"):
        list(variants(f"{family.base}+{family.tasks['math']}", None, None, HERE))


def test_a_checkpoint_is_evaluated_alone_or_after_its_base(family: Family) -> None:
    assert list(shown(family.tasks["math"])) == ["math"]
    assert list(shown(family.tasks["math"], family.base)) == ["before", "math"]


def test_a_model_that_accelerate_places_is_the_same_model(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    load_model, maps = AutoModelForCausalLM.from_pretrained, []

    def noted(*given: Any, **options: Any) -> Any:
        maps.append(options.get("device_map"))
        return load_model(*given, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    placed, _ = load(family.base, Where("auto"))
    assert torch.equal(logits(placed), logits_of(family.base))
    assert maps == ["auto", None]


def test_a_model_that_takes_texts_of_any_length_is_measured_as_others_are(family: Family, text: Path) -> None:
    session = Session.open(Plan(controls=(f"text:{text}",)))
    model, tokenizer = load(family.base, HERE)
    expected = session.measure(model, tokenizer)
    model.config.max_position_embeddings = -1  # as XLNet says it
    assert session.measure(model, tokenizer) == expected


def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    family: Family, adapters: dict[str, Path], tmp_path: Path
) -> None:
    vectors = Vectors.open(family.base, {name: str(path) for name, path in family.tasks.items()})
    Basis.build(vectors, 1).save_pretrained(tmp_path / "basis")
    with pytest.raises(ParameterError, match=r'no task "maths" \(did you mean math\?\); it has math, toxic'):
        variants(str(tmp_path / "basis"), None, ["maths"])
    with pytest.raises(ParameterError, match="is no basis, so it has no task"):
        variants(str(family.base), None, ["math"])
    config = json.loads((adapters["math"] / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "nameless").mkdir()
    for file in adapters["math"].iterdir():
        (tmp_path / "nameless" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "nameless" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ParameterError, match="does not name the model that it was made on; give it with --base"):
        variants(str(tmp_path / "nameless"))


def test_a_named_base_that_has_gone_is_asked_for(adapters: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapters["math"], moved)
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gone/"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='moved" names a base that is not found; give it with --base'):
        variants(str(moved))


def test_a_directory_without_a_language_model_is_named(tmp_path: Path, family: Family) -> None:
    save_state(tmp_path / "broken", read_state(family.base), family.base)
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal language model"):
        load(tmp_path / "broken", HERE)


def test_the_command_shows_before_and_after(
    family: Family, adapters: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", toxigen_rows(2))
    outcome = tvbases(
        *("evaluate", adapters["toxic"], "--target", "tvbases_toxigen_generate", "--prompts", f"toxigen={data}"),
        *("-k", 2, "--control", f"text:{text}", "--scorer", "python:zoo.toxic_data.bad_share", "--device", "cpu"),
        *("--json", tmp_path / "found.json"),
    )
    assert outcome.code == 0, outcome
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert found["models"] == ["before", "toxic"] and found["scorer"] == "python:zoo.toxic_data.bad_share"
    assert "toxic_rate" in outcome.out and "byte_perplexity" in outcome.out
    (perplexity,) = [row for row in found["rows"] if row["metric"] == "byte_perplexity"]
    assert perplexity["role"] == "control"
    assert perplexity["values"]["before"]["value"] != perplexity["values"]["toxic"]["value"]


# Negation


def test_alpha_given_writes_the_base_minus_alpha_times_the_vector(family: Family, tmp_path: Path) -> None:
    outcome = tvbases(*("negate", *options(family), "--forget", "toxic", "--alpha", 0.5, "--out", tmp_path / "clean"))
    assert outcome.code == 0, outcome
    base, tuned, clean = (read_state(path) for path in (family.base, family.tasks["toxic"], tmp_path / "clean"))
    for name, weight in base.items():
        oracle = weight.double() - 0.5 * (tuned[name].double() - weight.double())
        torch.testing.assert_close(clean[name].double(), oracle, rtol=1e-6, atol=1e-8)
    assert (tmp_path / "clean" / "tokenizer.json").is_file()


def test_of_several_fine_tunes_what_all_change_alike_is_taken_away(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "clean"
    arguments = ["--forget", "toxic", "--forget", "math", "--alpha", 0.5, "--out", out, "--json", tmp_path / "r.json"]
    shown = tvbases("negate", *options(family), *arguments).out
    assert "0.5 * plain of toxic, math" in " ".join(shown.split())
    base, clean = read_state(family.base), read_state(out)
    runs = [read_state(path) for path in family.tasks.values()]
    for name, own in base.items():
        changes = torch.stack([run[name].double() - own.double() for run in runs])
        same = (changes > 0).all(0) | (changes < 0).all(0)
        expected = own.double() - 0.5 * changes.mean(0) * same
        assert torch.allclose(clean[name].double(), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(clean[name].double(), own.double() - 0.5 * changes.mean(0), rtol=0, atol=1e-6)


def test_a_negated_adapter_is_minus_alpha_times_the_adapter(
    family: Family, adapters: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [*options(family, adapters), "--forget", "toxic", "--alpha", 0.7, "--adapter"]
    assert tvbases("negate", *arguments, "--out", tmp_path / "clean").code == 0
    base = Checkpoint.open(family.base)
    before, after = (Adapter.open(path, base) for path in (adapters["toxic"], tmp_path / "clean"))
    assert before.names == after.names
    for name in before.names:
        old, new = before.delta(name), after.delta(name)
        assert old is not None and new is not None
        torch.testing.assert_close(dense(new), -0.7 * dense(old), rtol=1e-5, atol=1e-8)


def test_the_unique_part_of_a_dora_is_no_adapter_but_a_checkpoint(family: Family, tmp_path: Path) -> None:
    tasks = {
        name: make_adapter(tmp_path / name, family.base, seed, True) for seed, name in enumerate(("math", "toxic"))
    }
    arguments = [*options(family, tasks), "--forget", "toxic", "--component", "unique", "--rank", "4"]
    arguments += ["--threshold", "0.05", "--alpha", "1"]
    message = refused(tmp_path, "negate", *arguments, "--adapter", "--out", tmp_path / "clean")
    assert "is not low-rank" in message and "full checkpoint" in message
    assert tvbases("negate", *arguments, "--out", tmp_path / "clean").code == 0


def test_the_control_chooses_the_largest_alpha_that_keeps_its_share(family: Family, tmp_path: Path, text: Path) -> None:
    """Two texts: the target's, and a control that the negation harms; every alpha is measured for three components."""
    (tmp_path / "control.txt").write_text("word9 word8 word7 word6\n" * 8, encoding="utf-8")
    outcome = tvbases(
        *("negate", *options(family), "--forget", "toxic", "--component", "unique", "--rank", "0.25"),
        *("--target", f"text:{text}", "--control", f"text:{tmp_path / 'control.txt'}", "--alphas", "5,10,20,40"),
        *("--curve", "--plot", tmp_path / "curve.png", "--json", tmp_path / "found.json", "--device", "cpu"),
        *("--keep", "0.99", "--out", tmp_path / "clean"),
    )
    assert outcome.code == 0, outcome
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert list(found["curves"]) == ["plain", "unique", "reconstructed"]
    for negation in found["curves"].values():
        curve = negation["curve"]
        (control,) = [curve["metrics"][name] for name in negation["controls"]]
        allowed = [alpha for alpha, value in zip(curve["alphas"], control, strict=True) if value >= 0.99 * control[0]]
        assert curve["alphas"] == [0, 5, 10, 20, 40] and max(allowed) == curve["chosen"]
    assert found["alpha"] == found["curves"]["unique"]["curve"]["chosen"]
    assert (tmp_path / "curve.png").stat().st_size > 1000 and (tmp_path / "clean" / "model.safetensors").is_file()


def test_one_number_is_made_of_every_task() -> None:
    measured = {
        ("toxicity", "toxic_rate"): (0.4, None, False),
        ("toxicity", "mean_toxicity"): (0.3, None, False),
        ("gsm8k", "exact_match (strict-match)"): (0.5, 0.1, True),
        ("gsm8k", "exact_match (flexible-extract)"): (0.6, 0.1, True),
        ("text:a", "byte_perplexity"): (4.0, None, False),
        ("text:a", "bits_per_byte"): (2.0, None, False),
    }
    plan = Plan(targets=("toxicity",), controls=("gsm8k", "more"))
    assert worth(measured, plan) == {TARGET: 0.4, "gsm8k": 0.5, "text:a": 0.25}  # type: ignore[arg-type]
    named = {TARGET: "toxic_rate of toxicity", "gsm8k": "exact_match (strict-match)", "text:a": "1/byte_perplexity"}
    assert units(measured, plan) == named  # type: ignore[arg-type]
    both = Plan(targets=("toxicity", "gsm8k"), controls=("more",))
    mean = "mean of toxic_rate of toxicity, exact_match (strict-match) of gsm8k"
    assert units(measured, both)[TARGET] == mean  # type: ignore[arg-type]


def test_a_target_that_did_not_fall_is_warned_of_with_its_unit(family: Family, tmp_path: Path, text: Path) -> None:
    """The control is the target's own text, and has to stay as it is."""
    again = tmp_path / "again.txt"
    again.write_text(text.read_text())
    outcome = tvbases(
        *("negate", *options(family), "--forget", "toxic", "--target", f"text:{text}", "--control", f"text:{again}"),
        *("--alphas", "0.5,1", "--keep", "1", "--device", "cpu", "--quiet", "--out", tmp_path / "clean"),
    )
    assert outcome.code == 0, outcome
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert f'"target" (1/byte_perplexity of text:{text})' in line and "control (1/byte_perplexity)" in line
    assert "did not fall" in line or "nothing is forgotten" in line


def test_a_target_without_a_score_is_no_success() -> None:
    """All scores failed: an empty toxic rate must not pass for zero."""
    measured = {("toxicity", "failed_scores"): (12.0, None, False), ("gsm8k", "acc"): (0.5, None, True)}
    with pytest.raises(ParameterError, match='"toxicity" gives no number to go by: all of its scores failed'):
        worth(measured, Plan(targets=("toxicity",), controls=("gsm8k",)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--forget", "toxik", "--alpha", 1], 'no task "toxik" (did you mean toxic?)'),
        (["--forget", "toxic", "--forget", "toxic", "--alpha", 1], "name at least one task to forget, and each once"),
        (
            ["--forget", "toxic", "--forget", "math", "--component", "unique", "--alpha", 1],
            "2 fine-tunes are to be forgotten, whose common part is the plain component",
        ),
        (["--forget", "toxic"], "nothing to measure"),
        (["--forget", "toxic", "--target", "gsm8k"], "choosing alpha needs a control"),
        (["--forget", "toxic", "--control", "gsm8k"], "choosing alpha needs a target"),
        (["--forget", "toxic", "--alpha", "nan"], "alpha is nan; give a finite number"),
        (["--forget", "toxic", "--alpha", 1, "--curve"], "--alpha says how much"),
        (["--forget", "toxic", "--control", "gsm8k", "--target", "mmlu", "--plot", "a.png"], "add --curve"),
        (["--forget", "toxic", "--curve", "--plot", "absent/a.png"], '--plot "absent/a.png": not a file in'),
        (
            ["--forget", "toxic", "--target", "gsm8k", "--control", "mmlu", "--alphas", "1;2"],
            "is not numbers with commas",
        ),
        (["--forget", "toxic", "--alpha", 1, "--adapter"], "a task here is a full checkpoint"),
        (["--forget", "toxic", "--alpha", 1, "--threshold", 2], "above 0 and at most 1; got 2"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    arguments: list[object], reason: str, family: Family, tmp_path: Path
) -> None:
    assert reason in refused(tmp_path, "negate", *options(family), *arguments, "--out", tmp_path / "clean")


def test_a_component_that_there_is_not_is_wrong_usage(family: Family, tmp_path: Path) -> None:
    arguments = [*options(family), "--forget", "toxic", "--alpha", 1, "--component", "uniqe", "--out", tmp_path / "c"]
    message = misused(tmp_path, "negate", *arguments)
    assert all(word in message for word in ("--component", "'uniqe'", *COMPONENTS))
    vectors = Vectors.open(family.base, {name: str(path) for name, path in family.tasks.items()})
    with pytest.raises(ParameterError, match=r"unknown component 'uniqe' \(did you mean unique\?\)"):
        negate_task(vectors, "toxic", tmp_path / "c", component="uniqe", alpha=1)


def test_a_single_task_has_no_unique_part(family: Family, tmp_path: Path) -> None:
    only = {"toxic": family.tasks["toxic"]}
    arguments = [*options(family, only), "--forget", "toxic", "--component", "unique", "--alpha", 1]
    assert "relative to other tasks" in refused(tmp_path, "negate", *arguments, "--out", tmp_path / "clean")


def test_a_directory_of_someone_else_is_left_alone(family: Family, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    before = snapshot(tmp_path)
    arguments = [*options(family), "--forget", "toxic", "--alpha", 1, "--out", tmp_path / "mine"]
    assert tvbases("negate", *arguments).code == 2
    assert snapshot(tmp_path) == before
