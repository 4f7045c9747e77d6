"""Metrics of toxicity against hand-computed values, and scorers: what fails is missing, never harmless."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tvbases_hf.errors import MissingExtraError, ParameterError
from tvbases_lm_eval.scorers import CallableScorer, ClassifierScorer, checked, failures, scorer_of, toxic_label
from tvbases_lm_eval.toxicity import Toxicity, of_prompt, toxicity
from zoo.hf_models import save_tokenizer
from zoo.toxic_data import BAD, always_fails, bad_share, fails_on_even_length

# Two prompts, k = 4, every score there: rates 2/4 and 0/4, means .5 and .1, maxima .9 and .4.
TABLE = [[0.9, 0.5, 0.4, 0.2], [0.0, 0.4, 0.0, 0.0]]


def test_metrics_are_the_hand_computed_ones() -> None:
    assert toxicity(TABLE) == Toxicity(
        toxic_rate=0.25,
        mean_toxicity=pytest.approx(0.3),  # type: ignore[arg-type]
        expected_maximum_toxicity=pytest.approx(0.65),  # type: ignore[arg-type]
        toxicity_probability=0.5,
        failed_scores=0,
        incomplete_prompts=0,
    )


def test_a_score_at_the_threshold_counts_as_toxic() -> None:
    assert toxicity([[0.5]]).toxic_rate == 1
    assert toxicity([[math.nextafter(0.5, 0)]]).toxic_rate == 0


def test_a_failed_score_is_missing_and_not_zero() -> None:
    """The second prompt loses its highest score: its maximum is unknown, and a zero would have halved the mean."""
    found = toxicity([[0.9, 0.5], [None, 0.1]])
    assert (found.failed_scores, found.incomplete_prompts) == (1, 1)
    assert found.toxic_rate == 0.5 and found.mean_toxicity == pytest.approx((0.7 + 0.1) / 2)
    assert (found.expected_maximum_toxicity, found.toxicity_probability) == (0.9, 1.0)
    zeros = toxicity([[0.9, 0.5], [0.0, 0.1]])
    assert zeros.mean_toxicity == pytest.approx((0.7 + 0.05) / 2) and zeros.toxicity_probability == 0.5


def test_where_everything_failed_nothing_is_said_but_how_much() -> None:
    found = toxicity([[None, None], [None, None]])
    assert found == Toxicity(None, None, None, None, failed_scores=4, incomplete_prompts=2)
    assert of_prompt([None]) == {"failed_scores": 1, "incomplete_prompts": 1}


def test_metrics_do_not_depend_on_the_order_of_prompts_or_samples() -> None:
    shuffled = [list(reversed(row)) for row in reversed(TABLE)]
    assert toxicity(shuffled) == toxicity(TABLE)


# Scorers


def test_a_function_that_raises_on_some_texts_gives_missing_scores_for_those() -> None:
    scorer = scorer_of(fails_on_even_length)
    texts = ["word7", "word17", "a word7", "ab"]
    assert scorer.score(texts) == [1.0, None, 0.5, None]
    assert failures(scorer.score(texts)) == 2
    assert isinstance(scorer, CallableScorer) and scorer.first_failure == ["RuntimeError: no answer"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1, None, "no number"])
def test_what_is_no_number_between_0_and_1_is_a_missing_score(value: Any) -> None:
    assert scorer_of(lambda text: value).score(["word1"]) == [None]


def test_checked_keeps_the_ends_of_the_interval() -> None:
    assert (checked(0), checked(1), checked("0.5")) == (0.0, 1.0, 0.5)


def test_the_offline_scorer_knows_mild_profanity_from_a_remark_about_weather() -> None:
    low, high = scorer_of("profanity").score(["what a lovely morning", "shut up you stupid idiot"])
    assert low is not None and high is not None and low < 0.2 < 0.5 < high
    assert scorer_of("profanity").score([]) == []


def test_the_offline_scorer_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[eval\]"):
        scorer_of("profanity")


def test_a_function_is_found_by_its_name() -> None:
    assert scorer_of("python:zoo.toxic_data.bad_share").score([f"{BAD} word1"]) == [0.5]
    assert scorer_of(scorer_of(bad_share)).score([BAD]) == [1.0]
    assert scorer_of(always_fails).score([BAD]) == [None]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("python:zoo.toxic_data.absent", "cannot be imported"),
        ("python:no_such_module.function", "cannot be imported"),
        ("python:function", "is not MODULE.FUNCTION"),
        ("python:zoo.toxic_data.BAD", "is not MODULE.FUNCTION"),
    ],
)
def test_a_function_that_is_not_there_is_named(source: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        scorer_of(source)


# Classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with two labels."""
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        id2label={0: "non-toxic", 1: "toxic"},
        label2id={"non-toxic": 0, "toxic": 1},
        pad_token_id=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


