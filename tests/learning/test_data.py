"""Data of tasks: readouts, losses and stratified subsets, against plain computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.data import IGNORED, TaskData, stratified


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 11}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 11}
    sizes |= {"num_attention_heads": 2, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def test_the_loss_of_a_language_model_is_the_models_own(llama: nn.Module) -> None:
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    own = llama(**batch).loss
    assert torch.allclose(TaskData("x", [batch]).loss(llama, batch), own, rtol=1e-6)
    unshifted = cross_entropy(llama(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    assert not torch.allclose(unshifted, own, rtol=1e-3)


def test_the_loss_and_accuracy_of_a_classifier_are_the_models_own(bert: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(0, 11, (n, 5), generator=generator),
            "labels": torch.randint(0, 3, (n,), generator=generator),
        }
        for n in (4, 1)
    ]
    data = TaskData("x", batches)
    assert torch.allclose(data.loss(bert, batches[0]), bert(**batches[0]).loss, rtol=1e-6)
    right = sum(int((bert(input_ids=b["input_ids"]).logits.argmax(1) == b["labels"]).sum()) for b in batches)
    assert data.accuracy(bert) == right / 5


def test_the_entropy_needs_no_labels_and_is_that_of_the_softmax(bert: nn.Module) -> None:
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    logits = bert(**batch).logits.double()
    chances = logits.softmax(1)
    expected = -(chances * chances.log()).sum(1).mean()
    assert torch.allclose(TaskData("x", [batch]).entropy(bert, batch).double(), expected, rtol=1e-6)
    assert float(expected.detach()) < math.log(3)


def test_rows_of_text_are_tokenised_and_padded_together() -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = [torch.tensor([ord(c) % 11 for c in text]) for text in texts]
        return {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True)}

    rows = [{"sentence": "ab", "y": 1}, {"sentence": "abc", "y": 0}, {"sentence": "a", "y": 2}]
    data = TaskData.of_dataset("x", rows, tokenizer=tokenizer, text="sentence", label="y", batch_size=2)
    first, second = list(data.batches)
    assert first["input_ids"].shape == (2, 3) and second["input_ids"].shape == (1, 1)
    assert first["labels"].tolist() == [1, 0]
    assert len(list(data.batches)) == 2  # read again


def test_rows_of_inputs_are_stacked() -> None:
    rows = [{"pixel_values": torch.ones(3, 2, 2) * i, "label": i} for i in range(3)]
    (batch,) = TaskData.of_dataset("x", rows, label="label").batches
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["labels"].tolist() == [0, 1, 2]


@given(st.lists(st.sampled_from("aaabbc"), min_size=1, max_size=60), st.data())
def test_a_stratified_subset_has_every_labels_share(labels: list[str], choice: st.DataObject) -> None:
    count = choice.draw(st.integers(1, len(labels)))
    rows = stratified(labels, count)
    assert len(set(rows)) == len(rows) == count and rows == sorted(rows)
    kinds = set(labels)
    for kind in kinds:
        share = count * labels.count(kind) / len(labels)
        taken = sum(labels[row] == kind for row in rows)
        assert abs(taken - share) < len(kinds)  # each label that keeps its one row may take one from the others
        assert taken >= 1 or count < len(kinds)


def test_a_stratified_subset_is_drawn_at_random_by_seed() -> None:
    labels = ["a"] * 50 + ["b"] * 50
    assert stratified(labels, 10) == stratified(labels, 10)
    assert stratified(labels, 10) != stratified(labels, 10, seed=1)
    assert sum(row < 50 for row in stratified(labels, 10)) == 5


def test_bad_data_is_refused_by_name(bert: nn.Module) -> None:
    batch = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(ParameterError, match='"spam" has no labels'):
        TaskData("spam", [batch]).loss(bert, batch)
    with pytest.raises(ParameterError, match='"spam" can be read only once'):
        TaskData("spam", iter([batch]))
    with pytest.raises(ParameterError, match='"spam" is empty'):
        TaskData("spam", []).accuracy(bert)
    with pytest.raises(ParameterError, match='"spam" is empty'):
        TaskData.of_dataset("spam", [])
    with pytest.raises(ParameterError, match=r'"spam" has no column "text" \(it has sentence, label\)'):
        TaskData.of_dataset("spam", [{"sentence": "a", "label": 0}], tokenizer=object())
    with pytest.raises(ParameterError, match="choose 1 to 2"):
        stratified(["a", "b"], 3)
