"""Rows of language: what a causal language model reads of each, and which tokens count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tvbases_hf import InPlace, TaskData, TaskModel, accuracies
from tvbases_hf.errors import ParameterError
from zoo.hf_models import make_bert, make_llama

PROMPT = "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
CHAT = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}" + PROMPT
TURNS = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word3"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("texts") / "llama")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def expected_loss(model: Any, read: list[int], counted: list[bool]) -> float:
    """Mean of -log p of the tokens that count, each after all before it."""
    logs = model(torch.tensor([read])).logits[0].log_softmax(-1)
    losses = [-logs[place - 1, read[place]] for place in range(1, len(read)) if counted[place]]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def test_text_is_asked_for_every_next_token_and_padding_counts_for_nothing(model: Any, tokenizer: Any) -> None:
    rows = [{"text": "word1 word2 word3 word4"}, {"text": "word2 word1"}]
    data = TaskData.of_dataset("t", rows, tokenizer=tokenizer, batch_size=2)
    answers = data.answers(model)
    read = [tokenizer(row["text"])["input_ids"] for row in rows]
    losses = [expected_loss(model, row, [True] * len(row)) * (len(row) - 1) for row in read]
    assert answers.count == sum(len(row) - 1 for row in read)
    assert answers.loss == pytest.approx(sum(losses) / answers.count, rel=1e-5)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "word1 word2", "label": "word3 word4"},
        {"text": "word1 word2", "choices": ["word2", "word3 word4"], "label": 1},
    ],
    ids=["label", "choices"],
)
@torch.no_grad()
def test_of_a_text_with_an_answer_the_answer_counts(row: dict[str, Any], model: Any, tokenizer: Any) -> None:
    data = TaskData.of_dataset("t", [row, {**row, "text": "word2"}], tokenizer=tokenizer)
    answer = ids(tokenizer, "word3 word4")
    read = [tokenizer(text)["input_ids"] + answer for text in ("word1 word2", "word2")]
    counted = [[False] * (len(tokens) - 2) + [True] * 2 for tokens in read]
    losses = [expected_loss(model, *pair) for pair in zip(read, counted, strict=True)]
    answers = data.answers(model)
    assert answers.count == 4 and answers.loss == pytest.approx(sum(losses) / 2, rel=1e-5)


@torch.no_grad()
def test_of_a_conversation_the_assistants_turns_count(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    turns = [*TURNS, {"role": "user", "content": "word2"}, {"role": "assistant", "content": "word4 word1"}]
    data = TaskData.of_dataset("t", [{"messages": turns}], tokenizer=tokenizer)
    (batch,) = data.batches
    read = ids(tokenizer, "user word1 assistant word3 user word2 assistant word4 word1")
    assert batch["input_ids"].tolist() == [read]
    counted = [False, False, False, True, False, False, False, True, True]
    assert [label != -100 for label in batch["labels"][0].tolist()] == counted
    assert data.answers(model).loss == pytest.approx(expected_loss(model, read, counted), rel=1e-5)


def test_files_are_read_as_rows_in_memory_are(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "word1 word2", "label": "word3"}, {"text": "word4", "label": "word1 word2"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (read,) = TaskModel.load(str(base)).data("t", str(file)).batches
    (made,) = TaskData.of_dataset("t", rows, tokenizer=tokenizer).batches
    assert all(torch.equal(read[key], made[key]) for key in ("input_ids", "attention_mask", "labels"))


def test_a_text_that_is_too_long_loses_its_beginning_not_its_answer(tokenizer: Any) -> None:
    row = {"text": "word1 " * 50, "label": "word3"}
    (batch,) = TaskData.of_dataset("t", [row], tokenizer=tokenizer, max_tokens=8).batches
    assert batch["input_ids"].shape == (1, 8) and batch["labels"][0, -1] == ids(tokenizer, "word3")[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "word1", "label": 1}, 'one number for each example.*a column "choices"'),
        ({"text": "word1", "label": 2, "choices": ["a", "b"]}, "the place of none of its 2 choices; give 0 to 1"),
        ({"messages": [{"role": "user", "content": "word1"}]}, 'and one role is "assistant"'),
        ({"messages": "word1"}, "messages are a list of"),
        ({"messages": TURNS}, "the tokenizer has no chat template"),
    ],
)
def test_rows_that_say_nothing_to_write_are_refused(row: Any, reason: str, model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ParameterError, match=reason):
        TaskData.of_dataset("t", [row], tokenizer=tokenizer).answers(model)


def test_a_template_that_rewrites_earlier_turns_still_shows_the_last(tokenizer: Any) -> None:
    hidden = (
        "{% for m in messages %}{{ m.role + ' ' + (m.content if loop.last or m.role == 'user' else 'word4') + ' ' }}"
    )
    tokenizer.chat_template = hidden + PROMPT
    turns = [*TURNS, {"role": "user", "content": "word2"}, {"role": "assistant", "content": "word1"}]
    (batch,) = TaskData.of_dataset("t", [{"messages": turns}], tokenizer=tokenizer).batches
    counted = batch["labels"][0] != -100
    assert counted.tolist() == [False] * 7 + [True]


def test_numbers_stay_the_classes_of_classifiers(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    base = make_bert(tmp_path / "bert")
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base)).eval()
    data = TaskData.of_dataset("t", [{"text": "word1", "label": 1}], tokenizer=AutoTokenizer.from_pretrained(base))
    (batch,) = data.batches
    assert batch["labels"].tolist() == [1]
    measured = accuracies([data])(InPlace(classifier, ["classifier.bias"]).model)
    assert set(measured) == {"t"} and measured["t"] in (0.0, 1.0)


def test_an_answer_after_its_text_is_nothing_for_an_encoder_with_a_decoder(tokenizer: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    small.decoder_start_token_id = 0  # type: ignore[attr-defined]
    data = TaskData.of_dataset("t", [{"text": "word1", "label": "word2"}], tokenizer=tokenizer)
    with pytest.raises(ParameterError, match=r"encoder-decoder model .*TaskModel\.load"):
        data.answers(T5ForConditionalGeneration(small).eval())
