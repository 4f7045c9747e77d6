"""Rows of language for models that write the next token: what they read, and which tokens count.

``{"text": ...}``: every token after the first.
``{"text": "2 + 2 =", "label": "4"}``: the tokens of the label, which follows the text.
``{"text": ..., "choices": ["no", "yes"], "label": 1}``: those of the choice.
``{"messages": [{"role": "user", "content": ...}, ...]}``: the assistant's turns, in the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterError

IGNORED = -100
MESSAGES, CHOICES, LABELS = "messages", "choices", "labels"
# transformers' number for a tokenizer without a limit.
NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Written:
    """A batch of such rows: ``input_ids``, ``attention_mask`` and ``labels``, [n, L] each, padded on the right.

    Between a text and its label stands a space, unless one of them has it. Rows that are too long lose the beginning of
    their text.
    """

    name: str
    tokenizer: Any
    text: str = "text"
    label: str = "label"
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        found = [self._cut(*self._tokens(row)) for row in rows]
        length = max(len(ids) for ids, _ in found)
        padding = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)

        def padded(values: Sequence[Sequence[int]], filler: int) -> Tensor:
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in values])

        return {
            "input_ids": padded([ids for ids, _ in found], padding),
            "attention_mask": padded([[1] * len(ids) for ids, _ in found], 0),
            LABELS: padded([labels for _, labels in found], IGNORED),
        }

    def _tokens(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The tokens of a row, and its labels."""
        if row.get(MESSAGES) is not None:
            return self._of_messages(row[MESSAGES])
        text, answer = str(row[self.text]), self._answer(row)
        read = list(self.tokenizer(text)["input_ids"])
        if answer is None:
            return read, list(read)
        if len(read) > 1 and read[-1] == self.tokenizer.eos_token_id:  # the text goes on
            read.pop()
        space = "" if text[-1:].isspace() or answer[:1].isspace() else " "
        written = list(self.tokenizer(space + answer, add_special_tokens=False)["input_ids"])
        return read + written, [IGNORED] * len(read) + written

    def _answer(self, row: Mapping[str, Any]) -> str | None:
        label, choices = row.get(self.label), row.get(CHOICES)
        if choices is None:
            return None if label is None else str(label)
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise ParameterError(
                f'the data of "{self.name}": the "{self.label}" of a row is {label!r}, the place of none of its '
                f"{len(choices)} choices; give 0 to {len(choices) - 1}"
            )
        return str(choices[label])

    def _of_messages(self, messages: Any) -> tuple[list[int], list[int]]:
        """Turns of the assistant that the template leaves as they are when more turns follow; the last one always."""
        self._check_messages(messages)
        whole = self._chat(messages)
        labels = [IGNORED] * len(whole)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, until = self._chat(messages[:place], True), self._chat(messages[: place + 1])
            if whole[: len(before)] == before and whole[: len(until)] == until:
                labels[len(before) : len(until)] = until[len(before) :]
        if all(label == IGNORED for label in labels):
            raise ParameterError(
                f'the data of "{self.name}": no turn of the assistant can be found in what the chat template writes; '
                "give rows of text and label"
            )
        return whole, labels

    def _chat(self, messages: Sequence[Any], answering: bool = False) -> list[int]:
        how: dict[str, Any] = {"tokenize": True, "return_dict": False, "add_generation_prompt": answering}
        return list(self.tokenizer.apply_chat_template(list(messages), **how)) if messages else []

    def _check_messages(self, messages: Any) -> None:
        good = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
        )
        if not good or not any(message["role"] == "assistant" for message in messages):
            raise ParameterError(
                f'the data of "{self.name}": messages are a list of {{"role": ..., "content": ...}}, and one role '
                'is "assistant"'
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise ParameterError(
                f'the data of "{self.name}" has messages, and the tokenizer has no chat template; give rows of text '
                "and label, or the tokenizer of a model that chats"
            )

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        limit = self.max_tokens or int(min(getattr(self.tokenizer, "model_max_length", NO_LIMIT), NO_LIMIT))
        if len(ids) <= limit:
            return ids, labels
        if labels[0] != IGNORED:  # text alone
            return ids[:limit], labels[:limit]
        return ids[-limit:], labels[-limit:]


def is_written(row: Mapping[str, Any], label: str) -> bool:
    """Whether a row says itself what is to be written: messages, or a text with an answer."""
    return row.get(MESSAGES) is not None or row.get(CHOICES) is not None or isinstance(row.get(label), str)
