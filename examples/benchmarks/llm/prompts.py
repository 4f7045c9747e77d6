"""Tasks as prompts that a word answers: how each of the text tasks is asked, and what its labels are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Form:
    """A prompt around a text, and the word for each label.

    ``words`` are {a part of the label's description: the word}; the first part that is found decides, and of the empty
    one that is every other label.
    """

    prompt: str
    words: Mapping[str, str]

    def word(self, description: str) -> str:
        return next(word for part, word in self.words.items() if part in description)


OPINION = {"negative": "negative", "positive": "positive"}
FORMS: dict[str, Form] = {
    "cr": Form("Product review: {text}\nSentiment:", OPINION),
    "mpqa": Form("Phrase: {text}\nPolarity:", OPINION),
    "sst2": Form("Film review: {text}\nThe critic found it", {"hated": "bad", "loved": "good"}),
    "mr": Form("Movie: {text}\nWorth seeing?", {"negative": "no", "positive": "yes"}),
    "sst5": Form(
        "Film review: {text}\nStars:",
        {"terrible": "one", "bad": "two", "okay": "three", "good": "four", "excellent": "five"},
    ),
    "subj": Form("Sentence: {text}\nOpinion or fact?", {"subjective": "opinion", "objective": "fact"}),
    "trec": Form(
        "Question: {text}\nThe answer is a",
        {
            "definition": "description",
            "thing": "thing",
            "abbreviation": "abbreviation",
            "person": "person",
            "location": "place",
            "number": "number",
        },
    ),
    "agnews": Form(
        "News: {text}\nTopic:",
        {"politics": "politics", "sports": "sports", "business": "business", "technology": "technology"},
    ),
    "sms": Form("Message: {text}\nSpam?", {"spam": "yes", "normal": "no"}),
    "bank": Form(
        "Customer: {text}\nSubject:",
        {
            "top": "deposit",
            "transfer": "transfer",
            "cash": "cash",
            "atm": "cash",
            "exchange": "exchange",
            "card": "card",
            "verify": "identity",
            "identity": "identity",
            "": "account",
        },
    ),
}


@dataclass(frozen=True)
class Prompts:
    """A task: ``words`` to choose from, and {split: [(prompt, index of its word)]}."""

    name: str
    words: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[str, int]]]


def prompts_of(name: str, task: Mapping[str, Any], cut: Callable[[str], str], sizes: Mapping[str, int]) -> Prompts:
    """A text task as sources.load_tasks gives it; ``sizes`` are the prompts wanted of each split."""
    form = FORMS[name]
    called = [form.word(description) for description in task["labels"]]
    words = tuple(dict.fromkeys(called))
    rows = {
        split: [(form.prompt.format(text=cut(text)), words.index(called[label])) for text, label in task[split][:size]]
        for split, size in sizes.items()
    }
    return Prompts(name, words, rows)


def shortened(text: str, words: int, letters: int) -> str:
    """The beginning of a text: whole words, so many at most and of so many letters."""
    kept = ""
    for word in text.split()[:words]:
        if len(kept) + len(word) >= letters:
            break
        kept += f" {word}"
    return kept.strip() or text[:letters]
