"""What has to be true of the answers, and whether it is: computed, never written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from evidence.claims import Claim
from evidence.runner import Answers

from ..merges import ALL
from ..settings import Settings

Found = Mapping[str, Answers]


def claims(found: Found, settings: Settings) -> list[Claim]:
    """All that the answers at hand can decide."""
    return [*_addition(found, settings), *_budgets(found), *_forgetting(found)]


def own(found: Found, kind: str = "lora") -> float | None:
    """Mean accuracy of the fine-tunes on their own tasks, over the seeds."""
    return average([a["accuracy"] for a in found["finetune"].of(kind=kind)])


def accuracy(found: Found, method: str, kind: str = ALL, alpha: float | None = None, **more: object) -> float | None:
    """Mean over the seeds, of LoRAs; ``alpha`` None: where validation prompts chose it."""
    if "addition" not in found:
        return None
    wanted = {"method": method, "kind": kind, "alpha": alpha, "adapters": None, **more}
    return average([a["accuracy"] for a in found["addition"].of(**wanted)])


def average(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _less(first: float | None, second: float | None) -> Iterator[float]:
    if first is not None and second is not None:
        yield first - second


def _addition(found: Found, settings: Settings) -> Iterator[Claim]:
    zero, tuned = found["finetune"].of(kind="base"), own(found)
    arithmetic, tsv = accuracy(found, "task_arithmetic"), accuracy(found, "tsv", alpha=1.0)
    quarter = settings.num_bases[1]
    if zero:
        for gain in _less(tuned, zero[0]["accuracy"]):
            yield Claim("the adapters' own accuracy is above zero-shot by", gain, 25)
    for behind in _less(tuned, tsv):
        yield Claim("TSV-Merge at λ = 1 is behind the adapters' own accuracy by", behind, 5, at_most=True)
    for ahead in _less(tsv, arithmetic):
        yield Claim("TSV-Merge at λ = 1 is ahead of task arithmetic at its best α by", ahead, 6)
    over = accuracy(found, "iso_c", "balanced", num_bases=quarter, over="bases")
    for behind in _less(accuracy(found, "iso_c"), over):
        yield Claim(
            f"Iso-C over {quarter} balanced bases is apart from Iso-C over all by", abs(behind), 0.3, at_most=True
        )


def _budgets(found: Found) -> Iterator[Claim]:
    if "budgets" in found:
        half = found["budgets"].of(method="chosen", share=0.5, kind="lora")
        for behind in _less(own(found), average([a["accuracy"] for a in half])):
            yield Claim("a basis of half the bytes is behind the adapters' own accuracy by", behind, 0.5, at_most=True)


def _forgetting(found: Found) -> Iterator[Claim]:
    if "unlearning" not in found:
        return
    plain = found["unlearning"].of(component="plain")
    if plain:
        left = statistics.mean(100 * a["rude"] / a["rude_before"] for a in plain)
        yield Claim("per cent of the rude rate that plain negation leaves, controls kept", left, 50, at_most=True)
        kept = min(100 * a["kept"] for a in plain)
        yield Claim("per cent of the controls that plain negation keeps", kept, 95)