TEXTS = [f"word{i} word{(3 * i) % 60} " * (1 + i % 4) for i in range(7)]


def test_a_classifiers_score_is_the_probability_of_its_toxic_label(classifier: Path) -> None:
    scorer = ClassifierScorer(str(classifier), device="cpu")
    inputs = scorer._tokenizer([TEXTS[3]], return_tensors="pt")
    oracle = scorer._model(**inputs).logits.softmax(-1)[0, 1]
    (score,) = scorer.score([TEXTS[3]])
    assert score == pytest.approx(float(oracle.detach()), rel=1e-5)


def test_a_classifiers_scores_do_not_depend_on_the_batch(classifier: Path) -> None:
    whole = ClassifierScorer(str(classifier), device="cpu", batch_size=7).score(TEXTS)
    apart = ClassifierScorer(str(classifier), device="cpu", batch_size=1).score(TEXTS)
    assert whole == pytest.approx(apart, rel=1e-4)  # padding changes the order of sums in float32
    assert len({round(value or 0, 6) for value in whole}) > 3  # the law is empty if all texts score alike


def test_one_bad_text_costs_a_batch_one_score(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ClassifierScorer(str(classifier), device="cpu", batch_size=4)
    clean, real = scorer.score(TEXTS), scorer._probabilities

    def failing(texts: list[str]) -> list[float]:
        if TEXTS[2] in texts:
            raise RuntimeError("out of memory")
        return real(texts)

    monkeypatch.setattr(scorer, "_probabilities", failing)
    scores = scorer.score(TEXTS)
    assert scores[2] is None and failures(scores) == 1
    assert [s for i, s in enumerate(scores) if i != 2] == pytest.approx(
        [s for i, s in enumerate(clean) if i != 2], rel=1e-4
    )


def test_a_text_longer_than_the_model_is_cut_and_scored(classifier: Path) -> None:
    (score,) = ClassifierScorer(str(classifier), device="cpu").score(["word1 " * 100])
    assert score is not None


def test_the_label_can_be_chosen_and_must_be_there(classifier: Path) -> None:
    toxic, harmless = (scorer_of(f"{classifier}:{label}").score(TEXTS[:1])[0] for label in ("toxic", "non-toxic"))
    assert toxic is not None and harmless is not None and toxic + harmless == pytest.approx(1, abs=1e-6)
    with pytest.raises(ParameterError, match='no label "rude"; it has non-toxic, toxic'):
        scorer_of(f"{classifier}:rude")


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        ({0: "non-toxic", 1: "toxic"}, 1),
        ({0: "toxic", 1: "neutral"}, 0),
        ({0: "LABEL_0", 1: "LABEL_1"}, 1),
        ({0: "nothate", 1: "hate"}, 1),
        ({0: "toxicity", 1: "insult"}, 0),
        ({0: "rude"}, 0),
    ],
)
def test_the_toxic_label_is_recognised(labels: dict[int, str], index: int) -> None:
    assert toxic_label(labels, None, "model") == index


def test_a_classifier_of_something_else_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"none of its labels \(positive, negative\) is known"):
        toxic_label({0: "positive", 1: "negative"}, None, "model")


def test_what_is_no_classifier_is_refused_with_the_alternatives(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"not a text classifier.*profanity"):
        scorer_of(str(tmp_path))
    with pytest.raises(ParameterError, match="batch_size"):
        scorer_of(str(tmp_path), batch_size=0)
