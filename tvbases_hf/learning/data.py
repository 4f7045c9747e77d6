"""The data of one task, and how a model's answers to it are read: what every method that needs data takes.

A model is any module that a readout knows how to ask. ``transformers_readout`` asks transformers' language models,
encoder-decoder models and classifiers of text, tokens, images or sound; zeroshot.ZeroShot asks models of images and
names; another readout (a frozen head, say) is one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParameterError
from .texts import IGNORED, LABELS, MESSAGES, Written, is_written

Readout = Callable[[Any, Any], tuple[Tensor, Tensor | None]]


def transformers_readout(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(logits [n, C], labels [n] int64 or None) of a transformers model; n counts tokens for models of tokens.

    A causal language model is asked for the next token, and for every one where no labels say which count. An
    encoder-decoder model is asked for every token of ``labels`` after those before it, which it makes its decoder's
    inputs of itself. Tokens labelled -100 do not count.
    """
    inputs = fitting(model, batch)
    targets = decodes(model)
    if targets and LABELS not in inputs and "decoder_input_ids" not in inputs:
        raise ParameterError(
            f"a batch of an encoder-decoder model ({kind_of(model)}) has no labels: it is asked for the tokens of a "
            f'target; add a column "{LABELS}"'
        )
    labels = inputs.get(LABELS) if targets else inputs.pop(LABELS, None)
    if targets and labels is not None and _follow(labels):
        raise ParameterError(
            f"the labels follow the text, which an encoder-decoder model ({kind_of(model)}) does not read; make its "
            "data with TaskModel.load(base).data(task, file)"
        )
    logits = model(**inputs).logits
    if logits.ndim == 3:
        if _is_causal(model):
            labels = _next_tokens(model, inputs, labels)
            logits, labels = logits[:, :-1], None if labels is None else labels[:, 1:]
        logits = logits.flatten(0, 1)
    return logits, None if labels is None else labels.flatten()


def _follow(labels: Tensor) -> bool:
    """Whether what counts begins later than its row, as where an answer follows a text."""
    return labels.ndim == 2 and bool((labels[:, 0] == IGNORED).all()) and bool((labels != IGNORED).any())


def _next_tokens(model: Any, inputs: Mapping[str, Any], labels: Tensor | None) -> Tensor | None:
    """[n, L] the tokens that a causal language model should write."""
    if labels is None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        return ids if ids is None or mask is None else ids.masked_fill(mask == 0, IGNORED)
    if labels.ndim < 2:
        raise ParameterError(
            f"the labels are one number for each example, and a {kind_of(model)} writes text: give the text of the "
            'answer as the label, or a column "choices" that the number is the place in'
        )
    return labels


def fitting(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where the model is, numbers that are no indices in its dtype."""
    first = next(model.parameters())
    dtype = getattr(model, "dtype", first.dtype)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(first.device, dtype) if value.is_floating_point() else value.to(first.device)

    return {key: moved(value) for key, value in batch.items()}


@dataclass(frozen=True)
class Answers:
    """How many examples (or tokens) were asked for, the share that is right, and the mean cross-entropy in nats."""

    count: int
    accuracy: float
    loss: float

    @property
    def accuracy_error(self) -> float:
        """The standard error of the accuracy over independent examples."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


@dataclass(frozen=True)
class TaskData:
    """Batches of one task. They are read more than once: a list or a DataLoader, not a generator."""

    name: str
    batches: Iterable[Any]
    readout: Readout = transformers_readout

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise ParameterError(f'the data of "{self.name}" can be read only once; give a list or a DataLoader')

    def logits(self, model: Any, batch: Any) -> Tensor:
        """[n, C] what counts of the model's answers to one batch."""
        logits, labels = self.readout(model, batch)
        return logits if labels is None else logits[labels != IGNORED]

    def labelled(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits [n, C], labels [n]) of what counts. Raises ParameterError for a batch without labels."""
        logits, labels = self.readout(model, batch)
        if labels is None:
            raise ParameterError(f'the data of "{self.name}" has no labels, which this needs; add a column "{LABELS}"')
        labels = labels.to(logits.device)
        counted = labels != IGNORED
        return logits[counted], labels[counted]

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Mean cross-entropy of one batch, nats."""
        logits, labels = self.labelled(model, batch)
        return nn.functional.cross_entropy(_wide(self._counting(logits)), labels)

    def entropy(self, model: Any, batch: Any) -> Tensor:
        """Mean entropy of the model's answers to one batch, nats; no labels are needed but of encoder-decoders."""
        logs = _wide(self._counting(self.logits(model, batch))).log_softmax(dim=1)
        return -(logs.exp() * logs).sum(dim=1).mean()

    def fixed(self, model: Any, changing: Iterable[str] = ()) -> TaskData:
        """The same data while only the weights ``changing`` change: what does not depend on them is computed once."""
        fix = getattr(self.readout, "fixed", None)
        return self if fix is None else replace(self, readout=fix(model, changing))

    @torch.no_grad()
    def answers(self, model: Any) -> Answers:
        """What a model makes of all of the data. Raises ParameterError for data that is empty, or without labels."""
        task = self.fixed(model)
        right, loss, count = 0, 0.0, 0
        for batch in task.batches:
            logits, labels = task.labelled(model, batch)
            right += int((logits.argmax(dim=1) == labels).sum())
            loss += float(nn.functional.cross_entropy(_wide(logits), labels, reduction="sum"))
            count += len(labels)
        if not count:
            raise ParameterError(f'the data of "{self.name}" is empty')
        return Answers(count, right / count, loss / count)

    def accuracy(self, model: Any) -> float:
        """Share of all examples (or tokens) whose highest logit is the label."""
        return self.answers(model).accuracy

    def _counting(self, logits: Tensor) -> Tensor:
        if len(logits) == 0:
            raise ParameterError(f'a batch of the data of "{self.name}" has no label that counts: all are {IGNORED}')
        return logits

    @classmethod
    def of_dataset(
        cls,
        name: str,
        dataset: Any,
        *,
        tokenizer: Any = None,
        text: str = "text",
        label: str = "label",
        batch_size: int = 16,
        max_tokens: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        readout: Readout = transformers_readout,
    ) -> TaskData:
        """The rows of a ``datasets.Dataset`` (or any sequence of dictionaries), in their order.

        Args:
            tokenizer: of the model; its inputs are made of the column ``text``, batch by batch. Without one the columns
                are the model's inputs already.
            label: the column that becomes ``labels``: the number of a class, for classifiers. For models that write
                text, a text alone asks for every next token, a label that is text for the answer after it, and
                ``choices`` or ``messages`` as texts.Written says.
            collate: from a list of rows to a batch, instead of the above.

        Raises ParameterError for an empty data set and for a column that is absent.
        """
        if len(dataset) == 0:
            raise ParameterError(f'the data of "{name}" is empty')
        if collate is None:
            columns = tuple(dataset[0])
            written = tokenizer is not None and is_written(dataset[0], label)
            if tokenizer is not None and text not in columns and MESSAGES not in columns:
                raise ParameterError(
                    f'the data of "{name}" has no column "{text}" (it has {", ".join(columns)}); name it with text='
                )
            if written:
                collate = Written(name, tokenizer, text, label, max_tokens)
            else:
                collate = _Tokenised(tokenizer, text, label, max_tokens) if tokenizer is not None else _Stacked(label)
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=collate)
        return cls(name, loader, readout)


