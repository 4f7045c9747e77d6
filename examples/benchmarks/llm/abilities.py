"""What a merge must not destroy: simple instructions, whose answers a rule checks, and text of several domains."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tvbases_hf.errors import CheckpointError, MissingExtraError

from . import tasks

NOUNS = (
    *("apple", "river", "stone", "garden", "window", "doctor", "music", "winter"),
    *("bread", "horse", "mirror", "letter", "market", "island", "engine"),
)
THINGS = {
    "yes": ("Is ice cold?", "Is the sun hot?", "Do birds have wings?", "Is snow white?", "Can fish swim?"),
    "no": ("Is fire cold?", "Can stones talk?", "Is grass red?", "Do cars have legs?", "Is the moon made of cheese?"),
}
# {kind: (what a rule finds in the answer, which of those it finds, the instructions)}
Instruction = tuple[str, str]


def _copying(rng: random.Random) -> Instruction:
    word = rng.choice(NOUNS)
    return f"Repeat this word and say nothing else: {word}", word


def _first_word(rng: random.Random) -> Instruction:
    words = rng.sample(NOUNS, 3)
    return f"What is the first word of this list: {', '.join(words)}? Answer with that word only.", words[0]


def _counting(rng: random.Random) -> Instruction:
    words = rng.sample(NOUNS, rng.randint(2, 5))
    return f"How many words are in this list: {', '.join(words)}? Answer with a number.", str(len(words))


def _adding(rng: random.Random) -> Instruction:
    first, second = rng.randint(1, 10), rng.randint(1, 10)
    return f"What is {first} + {second}? Answer with a number.", str(first + second)


def _agreeing(rng: random.Random) -> Instruction:
    answer = rng.choice(list(THINGS))
    return f"{rng.choice(THINGS[answer])} Answer with yes or no.", answer


KINDS: dict[str, tuple[str, int, tuple[Callable[[random.Random], Instruction], ...]]] = {
    "words": (r"([A-Za-z]+)", -1, (_copying, _first_word)),
    "numbers": (r"(\d+)", -1, (_counting, _adding)),
    "yes_no": (r"(?i)\b(yes|no)\b", 0, (_agreeing,)),
}
INSTRUCTIONS = tuple(f"instructions_{kind}" for kind in KINDS)


def write_instructions(folder: Path, tokenizer: Any, count: int) -> None:
    """One lm-eval task for each kind of answer, ``count`` instructions in all, in the model's own chat format."""
    rng = random.Random(0)
    for name, (pattern, which, makers) in zip(INSTRUCTIONS, KINDS.values(), strict=True):
        made = [makers[k % len(makers)](rng) for k in range(count // len(KINDS))]
        docs = [{"prompt": chat(tokenizer, asked), "answer": answer} for asked, answer in made]
        tasks.write_generation(folder, name, docs, pattern, which)


def chat(tokenizer: Any, asked: str) -> str:
    """A user's message as the model was taught to see one; of a model without a chat template, the message."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{asked}\n"
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": asked}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


HUB = {
    "prose": ("wikitext", "wikitext-2-raw-v1", "text"),
    "shakes": ("Trelis/tiny-shakespeare", None, "Text"),
    "bible": ("bible-nlp/biblenlp-corpus", "eng-engkjvcpb", "text"),
    "python": ("codeparrot/codeparrot-clean-valid", None, "content"),
}
"""Data sets of the Hub for the text domains: id, configuration, column."""
LETTERS = 1_000_000


def domain_text(name: str, split: str) -> str:
    """``train`` or ``test`` text of a domain: lm/NAME.SPLIT.txt.gz beside the file of tasks, else the Hub's."""
    file = next((f for f in _folders() if (f / f"{name}.{split}.txt.gz").is_file()), None)
    if file is None:
        return "".join(_of_hub(name, split))[:LETTERS]
    try:
        with gzip.open(file / f"{name}.{split}.txt.gz", "rt", encoding="utf-8") as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f'"{file}" cannot be read as text ({error})') from error


def _folders() -> list[Path]:
    folder = os.environ.get("TVBASES_DATA")
    repository = Path(__file__).resolve().parents[3]
    return [Path(folder) / "lm"] if folder else sorted(repository.parent.glob("*/data/lm"))


def _of_hub(name: str, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(f'datasets is missing ({error}); pip install "tvbases-hf[eval]"') from error
    path, config, column = HUB[name]
    parts = load_dataset(path, config)
    rows = parts[split] if split in parts else parts[next(iter(parts))]
    length = 0
    for row in rows if split == "train" or split in parts else reversed(list(rows)):
        yield str(row[column]) + "\n"
        length += len(row[column])
        if length > LETTERS:
            return
