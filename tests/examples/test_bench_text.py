"""The benchmark on real text: its data, its memory, its report, and the main orderings in miniature."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from evidence import archive, runner, sources
from evidence.claims import Claim
from text import addition, command, finetune, kinds, models, negation, with_data
from text.report import more, results
from text.report.addition import product
from text.report.claims import claims
from text.report.sections import sections
from text.settings import EVERYTHING, FULL, MANY, QUICK, Recipe, Settings
from text.workshop import Workshop

from tvbases_hf.errors import CheckpointError, ParameterError
from zoo.text_answers import made_up

# --- where the tasks come from ---


def test_a_task_of_the_hub_is_cut_without_any_sentence_in_two_places(monkeypatch):
    monkeypatch.setattr(sources, "SIZES", {"train": 30, "val": 10, "test": 10})
    rows = [{"text": f"sentence {i % 70}", "label": i % 2} for i in range(100)]  # 30 of them twice
    seen: set[str] = set()
    task = sources._cut(sources.HUB["cr"], {"train": rows, "test": rows[:5]}, seen)
    texts = [text for split in sources.SPLITS for text, _ in task[split]]
    assert len(texts) == len(set(texts))
    assert [len(task[split]) for split in ("val", "train")] == [10, 30]
    assert {text for text, _ in task["test"]} == {f"sentence {i}" for i in range(5)}
    assert all(label == int(text.split()[1]) % 2 for split in sources.SPLITS for text, label in task[split])
    again = sources._cut(sources.HUB["sst2"], {"train": rows}, seen)
    assert not {text for split in sources.SPLITS for text, _ in again[split]} & set(texts), "across tasks too"


def test_labels_that_are_words_find_their_descriptions():
    rows = [{"text": f"{word} {i}", "label_coarse_original": word} for i in range(9) for word in ("NUM", "ABBR", "HUM")]
    task = sources._cut(sources.HUB["trec"], {"train": rows}, set())
    for text, label in task["train"] + task["val"] + task["test"]:
        wanted = {"NUM": "number", "ABBR": "abbreviation", "HUM": "person"}[text.split()[0]]
        assert wanted in task["labels"][label]


def test_every_task_has_a_source_on_the_hub():
    assert set(sources.HUB) == {*FULL.tasks, *FULL.unseen}


def test_parts_of_a_task_are_tasks_of_their_own(tmp_path):
    rows = {split: [[f"{split} {i}", i % 6] for i in range(12)] for split in sources.SPLITS}
    file = tmp_path / sources.FILE
    with gzip.open(file, "wt") as stream:
        json.dump({"trec": {"labels": list("abcdef"), **rows}, "cr": {"labels": ["x", "y"], **rows}}, stream)
    found = sources.load_tasks(["trec_things", "cr", "trec_places"], str(file))
    assert list(found) == ["trec_things", "cr", "trec_places"]
    assert found["trec_things"]["labels"] == ["c", "d"] and found["trec_places"]["labels"] == ["e", "f"]
    assert found["trec_things"]["val"] == [["val 2", 0], ["val 3", 1], ["val 8", 0], ["val 9", 1]]
    with pytest.raises(ParameterError, match="odd: trec has no labels 4, 6"):
        sources.split({"trec": {"labels": list("abcdef"), **rows}}, {"odd": ("trec", (4, 6))})


def test_more_tasks_share_no_labels_and_are_as_many_as_is_said():
    for settings in MANY:
        assert settings.name == f"tasks{len(settings.tasks)}" and len(set(settings.tasks)) in (14, 20)
        parts = [sources.PARTS[name] for name in settings.tasks if name in sources.PARTS]
        labels = [(source, label) for source, kept in parts for label in kept]
        assert len(labels) == len(set(labels))
        assert not {source for source, _ in labels} & set(settings.tasks), "a whole beside its parts"
        assert all(1 < m < len(settings.tasks) for m in settings.num_bases)


def test_a_file_that_lacks_a_task_or_is_no_file_says_so(tmp_path):
    file = tmp_path / sources.FILE
    with gzip.open(file, "wt") as stream:
        json.dump({"cr": {}}, stream)
    assert list(sources.load_tasks(["cr"], str(file))) == ["cr"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 tasks \(first: mr\)"):
        sources.load_tasks(["cr", "mr"], str(file))
    file.write_bytes(b"no gzip")
    with pytest.raises(CheckpointError, match="cannot be read as tasks"):
        sources.load_tasks(["cr"], str(file))
    with pytest.raises(ParameterError, match="the generator has no task 'cr'"):
        sources.load_tasks(["cr"], "generated")


# --- answers are files ---


def _study(asked: list[int], version: int = 1) -> runner.Study:
    def answer(workshop: Workshop, question: runner.Question) -> runner.Answer:
        asked.append(question["n"])
        if question["n"] == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return {"square": question["n"] ** 2}

    return runner.Study("squares", lambda settings: ({"n": n} for n in range(4)), answer, version)


TWO = Settings(tasks=("tense",), unseen=(), train=8, validation=4, test=4)


def test_kept_answers_are_gone_on_from_elsewhere(tmp_path: Path) -> None:
    """Another place asks nothing again, and keeps what it has of its own."""
    here, there, kept = (Workshop(tmp_path / name, TWO, "generated") for name in ("a", "b", "c"))
    archived, asked = tmp_path / "kept" / "x.tar.gz", []
    with pytest.raises(KeyboardInterrupt):
        runner.run([_study(asked)], here, 1)
    runner.run([_study(asked)], here, 1)
    own = runner.answer_file(there, _study([]), {"n": 2})
    own.parent.mkdir(parents=True)
    own.write_text('{"question": {"n": 2}, "answer": {"square": -1}}')
    assert archive.pack(here.workdir / "answers", archived) == 4
    first = archived.read_bytes()
    assert archive.pack(here.workdir / "answers", archived) == 4 and archived.read_bytes() == first
    assert archive.unpack(archived, there.workdir / "answers") == 3
    count = len(asked)
    found = runner.run([_study(asked)], there, 1)["squares"]
    assert len(asked) == count and [answer["square"] for _, answer in found] == [0, 1, -1, 9]
    assert archive.unpack(tmp_path / "none.tar.gz", kept.workdir / "answers") == 0


def test_an_interrupted_run_asks_only_what_is_not_answered(tmp_path):
    asked: list[int] = []
    workshop = Workshop(tmp_path, TWO, "generated")
    with pytest.raises(KeyboardInterrupt):
        runner.run([_study(asked)], workshop, 1)
    found = runner.run([_study(asked)], workshop, 1)["squares"]
    assert asked == [0, 1, 2, 2, 3]
    assert [a["square"] for a in found.of()] == [0, 1, 4, 9]
    assert found.one(n=3)["square"] == 9
    with pytest.raises(LookupError, match="0 answers"):
        found.one(n=7)


def test_another_version_size_or_text_is_another_answer(tmp_path):
    files = {
        runner.answer_file(Workshop(tmp_path, settings, "generated"), _study([], version), {"n": 1})
        for version in (1, 2)
        for settings in (TWO, replace(TWO, test=5), replace(TWO, tasks=("voice",)))
    }
    assert len(files) == 6
    more = replace(TWO, seeds=(0, 1, 2), draws=9, name="other")
    workshops = [Workshop(tmp_path, settings, "generated") for settings in (TWO, more)]
    assert len({runner.answer_file(w, _study([]), {"n": 1}) for w in workshops}) == 1, "more questions, same answers"


@pytest.mark.parametrize("last", range(7))
def test_bisection_finds_the_last_alpha_that_holds(last):
    asked = []
    assert negation.largest(lambda index: asked.append(index) or index <= last, 7) == last
    assert len(asked) <= 3 and 0 not in asked


# --- the report ---


@pytest.mark.parametrize("settings", [QUICK, FULL, EVERYTHING], ids=["quick", "full", "all"])
def test_all_questions_of_a_study_are_different(settings):
    for study in command.STUDIES:
        asked = [json.dumps(dict(question)) for question in study.questions(settings)]
        assert asked and len(asked) == len(set(asked)), study.name


def test_all_of_it_is_the_product_of_methods_kinds_sides_and_sizes_and_holds_what_less_asks():
    asked = [q for study in (addition, with_data) for q in study.questions(EVERYTHING)]
    cells = {(q["method"], q["kind"], q["num_bases"], q["over"]) for q in asked if q["kind"] != kinds.ALL}
    everything = set(
        itertools.product([*addition.METHODS, *with_data.TITLES], kinds.KINDS, FULL.num_bases, kinds.SIDES)
    )
    left_out = set(itertools.product(with_data.TITLES, with_data.ASKED, FULL.num_bases[1:], ["reconstructions"]))
    left_out |= set(itertools.product(with_data.TITLES, ["even"], FULL.num_bases, kinds.SIDES))
    exact = {("task_arithmetic", kind, m, "reconstructions") for kind in addition.BALANCED for m in FULL.num_bases}
    assert everything - cells == left_out | exact
    assert cells <= everything
    for study in command.STUDIES:
        less = [json.dumps(dict(question)) for question in study.questions(FULL)]
        assert set(less) <= {json.dumps(dict(question)) for question in study.questions(EVERYTHING)}, study.name


def test_at_least_ten_random_subsets_of_either_size_all_different():
    for count in FULL.num_bases:
        draws = [
            q["draw"]
            for q in addition.questions(FULL)
            if (q["method"], q["kind"], q["num_bases"]) == ("task_arithmetic", "rand_select", count)
        ]
        gram = torch.eye(len(FULL.tasks), dtype=torch.float64)
        chosen = {tuple(kinds.KINDS["rand_select"](gram, count, d).effective_weights.tolist()) for d in draws}
        assert len(draws) == len(chosen) >= 10


def test_the_table_of_all_methods_has_every_cell_that_is_asked():
    lines = product(made_up(EVERYTHING), EVERYTHING).splitlines()[2:]
    assert len(lines) == 1 + 2 * 2 * len(kinds.KINDS)
    assert all(len(line.split("|")) == 2 + 3 + len(addition.METHODS) + len(with_data.TITLES) for line in lines)
    empty = sum(cell.isspace() for line in lines[1:] for cell in line.split("|")[1:-1])
    missing = len(with_data.TITLES) * (len(with_data.ASKED) + 4)  # their reconstructions at 25 %, and all over "even"
    assert empty == missing


def test_the_report_of_more_tasks_and_of_trained_coefficients(tmp_path):
    results.write(made_up(MANY[0]), MANY[0], tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "ARGS='--many 14'" in text and "fine-tuned on 14 text tasks" in text
    rows = more.trained_coefficients(made_up(EVERYTHING), EVERYTHING).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[-1] for row in cells if row[-1]] == ["69.0", "73.6"], "all tasks, alone and with what pairs share"
    left_out = [row for row in cells if "left out" in row[0]]
    assert len(left_out) == 2 * len(EVERYTHING.tasks) and all(row[2] == "71.5" for row in left_out)
    assert sum("unseen" in row[0] for row in cells) == 2 * len(EVERYTHING.unseen)
    assert len(cells) == 2 + len(left_out) + 2 * len(EVERYTHING.unseen) + 5


@pytest.mark.parametrize("settings", [FULL, EVERYTHING], ids=["full", "all"])
def test_the_report_says_what_the_answers_say(tmp_path, settings):
    found = made_up(settings)
    results.write(found, settings, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "addition.png",
        "sizes.png",
        "negation.png",
        "bytes.png",
    }
    for name in ("addition", "sizes", "negation", "bytes"):
        assert f"(figures/{name}.png)" in text
    draws = [77.0 + draw + (draw >= 5) / 2 for draw in range(10)]
    assert ("TSV-M 2)" in text) == ("Every method" not in text) == (settings == FULL)
    assert f"{statistics.mean(draws):.1f} ± {statistics.stdev(draws):.1f} (α 0.4)" in text
    assert "Zero-shot 60.0, fine-tuned on the task 91.0" in text
    assert "| negating RandProj forgets the target by | 0.6 | ≤ 2.0 | yes |" in text
    titles = [section.title for section in sections(settings) if section.needs <= set(found)]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == ["What holds", *titles]


def test_the_readme_quotes_the_main_table_of_the_results():
    repository = Path(__file__).parents[2]
    text = (repository / "examples" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    table = text.split("## Addition")[1].split("| vectors |")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 1 + 4 * len(FULL.num_bases)
    assert f"| vectors |{table}" in (repository / "examples" / "guides" / "methods.md").read_text(encoding="utf-8")


def test_a_claim_that_does_not_hold_is_reported_as_such(tmp_path):
    found = made_up(FULL)
    for _, answer in found["negation"]:
        answer["target"] = answer["target_before"] - 3
    failed = [claim for claim in claims(found, FULL) if not claim.holds]
    assert {claim.text for claim in failed} >= {
        "negating the task vector forgets the target by",
        "negating RandProj forgets the target by",
    }
    results.write(found, FULL, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| negating RandProj forgets the target by | 3.0 | ≤ 2.0 | **no** |" in text
    assert Claim("", 1.0, 1.0).holds and Claim("", 1.0, 1.0, at_most=True).holds


# --- the main orderings, on generated tasks ---

GUARD = Settings(
    name="guard",
    tasks=("tense", "voice", "question", "certainty", "quantity", "number"),
    unseen=(),
    train=200,
    validation=20,
    test=100,
    seeds=(0,),
    num_bases=(3, 2),
    draws=3,
    recipe=Recipe(lr=1e-4, epochs=2),
)


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> dict[str, Any]:
    """Accuracies of the real encoder, fine-tuned for a moment on six generated tasks."""
    workshop = Workshop(tmp_path_factory.mktemp("guard"), GUARD, "generated")
    models.base_model(workshop.workdir)
    tuned = [finetune.answer(workshop, {"kind": "full", "seed": 0, "task": task}) for task in GUARD.tasks]

    def added(method: str, kind: str, draw: int = 0, over: str = "bases") -> float:
        asked = {"method": method, "kind": kind, "num_bases": 3, "over": over, "seed": 0, "draw": draw}
        return addition.answer(workshop, asked)["accuracy"]

    def forgotten(kind: str) -> float:
        index = GUARD.tasks.index("question")
        change, _ = negation.reconstruction(workshop, kind, 3, index)
        return tuned[index]["zero_shot"] - workshop.changed(change, -1.0, tasks=["question"])["question"]

    return {
        "zero_shot": statistics.mean(a["zero_shot"] for a in tuned),
        "own": statistics.mean(a["own"] for a in tuned),
        "all": added("task_arithmetic", "all"),
        "tsv": added("tsv", "all"),
        "balanced": added("task_arithmetic", "balanced"),
        "tsv balanced": added("tsv", "balanced", over="reconstructions"),
        "pca": added("task_arithmetic", "pca"),
        "rand_select": statistics.mean(added("task_arithmetic", "rand_select", d) for d in range(GUARD.draws)),
        "negated": forgotten("true"),
        "projected": forgotten("rand_proj"),
    }


@pytest.mark.slow
def test_the_orderings_of_the_evidence(guard):
    print({key: round(value, 1) for key, value in guard.items()})
    assert guard["own"] - guard["zero_shot"] >= 20, "otherwise there is nothing to keep"
    assert guard["all"] - guard["zero_shot"] >= 10
    assert guard["tsv"] >= guard["all"] + 1.5
    assert abs(guard["balanced"] - guard["all"]) <= 0.7
    assert guard["balanced"] - guard["rand_select"] >= 1.5
    assert guard["rand_select"] - guard["pca"] >= 2
    assert guard["tsv"] - guard["tsv balanced"] <= 4
    assert guard["negated"] >= 10 and guard["projected"] <= 3
