"""What is measured on a language model, and how much of it: one place for every size and every choice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

# Eight tasks that ask for different things: opinions of three kinds, topics of three kinds, and what a text is.
MERGED = ("sst2", "agnews", "trec", "subj", "sms", "cr", "bank", "mpqa")
# Other kinds of fine-tunes take more than an hour of one core; asked if everything is.
LONG = ("kinds",)
DOMAINS = ("prose", "shakes", "bible", "python")

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0, 12.5, 16.0)
"""A search for the scale walks along these from where it is told to begin, until it gets worse."""


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay or dropout, linear warm-up and decay, clipped to length 1, in float32."""

    rank: int = 16
    lora_alpha: int = 32
    lora_lr: float = 5e-4
    full_lr: float = 2e-5
    steps: int = 50
    batch: int = 8
    window: int = 64
    """Tokens of a piece of text, of which a domain's adapter reads ``batch`` / 2 a step."""


@dataclass(frozen=True)
class Settings:
    """One run. Prompts are per task; the first of each split are taken, so a smaller run sees a part of a larger."""

    name: str = "full"
    tasks: tuple[str, ...] = MERGED
    domains: tuple[str, ...] = DOMAINS
    words: int = 18
    letters: int = 110
    """What is left of a text in a prompt: prompts of some 25 tokens fit a processor."""
    validation: int = 12
    test: int = 60
    text_bytes: int = 2000
    """Of each text domain."""
    instructions: int = 45
    seeds: tuple[int, ...] = (0, 1)
    num_bases: tuple[int, int] = (4, 2)
    """M: half of the tasks, and a quarter."""
    recipe: Recipe = field(default_factory=Recipe)
    studies: tuple[str, ...] = ()
    """What is asked beside the fine-tunes; if empty, all that does not take too long."""
    everything: bool = False
    """DoRA, full fine-tunes, LoRAs of first weights of their own, and adapters of text domains as well."""

    def asks(self, study: str) -> bool:
        return study in self.studies if self.studies else self.everything or study not in LONG

    def digest(self) -> str:
        """Of what decides a single answer: not how many questions are asked."""
        sizes = asdict(replace(self, name="", seeds=(), num_bases=(0, 0), studies=()))
        del sizes["everything"]
        return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]


FULL = Settings()
EVERYTHING = replace(FULL, everything=True)
QUICK = Settings(
    name="quick",
    tasks=MERGED[:4],
    domains=DOMAINS[:2],
    validation=8,
    test=30,
    text_bytes=1000,
    instructions=15,
    seeds=(0,),
    num_bases=(3, 2),
    recipe=Recipe(steps=25),
    studies=("addition", "budgets"),
)