@dataclass(frozen=True)
class _Tokenised:
    tokenizer: Any
    text: str
    label: str
    max_tokens: int | None

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        texts = [row[self.text] for row in rows]
        if getattr(self.tokenizer, "pad_token", "") is None:  # GPT-2 and Llama have none; padded places do not count
            self.tokenizer.pad_token = self.tokenizer.eos_token
        limits = {"truncation": True, "max_length": self.max_tokens} if self.max_tokens else {"truncation": True}
        batch = dict(self.tokenizer(texts, padding=True, return_tensors="pt", **limits))
        if self.label in rows[0]:
            batch[LABELS] = torch.tensor([row[self.label] for row in rows])
        return batch


@dataclass(frozen=True)
class _Stacked:
    label: str

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        return {
            LABELS if key == self.label else key: torch.stack([torch.as_tensor(row[key]) for row in rows])
            for key in rows[0]
        }


def stratified(labels: Sequence[Any], count: int, *, seed: int = 0) -> list[int]:
    """``count`` rows, ascending, in which every label has its share, by largest remainders (AE paper, section 4).

    Bases need less data than task vectors: n_i M / T examples of task i. Every label keeps one row at least if
    ``count`` allows it. Raises ParameterError unless 1 <= count <= len(labels).
    """
    if not 1 <= count <= len(labels):
        raise ParameterError(f"cannot choose {count} of {len(labels)} examples; choose 1 to {len(labels)}")
    rows: dict[Any, list[int]] = {}
    for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        rows.setdefault(labels[index], []).append(index)
    shares = {label: count * len(found) / len(labels) for label, found in rows.items()}
    least = 1 if count >= len(rows) else 0
    taken = {label: max(least, int(share)) for label, share in shares.items()}
    while sum(taken.values()) < count:
        taken[max(rows, key=lambda label: shares[label] - taken[label])] += 1
    while sum(taken.values()) > count:
        taken[
            max((label for label in rows if taken[label] > least), key=lambda label: taken[label] - shares[label])
        ] -= 1
    return sorted(index for label, found in rows.items() for index in found[: taken[label]])


def _wide(logits: Tensor) -> Tensor:
    """float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kind_of(model: Any) -> str:
    return type(bare(model)).__name__


def bare(model: Any) -> Any:
    """The model itself, out of inplace.Reparametrised and of PEFT's wrapper, whose ``forward`` may name no inputs."""
    model = getattr(model, "reparametrised", model)
    under = getattr(model, "get_base_model", None)
    return model if under is None else under()


def _is_causal(model: Any) -> bool:
    """Whether a model of tokens predicts the next one; its class says so in transformers."""
    names = [*(getattr(model.config, "architectures", None) or ()), kind_of(model)]
    if any(name.endswith(("ForTokenClassification", "ForMaskedLM")) for name in names) or decodes(model):
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)


def writes(model: Any) -> bool:
    """Whether a model is asked for tokens, not for one class of an example."""
    return _is_causal(model) or decodes(model)


def decodes(model: Any) -> bool:
    """Whether a model of an encoder and a decoder writes a target text, as T5, BART and Whisper do."""
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    return bool(getattr(config, "is_encoder_decoder", False) and generates is not None and generates())
