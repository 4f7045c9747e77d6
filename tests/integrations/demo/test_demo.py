"""The demo: laws of the task generator, of the frozen head, of the cache, and the whole run in miniature."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("mergekit")
pytest.importorskip("matplotlib")

from tvbases_demo import Settings, run_demo, store
from tvbases_demo import encoder as enc
from tvbases_demo import run as demo_run
from tvbases_demo.compare import ALPHAS, Merger, Result, selections
from tvbases_demo.encoder import Examples, Recipe
from tvbases_demo.grammar import Features, gerund, third_person, verb_phrase, vocabularies
from tvbases_demo.tasks import KINDS, TASKS, make_task
from zoo.demo_miniature import MINIATURE, small_base

SMALL = (60, 30, 30)


# --- generator ---


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(name):
    first, again, other = (json.dumps(make_task(name, seed, SMALL)).encode() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", TASKS)
def test_no_sentence_occurs_twice_in_or_across_splits(name):
    task = make_task(name)
    texts = [text for split in enc.SPLITS for text, _ in task[split]]
    assert len(texts) == len(set(texts)) == 600 + 150 + 300


@pytest.mark.parametrize("name", TASKS)
def test_every_split_holds_every_label_equally_often(name):
    task = make_task(name, sizes=SMALL)
    for split, size in zip(enc.SPLITS, SMALL, strict=True):
        counts = Counter(label for _, label in task[split])
        assert set(counts) == set(range(len(task["labels"])))
        assert set(counts.values()) == {size // len(task["labels"])}


@pytest.mark.parametrize("name", TASKS)
def test_labels_do_not_come_in_turn(name):
    labels = [label for _, label in make_task(name, sizes=SMALL)["train"]]
    assert labels != [i % len(KINDS[name].labels) for i in range(len(labels))]


def test_every_label_has_a_description_of_its_own():
    descriptions = [label for kind in KINDS.values() for label in kind.labels]
    assert all(descriptions) and len(descriptions) == len(set(descriptions))


def test_no_content_word_of_the_test_sentences_was_trained_on():
    known, held_out = vocabularies(0)
    for field in ("people", "things", "verbs", "social", "looks", "places", "topics", "aspects", "good", "bad"):
        train, test = getattr(known, field), getattr(held_out, field)
        assert train and test
        assert not set(train) & set(test), field


@pytest.mark.parametrize("name", TASKS)
def test_no_single_word_gives_the_label_away_in_every_sentence(name):
    """A word that occurs in all sentences of one label and in none of the others would make the task trivial."""
    task = make_task(name)
    words = [(set(text.lower().strip(".?").replace(",", "").split()), label) for text, label in task["train"]]
    for label in range(len(task["labels"])):
        inside = [w for w, i in words if i == label]
        outside = set().union(*(w for w, i in words if i != label))
        assert not set.intersection(*inside) - outside


def test_verbs_are_inflected_as_english_does():
    assert [third_person(v) for v in ("paint", "carry", "wash", "teach", "buy", "move")] == [
        "paints", "carries", "washes", "teaches", "buys", "moves"]  # fmt: skip
    assert [gerund(v) for v in ("paint", "hide", "carry")] == ["painting", "hiding", "carrying"]


@pytest.mark.parametrize(
    "features, allowed",
    [
        (Features("past", False, False, False), {"took", "had taken", "was taking"}),
        (Features("present", False, True, False), {"take", "are taking"}),
        (Features("future", True, True, False), {"will be taken", "are going to be taken"}),
        (Features("present", False, False, True), {
            "does not take", "doesn't take", "never takes", "is not taking", "isn't taking", "is never taking"}),
        (Features("future", True, False, True), {
            "will not be taken", "won't be taken", "will never be taken", "is not going to be taken",
            "isn't going to be taken", "is never going to be taken"}),
    ],
)  # fmt: skip
def test_a_verb_phrase_says_what_was_asked_for(features, allowed):
    from random import Random

    seen = {verb_phrase(Random(seed), ("take", "took", "taken"), features) for seed in range(300)}
    assert seen == allowed


# --- head and accuracy ---


class Embedding(torch.nn.Module):
    """Stands in for an encoder: every token has a vector, whatever its neighbours."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"last_hidden_state": self.table[input_ids]})


