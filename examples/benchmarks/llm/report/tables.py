"""The tables of RESULTS-LLM.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.markdown import spread, table

from .. import others
from ..merges import ALL, KINDS, METHODS
from ..settings import Settings
from .claims import Found, own

Cell = tuple[Mapping[str, Any], Mapping[str, Any]]
FINE_TUNES = {"apart": ", LoRAs of their own first weights", "dora": ", DoRAs", "full": ", three full fine-tunes"}
BITS = 0.005
"""Bits per byte: by so much worse text counts as worse."""


def fine_tunes(found: Found, settings: Settings) -> str:
    tuned = found["finetune"]
    names = {"lora": "LoRA", "apart": "LoRA, first weights of its own", "dora": "DoRA", "full": "full"}
    kinds = {kind: title for kind, title in names.items() if tuned.of(kind=kind)}
    base = tuned.one(kind="base") if tuned.of(kind="base") else None
    rows = []
    for task in settings.tasks:
        zero = f"{base['tasks'][task]:.1f}" if base else ""
        rows.append([task, zero, *(spread([a["accuracy"] for a in tuned.of(task=task, kind=k)]) for k in kinds)])
    means = [f"**{own(found, kind):.1f}**" for kind in kinds]
    rows += [
        [f"*{d}*, bits per byte", *_text_cells(found, base, d, kinds)] for d in settings.domains if _text(found, d)
    ]
    rows.append(["**mean**", f"**{base['accuracy']:.1f}**" if base else "", *means])
    return table(["task", "zero-shot", *kinds.values()], rows)


def _text(found: Found, domain: str) -> list[dict[str, Any]]:
    return found["finetune"].of(kind="text", task=domain)


def _text_cells(found: Found, base: Any, domain: str, kinds: Mapping[str, str]) -> list[str]:
    """Bits per byte before, and after a LoRA has read the domain."""
    before = f"{base['abilities']['texts'][domain]:.3f}" if base else ""
    return [before, f"{_text(found, domain)[0]['bits'][domain]:.3f}", *[""] * (len(kinds) - 1)]


def title_of(question: Mapping[str, Any]) -> str:
    """What a row merges, and over what."""
    method = METHODS[question["method"]].title + FINE_TUNES.get(question.get("adapters", "lora"), "")
    if question["kind"] == ALL:
        return method
    over = "" if question["over"] == "bases" else ", reconstructions"
    return f"{method} over {question['num_bases']} {KINDS[question['kind']][0]}{over}"


def merged_rows(found: Found) -> dict[str, list[Mapping[str, Any]]]:
    """Answers by row title, of all seeds; PEFT's among them."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for question, answer in found.get("addition", ()):
        fixed = f", α = {question['alpha']:g}" if "alpha" in question else ""
        rows.setdefault(title_of(question) + fixed, []).append(answer)
    for question, answer in found.get("peft", ()):
        rows.setdefault(f"PEFT {others.PEFT[question['method']][0]}", []).append(answer)
    return rows


def merges(found: Found, settings: Settings) -> str:
    """All merges, the best first."""
    base = _base(found)
    rows = sorted(merged_rows(found).items(), key=lambda row: -_mean(row[1], "accuracy"))
    shown = [_merge_row(title, answers, own(found)) for title, answers in rows]
    if base:
        shown.append(
            ["*the base*", "", f"{base['accuracy']:.1f} ± {base['error']:.1f}", "", *_abilities([base]), "", ""]
        )
    header = ["merge", "α", "accuracy", "of own", "instructions", "bits per byte", "seconds", "seeds"]
    return table(header, shown)


def _merge_row(title: str, answers: Sequence[Mapping[str, Any]], of_own: float | None) -> list[str]:
    accuracy = _mean(answers, "accuracy")
    error = _mean(answers, "error")
    share = f"{100 * accuracy / of_own:.1f} %" if of_own else ""
    alphas = ", ".join(f"{a['alpha']:g}" for a in answers)
    seconds = f"{_mean(answers, 'merging_seconds'):.0f}"
    return [title, alphas, f"{accuracy:.1f} ± {error:.1f}", share, *_abilities(answers), seconds, str(len(answers))]


def _abilities(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [a["abilities"] for a in answers if "abilities" in a]
    return [f"{_mean(known, 'followed'):.0f} %", f"{_mean(known, 'bits'):.3f}"] if known else ["", ""]


def abilities(found: Found, settings: Settings) -> str:
    """Per row: in how many of its draws (seeds x abilities) a merge is below the base."""
    base = _base(found)
    if not base:
        return ""
    rows = []
    for title, answers in merged_rows(found).items():
        drawn = [a["abilities"] for a in answers if "abilities" in a]
        kinds = list(drawn[0]["instructions"]) if drawn else []
        worse = sum(a["instructions"][k] < base["abilities"]["instructions"][k] for a in drawn for k in kinds)
        texts = list(drawn[0]["texts"]) if drawn else []
        harmed = sum(a["texts"][t] > base["abilities"]["texts"][t] + BITS for a in drawn for t in texts)
        tasks = sum(a["tasks"][t] < base["tasks"][t] for a in answers for t in a["tasks"])
        counts = [len(answers) * len(answers[0]["tasks"]), len(drawn) * len(kinds), len(drawn) * len(texts)]
        rows.append([title, *(f"{n} of {of}" for n, of in zip((tasks, worse, harmed), counts, strict=True))])
    rows.sort(key=lambda row: [int(cell.split()[0]) for cell in row[1:]])
    return table(["merge", "tasks", "kinds of instructions", "text domains"], rows)


def _base(found: Found) -> Mapping[str, Any] | None:
    bases = found["finetune"].of(kind="base")
    return bases[0] if bases else None


def _mean(answers: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(a[key] for a in answers)
