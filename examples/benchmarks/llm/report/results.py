"""RESULTS-LLM.md: a first screen, what holds, then a section for every study that has answers."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from evidence.claims import verdicts

from tvbases_hf import __version__

from ..settings import Settings
from ..workshop import Workshop
from . import figures, forgetting, more, screen, tables
from .claims import Found, claims

SHOWN = "figures"


@dataclass(frozen=True)
class Section:
    """Shown if the study ``needs`` has answers; ``bodies`` are tables to make and names of figures."""

    title: str
    needs: str
    text: str
    bodies: tuple[str | Callable[[Found, Settings], str], ...]


SECTIONS = (
    Section(
        "The fine-tunes",
        "finetune",
        "What every model answers rightly of its own task. All adapters of a seed begin with the same first weights.",
        (tables.fine_tunes,),
    ),
    Section(
        "One model for all tasks",
        "addition",
        "Every merge is a mergekit YAML. α is chosen on validation prompts of all tasks unless it is given; over M "
        "bases it counts times T / M, so it means the same as over all. Accuracy is the mean over the tasks, ± its "
        "standard error; *of own*: relative to the adapters' own. Instructions: per cent that are followed, by a rule; "
        "bits per byte of the text domains: lower is better. Seconds to compute the merge.",
        (tables.merges, "llm_merges"),
    ),
    Section(
        "Never below the base",
        "addition",
        "In how many draws (seeds and tasks, kinds of instructions, text domains) a merge is worse than the base; of "
        f"text by more than {tables.BITS} bits per byte.",
        (tables.abilities,),
    ),
    Section(
        "Written by the command",
        "written",
        "`tvbases merge CONFIG OUT --adapter`: eight adapters in, one out, whose rank is that of the merged change. "
        "Start-up is in the seconds of one core; memory is the process's peak.",
        (more.written,),
    ),
    Section(
        "What is lost",
        "causes",
        "The first seed. Calibrated: every word's mean log-likelihood over the prompts is taken off, which needs no "
        "labels (batch calibration). What that gives back was lost to the words' odds, not to telling prompts apart.",
        (more.causes,),
    ),
    Section(
        "One bad adapter of eight",
        "spoilt",
        "What the other tasks keep, and the first task itself, where the first task's adapter has learnt shuffled "
        "labels, or was trained over another base (the same model that has read one of the text domains with all of "
        "its weights; `tvbases merge` refuses it, exit 2, while the adapter names that base, so the name was changed). "
        "The mean over the seeds.",
        (more.spoilt,),
    ),
    Section(
        "How many tasks",
        "counts",
        "Merges of the first tasks alone, asked those tasks; the first seed.",
        (more.by_count,),
    ),
    Section(
        "Basis directories",
        "budgets",
        "Every task's own accuracy from one directory of fewer bytes; chosen: what loses least within them; tsv: every "
        "adapter truncated alone.",
        (more.budgets, "llm_bytes"),
    ),
    Section(
        "Serving a basis directory",
        "served",
        "The same prompts answered by a directory of half the bytes, against weights changed in place.",
        (more.served,),
    ),
    Section(
        "Unlearning",
        "unlearning",
        "A DoRA adapter that answers harmless prompts rudely, contained in a merge with useful tasks, is taken away "
        "again by β times a direction. First: the largest β at which the useful tasks keep 95 % of their accuracy. "
        "Rude: the share of sampled replies to held-out prompts that alt-profanity-check calls toxic, through "
        "`tvbases_toxigen_generate`; afterwards: after as many steps of polite replies to other prompts. KL: from the "
        "base, nats a token. Then: what is lost where two thirds of the rude rate are gone, interpolated, and the "
        "difference from the plain vector over the seeds, with its 95 % interval (t).",
        (forgetting.kept, forgetting.matched, forgetting.samples),
    ),
)


def write(found: Found, missing: Mapping[str, int], workshop: Workshop, file: Path) -> None:
    """Write ``file`` and, in the folder figures/ beside it, the pictures."""
    settings = workshop.settings
    names = figures.draw(found, settings, file.parent / SHOWN)
    parts = [head(found, missing, workshop), screen.screen(found, settings)]
    listed = claims(found, settings)
    if listed:
        parts.append(verdicts(listed))
    for section in SECTIONS:
        if section.needs in found:
            pictures = {name: f"![{name}]({SHOWN}/{name}.png)" for name in names}
            bodies = [pictures.get(b, "") if isinstance(b, str) else b(found, settings) for b in section.bodies]
            parts.append("\n\n".join([f"## {section.title}", section.text, *filter(None, bodies)]))
    file.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def head(found: Found, missing: Mapping[str, int], workshop: Workshop) -> str:
    settings, recipe = workshop.settings, workshop.settings.recipe
    spent = {name: sum(a["processor_seconds"] for _, a in answers) for name, answers in found.items()}
    costs = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in spent.items())
    absent = {name: count for name, count in missing.items() if count}
    left = ", ".join(f"{count} of {name}" for name, count in absent.items())
    origin = "from its package's four-bit file" if workshop.base.name == "base" else "from the Hub"
    told = [
        f"{screen.name_of(workshop)}, {origin}, fine-tuned on {len(settings.tasks)} tasks of real text "
        f"({', '.join(settings.tasks)}): LoRA of rank {recipe.rank} on every linear layer, {recipe.steps} steps of "
        f"{recipe.batch} prompts, AdamW {recipe.lora_lr:g}, loss on the word that answers. Texts are cut to "
        f"{settings.words} words. lm-eval measures every model: {settings.test} test prompts a task, answered by "
        f"log-likelihood; every α is chosen on {settings.validation} validation prompts a task. "
        f"{len(found['finetune'].of(kind='lora'))} LoRAs are in the tables. Processors compute in float32.",
        f"tvbases-hf {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} "
        f"processor cores. {sum(spent.values()) / 60:.0f} minutes of one core in all: {costs}.",
        f"Not asked yet, and so not below: {left}. The command goes on with them." if absent else "",
    ]
    options = " ARGS=--quick" if settings.name == "quick" else " ARGS=--all" if settings.everything else ""
    first = f"# Results on a language model\n\nWritten by `make bench-llm{options}`; do not edit."
    return "\n\n".join([first, *(textwrap.fill(text, 120) for text in told if text)])