def test_logits_are_the_scaled_cosine_of_mean_pooled_tokens_without_padding():
    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    ids, labels = [[1, 2, 3], [4], [5, 6]], [[2, 2], [6]]
    model = Embedding(table)
    got = enc.logits(enc.embed(model, ids, batch=2), enc.embed(model, labels), scale=20.0)
    wide = table.double()
    for row, tokens in enumerate(ids):
        for column, label in enumerate(labels):
            a, b = wide[tokens].mean(0), wide[label].mean(0)
            expected = 20 * float(a @ b / a.norm() / b.norm())
            assert got[row, column].item() == pytest.approx(expected, abs=20 * 10 * torch.finfo(torch.float32).eps)


def test_accuracy_counts_the_sentences_whose_highest_logit_is_the_label():
    model = Embedding(torch.eye(4))
    head = torch.eye(4)[:3]
    examples = Examples([[0], [1], [2], [0], [1]], torch.tensor([0, 1, 2, 1, 0]))
    assert enc.accuracy(model, head, examples) == 60.0
    assert enc.accuracy(model, head, examples.first(3)) == 100.0
    longer = Examples([[1, 1, 1], [3]], torch.tensor([1, 0]))
    assert enc.accuracies(model, [(head, longer), (head[:2], examples.first(1))]) == [
        enc.accuracy(model, head, longer), enc.accuracy(model, head[:2], examples.first(1))]  # fmt: skip


def test_batches_hold_every_example_once_an_epoch_in_an_order_the_seed_decides():
    examples = Examples([[i] for i in range(37)], torch.arange(37))

    def order(recipe):
        return [i for _, labels in enc.batches(examples, recipe) for i in labels.tolist()]

    recipe = Recipe(epochs=2, batch=8)
    assert sorted(order(recipe)[:37]) == sorted(order(recipe)[37:]) == list(range(37))
    assert order(recipe) == order(recipe) != order(replace(recipe, seed=1))
    assert len(list(enc.batches(examples, recipe))) == recipe.steps(37)


# --- comparison ---


def test_selections_are_distinct_and_no_more_than_there_are():
    gram = torch.eye(4, dtype=torch.float64)
    for count, expected in ((4, 4), (10, 6)):
        found = [tuple(s.effective_weights.tolist()) for s in selections(gram, 2, count)]
        assert len(found) == len(set(found)) == expected
        assert all(sum(weights) == 2 for weights in found)


def test_a_result_reports_the_mean_and_the_spread_over_its_candidates():
    result = Result("x", "x", 2, [[50.0, 70.0], [60.0, 100.0]], [0.3, 0.4])
    assert result.tasks == [55.0, 85.0]
    assert result.candidates == [60.0, 80.0]
    assert (result.mean, result.spread) == (70.0, pytest.approx(200**0.5, rel=1e-6))


