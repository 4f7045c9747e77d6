"""What RESULTS.md consists of: one paragraph per section that says what was asked, then its tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evidence.runner import Answers

from ..settings import Settings
from . import addition, more


@dataclass(frozen=True)
class Section:
    """Shown if the studies that it ``needs`` were asked; ``bodies`` are tables to make and names of figures."""

    title: str
    needs: set[str]
    text: str
    bodies: list[str | Callable[[Mapping[str, Answers], Settings], str]]


def sections(settings: Settings) -> list[Section]:
    m = settings.half
    return [
        Section(
            "The fine-tunes", {"finetune"}, "What every model answers rightly of its own task.", [addition.fine_tunes]
        ),
        Section(
            "Addition",
            {"addition"},
            "One model for all tasks from all task vectors, or from M. The paper's columns are ViT-B/32 on 8 vision "
            "tasks at M = 50 %: compare the order, not the height. Bold: what `ae_bases` does by default.",
            [addition.main_table, "addition"],
        ),
        Section(
            "Every method, over bases and over reconstructions",
            {"addition", "with_data"},
            "The first fine-tuning seed, and the first selection of RandSelect. `varpro` and Adam solve the same "
            "problem; balanced rows make the sum of the bases the sum of the task vectors; normalised: every task's "
            "error counts relative to its own length. PCA's reconstructions need its mean, one more vector. Over M "
            "bases a method that needs data sees M / T of the sentences. Those that learn (the last three) take fewer "
            "and longer steps than published; AdaMerging and aTLAS find their own length. Fisher draws one label a "
            "sentence.",
            [addition.product, addition.costs],
        ),
        Section(
            "Accuracy against M",
            {"addition", "sizes", "losses"},
            "Task arithmetic, the first fine-tuning seed. Balanced bases have the sum of all vectors whatever M is.",
            [addition.sizes, "sizes"],
        ),
        Section("Temperature", {"temperature"}, f"The paper's AE (Adam, 4000 steps), M = {m}.", [addition.temperature]),
        Section(
            "Validation sentences",
            {"subsamples"},
            f"The paper's AE, M = {m}, task arithmetic: alpha chosen on that many sentences a task, over 20 redraws.",
            [addition.subsamples],
        ),
        Section(
            "Negation",
            {"negation"},
            "One task is taken away, with the largest alpha that leaves the others 95 % of the base's accuracy on "
            f"validation sentences; mean and deviation over the tasks. M = {m} vectors, PCA's mean counted among them.",
            [more.forgetting, "negation"],
        ),
        Section(
            "Online",
            {"online"},
            f"Tasks arrive one after another, {settings.orders} orders, memory for M = {m} vectors (the last four: "
            "for the merged one). Alpha is fixed beforehand, as in the paper; continual TIES, MagMax and OPCM stay as "
            "long as they are. ± is over the orders.",
            [more.in_order],
        ),
        Section(
            "Unseen tasks",
            {"ood"},
            f"aTLAS learns a coefficient per vector and weight from {settings.shots} sentences per label; M = {m}.",
            [more.unseen],
        ),
        Section(
            "TSV-Merge",
            {"ablation", "untuned"},
            "All vectors, the first fine-tuning seed. Below: over bases with an alpha that is not tuned; convex bases "
            "are shorter than task vectors by T / M.",
            [more.singular_merge, more.untuned],
        ),
        Section(
            "TSV-Compress",
            {"compression", "adapters"},
            "Every task's own accuracy with its own truncated vector.",
            [more.singular_compression, "bytes"],
        ),
        Section(
            "Shared components (DeVec)",
            {"fractions", "gains"},
            "Per cent of two tasks' energy that lies in directions they share, mean over pairs; in brackets what "
            "random subspaces of the same ranks share. Then: merging with every pair's shared component as one more "
            "vector; task arithmetic weighs all of them by one alpha, which is another experiment than the paper's.",
            [more.shared, more.shared_gain],
        ),
        Section(
            "Trained coefficients (DeVec's protocol)",
            {"devec_trained"},
            f"A coefficient for every vector and for what every pair shares, trained on {settings.shots} sentences per "
            "label: of all tasks, of a task without a vector (Table 2), of all with one vector left out (Table 3).",
            [more.trained_coefficients],
        ),
        Section(
            "Bases of adapters",
            {"adapters"},
            "chosen: the best basis within that share of the bytes; tsv: every adapter truncated alone.",
            [more.adapter_bases],
        ),
        Section(
            "Bounds",
            {"bounds"},
            "The AE paper's section 3.2.3 on training sentences, in nats. A bound is certain if no assumption fails.",
            [more.theory],
        ),
    ]
