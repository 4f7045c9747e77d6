"""What is measured, and how much of it: one place for every size and every choice of the benchmark."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

# The eight tasks that are merged ask for different things. The two that are kept aside, as tasks nobody has a vector
# for, are movie reviews like SST-2's: there is something to transfer.
MERGED = ("cr", "mpqa", "sst2", "subj", "trec", "agnews", "sms", "bank")
UNSEEN = ("mr", "sst5")

# M convex bases are shorter than T task vectors by T / M, so the grid goes far beyond 1; a search leaves it when it is
# past the optimum.
ALPHAS = (
    *(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8),
    *(1.0, 1.25, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.5, 16.0, 20.0),
)
# Studies that take more than an hour of one core; asked if everything is.
LONG = ("with_data", "devec_trained")
# A sum of T task vectors is best near this weight per task; a search starts there.
START = 0.4


# More tasks for the curve over T: where a task of many labels is there in parts, it is not there as a whole.
FOURTEEN = (
    *("cr", "mpqa", "sst2", "subj", "sms", "mr", "trec_definitions", "trec_things", "trec_places", "news_events"),
    *("news_trade", "stars_extremes", "stars_middle", "bank"),
)
TWENTY = (*FOURTEEN[:-1], *(f"bank_{index}" for index in range(7)))


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay or dropout, linear warm-up and decay, clipped to length 1; see half_precision."""

    lr: float = 5e-5
    epochs: int = 2
    lora_lr: float = 1e-3
    lora_epochs: int = 1
    rank: int = 8
    lora_alpha: int = 16
    batch: int = 16
    max_tokens: int = 32


@dataclass(frozen=True)
class Settings:
    """One run. Sentences are per task; the first of each split are taken, so a smaller run sees a part of a larger."""

    name: str = "full"
    tasks: tuple[str, ...] = MERGED
    unseen: tuple[str, ...] = UNSEEN
    train: int = 2000
    validation: int = 200
    test: int = 300
    seeds: tuple[int, ...] = (0, 1)
    num_bases: tuple[int, ...] = (4, 2)
    draws: int = 5
    """RandSelect subsets per fine-tuning seed, all different."""
    orders: int = 5
    shots: int = 16
    recipe: Recipe = field(default_factory=Recipe)
    studies: tuple[str, ...] = ()
    """What is asked beside the fine-tunes; if empty, all that does not take too long."""
    everything: bool = False
    """Every cell of every table: all methods over all kinds of vectors, bases and reconstructions; all draws."""

    def asks(self, study: str) -> bool:
        return study in self.studies if self.studies else self.everything or study not in LONG

    @property
    def half(self) -> int:
        """M = 50 %."""
        return self.num_bases[0]

    def digest(self) -> str:
        """Of what decides a single answer: not how many questions are asked."""
        sizes = asdict(replace(self, name="", seeds=(), num_bases=(), draws=0, orders=0))
        del sizes["studies"], sizes["everything"]
        return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]


FULL = Settings()
EVERYTHING = replace(FULL, everything=True)
MANY = tuple(
    replace(FULL, name=f"tasks{len(tasks)}", tasks=tasks, unseen=(), num_bases=(len(tasks) // 2, len(tasks) // 4),
            seeds=(0,), studies=("addition", "losses", "untuned"))
    for tasks in (FOURTEEN, TWENTY)
)  # fmt: skip
"""Addition with more tasks: for the curve over T."""
QUICK = Settings(
    name="quick",
    train=400,
    validation=50,
    test=100,
    seeds=(0,),
    draws=2,
    orders=2,
    recipe=Recipe(lr=1e-4),
    studies=("addition", "losses", "negation", "online"),
)
