"""The data of one task, and how a model's answers to it are read: what every method that needs data takes.

A model is any module that a readout knows how to ask. ``transformers_readout`` asks transformers' causal language
models and classifiers of text, tokens or images; another readout (a frozen head, say) is one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParameterError

IGNORED = -100
LABELS = "labels"

Readout = Callable[[Any, Any], tuple[Tensor, Tensor | None]]


def transformers_readout(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(logits [n, C], labels [n] int64 or None) of a transformers model; n counts tokens for models of tokens.

    The next token is what a causal language model is asked for; tokens labelled -100 do not count.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    labels = inputs.pop(LABELS, None)
    logits = model(**inputs).logits
    if logits.ndim == 3:
        if _is_causal(model):
            logits, labels = logits[:, :-1], None if labels is None else labels[:, 1:]
        logits = logits.flatten(0, 1)
    return logits, None if labels is None else labels.flatten()


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
        return nn.functional.cross_entropy(_wide(logits), labels)

    def entropy(self, model: Any, batch: Any) -> Tensor:
        """Mean entropy of the model's answers to one batch, nats; no labels are needed."""
        logs = _wide(self.logits(model, batch)).log_softmax(dim=1)
        return -(logs.exp() * logs).sum(dim=1).mean()

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Share of all examples (or tokens) whose highest logit is the label."""
        right = count = 0
        for batch in self.batches:
            logits, labels = self.labelled(model, batch)
            right += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
        if not count:
            raise ParameterError(f'the data of "{self.name}" is empty')
        return right / count

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
            label: the column that becomes ``labels``; a data set without it has no labels.
            collate: from a list of rows to a batch, instead of the above.

        Raises ParameterError for an empty data set and for a column that is absent.
        """
        if len(dataset) == 0:
            raise ParameterError(f'the data of "{name}" is empty')
        if collate is None:
            columns = tuple(dataset[0])
            if tokenizer is not None and text not in columns:
                raise ParameterError(
                    f'the data of "{name}" has no column "{text}" (it has {", ".join(columns)}); name it with text='
                )
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


def _is_causal(model: Any) -> bool:
    """Whether a model of tokens predicts the next one; its class says so in transformers."""
    asked = type(getattr(model, "reparametrised", model))  # see inplace.Reparametrised
    names = [*(getattr(model.config, "architectures", None) or ()), asked.__name__]
    if any(name.endswith(("ForTokenClassification", "ForMaskedLM")) for name in names):
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