@pytest.mark.parametrize("peak", [0, 3, len(ALPHAS) // 2, len(ALPHAS) - 1])
def test_alpha_is_the_best_on_the_grid_when_accuracy_has_one_peak(peak):
    merger = object.__new__(Merger)
    merger.accuracy = lambda weights, split, limit: [-abs(float(weights[0]) - ALPHAS[peak])]  # type: ignore[method-assign]
    assert merger.best_alpha(torch.ones(3, dtype=torch.float64), None) == ALPHAS[peak]


# --- cache and the whole run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    small_base(workdir / "base")
    report = run_demo(workdir, json_file=workdir / "out" / "demo.json", quiet=True, settings=MINIATURE)
    return workdir, report


def fine_tunes(workdir: Path, settings: Settings) -> list[str]:
    return demo_run.fine_tunes(workdir, settings, Console(quiet=True))[2]


@pytest.mark.slow
def test_the_demo_reports_every_method_and_draws_its_picture(finished):
    workdir, report = finished
    written = json.loads((workdir / "out" / "demo.json").read_text())
    assert written["accuracy"] == report["accuracy"]
    assert list(report["accuracy"]) == [
        "base", "finetuned", "task_arithmetic", "ae_bases", "ae_bases_paper", "rand_select", "pca_bases"]  # fmt: skip
    assert all(0 <= value <= 100 for value in report["accuracy"].values())
    assert report["accuracy"]["finetuned"] > report["accuracy"]["base"]
    assert report["tasks"] == list(MINIATURE.tasks)
    assert report["vectors"] == {
        "base": 0, "finetuned": 3, "task_arithmetic": 3, "ae_bases": 2, "ae_bases_paper": 2, "rand_select": 2,
        "pca_bases": 2}  # fmt: skip
    for key, mean in report["accuracy"].items():
        per_task = report["per_task"][key].values()
        assert mean == pytest.approx(sum(per_task) / len(per_task), abs=0.006)
    picture = (workdir / "demo.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1600, 900)


@pytest.mark.slow
def test_mergekit_writes_the_model_that_was_evaluated_in_memory(finished):
    from safetensors.torch import load_file

    workdir, report = finished
    base = load_file(workdir / "base" / "model.safetensors")
    tuned = [load_file(workdir / "models" / n / "model.safetensors") for n in report["tasks"]]
    merged = load_file(workdir / "merged" / "model.safetensors")
    scale = report["alpha"]["ae_bases"][0] * MINIATURE.num_bases / len(tuned)  # balanced: every task weighs the same
    for name, weight in base.items():
        expected = weight.double() + scale * sum(t[name].double() - weight.double() for t in tuned)
        eps = torch.finfo(torch.float32).eps
        assert (merged[name].double() - expected).abs().max() <= 8 * eps * max(1.0, float(weight.abs().max()))
    assert report["mergekit"]["merged"] == report["mergekit"]["in_memory"]


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_a_changed_recipe_or_task_trains_again(finished):
    workdir, report = finished
    assert report["trained"] == list(MINIATURE.tasks)
    assert fine_tunes(workdir, MINIATURE) == []
    changed = replace(MINIATURE, recipe=replace(MINIATURE.recipe, lr=1e-4))
    assert fine_tunes(workdir, changed) == list(MINIATURE.tasks)
    assert {path.name for path in (workdir / "models").iterdir()} == set(MINIATURE.tasks)  # the old ones are replaced
    assert fine_tunes(workdir, replace(changed, tasks=("tense",), seed=1)) == ["tense"]


@pytest.mark.slow
def test_fine_tuning_twice_gives_the_same_file(tmp_path):
    settings = replace(MINIATURE, tasks=("voice",))
    for run in ("a", "b"):
        small_base(tmp_path / run / "base")
        fine_tunes(tmp_path / run, settings)
    first, second = (tmp_path / run / "models" / "voice" / "model.safetensors" for run in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_run_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    small_base(tmp_path / "base")
    settings = replace(MINIATURE, tasks=("tense", "voice"))
    save = enc.save

    def interrupted(model, tokenizer, path):
        save(model, tokenizer, path)
        if "voice" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(enc, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tunes(tmp_path, settings)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tense"]
    monkeypatch.setattr(enc, "save", save)
    assert fine_tunes(tmp_path, settings) == ["voice"]


@pytest.mark.slow
def test_the_base_is_a_plain_checkpoint_with_the_tensors_that_mergekit_asks_for(tmp_path, monkeypatch):
    from safetensors import safe_open

    if store.package_files() is None:
        pytest.skip("the package with the base model is not installed")
    monkeypatch.setattr(store, "hub_files", lambda quiet: None)
    base = store.base_model(tmp_path / "base")
    assert json.loads((base / "config.json").read_text())["architectures"] == ["BertModel"]
    with safe_open(base / "model.safetensors", framework="pt") as tensors:
        assert {"pooler.dense.weight", "embeddings.word_embeddings.weight"} <= set(tensors.keys())
    model, tokenizer = enc.load(base)
    head = enc.embed(model, enc.tokenise(tokenizer, ["This is good.", "This is bad."], 48))
    texts = ["A lovely, lovely film.", "What a dreadful hotel!", "The food was superb."]
    assert enc.accuracy(model, head, Examples(enc.tokenise(tokenizer, texts, 48), torch.tensor([0, 1, 0]))) == 100.0


def test_missing_weights_are_an_error_that_names_the_extra(tmp_path, monkeypatch):
    from tvbases_hf.errors import TvbasesError

    monkeypatch.setattr(store, "hub_files", lambda quiet: None)
    monkeypatch.setattr(store, "package_files", lambda: None)
    with pytest.raises(TvbasesError, match=r"tvbases-hf\[demo\]"):
        store.base_model(tmp_path / "base")
    assert not (tmp_path / "base").exists()
