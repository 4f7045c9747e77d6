"""Four domains of text for unlearn_behaviour.py: real ones where they are, else made up here; and a byte tokenizer.

Real text is ``{bible,prose,shakes,python}.{train,test}.txt.gz`` in the directory that TVBASES_DATA names, or in
its folder ``lm``. The made-up domains share their words and sentences, and differ in a part of the vocabulary each.
"""

from __future__ import annotations

import gzip
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNWANTED = "bible"
HARMLESS = ("prose", "shakes", "python")
DOMAINS = (UNWANTED, *HARMLESS)
SPECIAL = ("<s>", "</s>", "<pad>")
# What the unwanted domain is known by: numbered verses and words that the others rarely have.
MARKERS = {
    "real": re.compile(r"\d:\d|\b(LORD|unto|saith|shalt|begat|Israel|Moses)\b"),
    "made": re.compile(r"\b(zorb|quib|vrax|thrum|glim)\b"),
}


@dataclass(frozen=True)
class Corpus:
    """``train`` and ``test`` text by domain; ``markers`` find the unwanted domain in a sample."""

    source: str
    train: dict[str, str]
    test: dict[str, str]
    markers: re.Pattern[str]

    def marked(self, text: str) -> float:
        """1 where a text shows the unwanted behaviour: a scorer as tvbases_lm_eval takes any function of one text."""
        return float(bool(self.markers.search(text)))


def corpus() -> Corpus:
    """The real domains if TVBASES_DATA leads to them, else the generated ones."""
    folder = os.environ.get("TVBASES_DATA")
    for place in (Path(folder) / "lm", Path(folder)) if folder else ():
        if all((place / f"{domain}.{split}.txt.gz").is_file() for domain in DOMAINS for split in ("train", "test")):
            train, test = ({domain: _read(place, domain, split) for domain in DOMAINS} for split in ("train", "test"))
            return Corpus("real", train, test, MARKERS["real"])
    return generated()


def generated(sentences: int = 6000, seed: int = 0) -> Corpus:
    """Four made-up domains over one grammar: half of their words are common, half their own."""
    train = {domain: _sentences(domain, sentences, seed) for domain in DOMAINS}
    test = {domain: _sentences(domain, max(200, sentences // 10), seed + 1) for domain in DOMAINS}
    return Corpus("made", train, test, MARKERS["made"])


def byte_tokenizer() -> Any:
    """One token per byte, 256 of them and three special ones: nothing to train, nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    begin, end, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)


COMMON = [
    *("the", "a", "of", "and", "in", "to", "with", "for", "on", "by", "little", "old", "great"),
    *("new", "people", "water", "house", "night", "day", "road", "said", "went", "saw"),
]
OWN = {
    "bible": ["zorb", "quib", "vrax", "thrum", "glim"],
    "prose": ["parlour", "carriage", "letter", "sister", "supper"],
    "shakes": ["crown", "dagger", "tempest", "villain", "sonnet"],
    "python": ["return", "import", "lambda", "yield", "async"],
}
# The domains share words, and an order of words each with another one: what a pool of tasks can have in common.
ORDERS = {"bible": "cocco", "shakes": "cocco", "prose": "ccoco", "python": "occoc"}


def _sentences(domain: str, count: int, seed: int) -> str:
    chance = random.Random(f"{domain}-{seed}")
    words = {"c": COMMON, "o": OWN[domain]}
    lines = (" ".join(chance.choice(words[kind]) for kind in ORDERS[domain]) for _ in range(count))
    return ".\n".join(lines)


def _read(place: Path, domain: str, split: str) -> str:
    with gzip.open(place / f"{domain}.{split}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read()
