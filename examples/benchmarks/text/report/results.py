"""RESULTS.md: sections in order, each with one paragraph that says what was asked, and its tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tvbases_hf import __version__

from ..runner import Answers
from ..settings import Settings
from . import addition, figures, more
from .claims import Claim, claims
from .markdown import table

Found = Mapping[str, Answers]
SHOWN = "figures"


def write(found: Found, settings: Settings, file: Path) -> None:
    """Write ``file`` and, in the folder figures/ beside it, the pictures."""
    names = figures.draw(found, settings, file.parent / SHOWN)
    pictures = {name.removesuffix(".png"): f"![{name}]({SHOWN}/{name})" for name in names}
    parts = [head(found, settings), verdicts(claims(found, settings))]
    for title, text, bodies in sections(settings):
        parts.append("\n\n".join([f"## {title}", text, *(_body(body, found, settings, pictures) for body in bodies)]))
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


Body = str | Callable[[Found, Settings], str]


def _body(body: Body, found: Found, settings: Settings, pictures: Mapping[str, str]) -> str:
    return pictures[body] if isinstance(body, str) else body(found, settings)


def head(found: Found, settings: Settings) -> str:
    spent = {name: sum(a["processor_seconds"] for _, a in answers) for name, answers in found.items()}
    costs = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in spent.items() if seconds >= 30)
    recipe = settings.recipe
    return f"""# Results on real text

Written by `make bench-text`{" ARGS=--quick" if settings.name == "quick" else ""}; do not edit.

all-MiniLM-L6-v2 (22 M parameters) with a frozen zero-shot head, fine-tuned on {len(settings.tasks)} text tasks
({", ".join(settings.tasks)}) that are merged, and on {len(settings.unseen)} ({", ".join(settings.unseen)}) that
nobody has a vector for. {settings.train} training sentences a task, {recipe.epochs} epochs, AdamW {recipe.lr:g}, batch
{recipe.batch}, {recipe.max_tokens} tokens; adapters {recipe.lora_epochs} epoch, {recipe.lora_lr:g}.
{len(settings.seeds)} fine-tuning seed{"s" if len(settings.seeds) > 1 else ""}, {settings.draws} different RandSelect
subsets for each. Every alpha is chosen on {settings.validation} validation sentences of each task; accuracies, in per
cent, are those on {settings.test} test sentences of each. ± is a standard deviation over runs. Evaluation in bfloat16.

tvbases-hf {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processor
cores. {sum(spent.values()) / 60:.0f} minutes of one core in all, two processes share them: {costs}."""


def verdicts(listed: list[Claim]) -> str:
    rows = [
        [c.text, f"{c.measured:.1f}", f"{'≤' if c.at_most else '≥'} {c.needed:.1f}", "yes" if c.holds else "**no**"]
        for c in listed
    ]
    held = sum(claim.holds for claim in listed)
    return f"## What holds\n\n{held} of {len(listed)}, in points of accuracy.\n\n" + table(
        ["claim", "measured", "needed", "holds"], rows
    )


def sections(settings: Settings) -> list[tuple[str, str, list[Body]]]:
    m = settings.half
    return [
        ("The fine-tunes", "What every model answers rightly of its own task.", [addition.fine_tunes]),
        (
            "Addition",
            "One model for all tasks from all task vectors, or from M. The paper's columns are ViT-B/32 on 8 vision "
            "tasks at M = 50 %: compare the order, not the height. Bold: what `ae_bases` does by default.",
            [addition.main_table, "addition"],
        ),
        (
            "Other bases, and merging the reconstructions",
            "The first fine-tuning seed. `varpro` and Adam solve the same problem; balanced rows make the sum of the "
            "bases the sum of the task vectors; normalised: every task's error counts relative to its own length. "
            "PCA's reconstructions need its mean, one more vector.",
            [addition.variants],
        ),
        (
            "Methods that learn, or average by statistics",
            "The first fine-tuning seed. Over M vectors a method sees M / T of the sentences. Those that learn take "
            "fewer and longer steps than published.",
            [addition.methods],
        ),
        (
            "Accuracy against M",
            "Task arithmetic, the first fine-tuning seed. Balanced bases have the sum of all vectors whatever M is.",
            [addition.sizes, "sizes"],
        ),
        ("Temperature", f"The paper's AE (Adam, 4000 steps), M = {m}.", [addition.temperature]),
        (
            "Validation sentences",
            f"The paper's AE, M = {m}, task arithmetic: alpha chosen on that many sentences a task, over 20 redraws.",
            [addition.subsamples],
        ),
        (
            "Negation",
            "One task is taken away, with the largest alpha that leaves the others 95 % of the base's accuracy on "
            f"validation sentences; mean and deviation over the tasks. M = {m} vectors, PCA's mean counted among them.",
            [more.forgetting, "negation"],
        ),
        (
            "Online",
            f"Tasks arrive one after another, {settings.orders} orders, memory for M = {m} vectors (the last four: "
            "for the merged one). Alpha is fixed beforehand, as in the paper. ± is over the orders.",
            [more.in_order],
        ),
        (
            "Unseen tasks",
            f"aTLAS learns a coefficient per vector and weight from {settings.shots} sentences per label; M = {m}.",
            [more.unseen],
        ),
        (
            "TSV-Merge",
            "All vectors, the first fine-tuning seed. Below: over bases with an alpha that is not tuned; convex bases "
            "are shorter than task vectors by T / M.",
            [more.singular_merge, more.untuned],
        ),
        (
            "TSV-Compress",
            "Every task's own accuracy with its own truncated vector.",
            [more.singular_compression, "bytes"],
        ),
        (
            "Shared components (DeVec)",
            "Per cent of two tasks' energy that lies in directions they share, mean over pairs; in brackets what "
            "random subspaces of the same ranks share. Then: merging with every pair's shared component as one more "
            "vector.",
            [more.shared, more.shared_gain],
        ),
        (
            "Bases of adapters",
            "chosen: the best basis within that share of the bytes; tsv: every adapter truncated alone.",
            [more.adapter_bases],
        ),
        (
            "Bounds",
            "The AE paper's section 3.2.3 on training sentences, in nats. A bound is certain if no assumption fails.",
            [more.theory],
        ),
    ]
