"""RESULTS.md: sections in order, each with one paragraph that says what was asked, and its tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from evidence.claims import verdicts
from evidence.runner import Answers

from tvbases_hf import __version__

from ..addition import FEW
from ..settings import MANY, Settings
from . import figures
from .claims import claims
from .sections import sections

Found = Mapping[str, Answers]
SHOWN = "figures"


def write(found: Found, settings: Settings, file: Path) -> None:
    """Write ``file`` and, in the folder figures/ beside it, the pictures."""
    names = figures.draw(found, settings, file.parent / SHOWN)
    pictures = {name.removesuffix(".png"): f"![{name}]({SHOWN}/{name})" for name in names}
    parts = [head(found, settings), verdicts(claims(found, settings))]
    for section in sections(settings):
        if section.needs <= set(found):
            bodies = [pictures[body] if isinstance(body, str) else body(found, settings) for body in section.bodies]
            parts.append("\n\n".join([f"## {section.title}", section.text, *bodies]))
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def head(found: Found, settings: Settings) -> str:
    spent = {name: sum(a["processor_seconds"] for _, a in answers) for name, answers in found.items()}
    costs = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in spent.items() if seconds >= 30)
    recipe = settings.recipe
    fewer = "" if settings.everything else f" (for TIES and TSV-M {min(FEW, settings.draws)})"
    options = " ARGS=--quick" if settings.name == "quick" else " ARGS=--all" if settings.everything else ""
    options = f" ARGS='--many {len(settings.tasks)}'" if settings in MANY else options
    return f"""# Results on real text

Written by `make bench-text{options}`; do not edit.

all-MiniLM-L6-v2 (22 M parameters) with a frozen zero-shot head, fine-tuned on {len(settings.tasks)} text tasks
({", ".join(settings.tasks)}) that are merged, and on {len(settings.unseen)} ({", ".join(settings.unseen)}) that
nobody has a vector for. {settings.train} training sentences a task, {recipe.epochs} epochs, AdamW {recipe.lr:g}, batch
{recipe.batch}, {recipe.max_tokens} tokens; adapters {recipe.lora_epochs} epoch, {recipe.lora_lr:g}.
{len(settings.seeds)} fine-tuning seed{"s" if len(settings.seeds) > 1 else ""}, {settings.draws} different RandSelect
subsets for each{fewer}. Every alpha is chosen on {settings.validation} validation sentences of each task;
accuracies, in per cent, are those on {settings.test} test sentences of each. ± is a standard deviation over
runs. Evaluation in bfloat16.

tvbases-hf {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processor
cores. {sum(spent.values()) / 60:.0f} minutes of one core in all, two processes share them: {costs}."""
