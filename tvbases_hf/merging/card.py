"""README.md of a merge, or of an edit: the recipe, what went into it, what was lost, how to load it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..storage.cards import header
from ..storage.files import local_path, without_revision
from ..text import code_block, code_span, in_markdown, quoted
from .merge import Merge

# Relative errors below this are the rounding of float32 factors.
ROUNDING = 1e-6

CHECKPOINT_USE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")"""
ADAPTER_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "path/to/this/directory")"""


def model_card(merge: Merge, report: dict[str, Any]) -> str:
    """Markdown with the Hub's header; local paths are named by their last part only, except in the recipe."""
    base, adapter = report["base"], report["kind"] == "adapter"
    library, relation = ("peft", "adapter") if adapter else ("transformers", "merge")
    merged = () if adapter else report["models"]  # the Hub takes the base alone for what an adapter goes on
    use = ADAPTER_USE.format(base=quoted(without_revision(base)[0])) if adapter else CHECKPOINT_USE
    lines = [
        *header(library, base, relation, ["merge", "mergekit", "task-arithmetic"], merged),
        "",
        f"# {len(report['models'])} models merged by {report['method']}",
        "",
        f"Merged over {_short(base)}: " + ", ".join(map(_short, report["models"])) + ".",
        f"{report['changed']} of {report['tensors']} tensors change. {fidelity(report)}",
        *_missing(report),
        *_table(report),
        "",
        code_block(merge.recipe, "yaml"),
        "",
        code_block(use, "python"),
        "",
        "The licences of the base model and of the merged models apply.",
    ]
    return "\n".join(lines) + "\n"


def edit_card(note: str, base: str, *, adapter: bool, made_of: Iterable[str] = ()) -> str:
    """Of one task restored, forgotten, or split into components: ``note`` says in a line which, and is its title."""
    library, relation = ("peft", "adapter") if adapter else ("transformers", "finetune")
    use = ADAPTER_USE.format(base=quoted(without_revision(base)[0])) if adapter else CHECKPOINT_USE
    models = ", ".join(_short(model) for model in made_of)
    what = "An adapter" if adapter else "A checkpoint"
    lines = [
        *header(library, base, relation, ["task-arithmetic"]),
        "",
        f"# {in_markdown(note)}",
        "",
        f"{what} over {_short(base)}{f', made of {models}' if models else ''}.",
        "",
        code_block(use, "python"),
        "",
        "The licences of the base model and of the fine-tuned models apply.",
    ]
    return "\n".join(lines) + "\n"


def fidelity(report: dict[str, Any]) -> str:
    """How exactly the files hold what the method computes, in one sentence."""
    if report["kind"] == "checkpoint":
        return f"The sum of base and change was rounded once, to {report['dtype']}."
    ranks = report["ranks"]
    rank = "no factors" if not ranks else f"rank {max(ranks)}" if len(ranks) == 1 else f"ranks up to {max(ranks)}"
    if report["error"]["all"] < ROUNDING:
        return f"The adapter ({rank}, {report['dtype']}) holds the merged change exactly, up to float32 rounding."
    return (
        f"The adapter ({rank}, {report['dtype']}) misses {report['error']['all']:.3%} of the merged change, "
        "in Frobenius norm."
    )


def _missing(report: dict[str, Any]) -> list[str]:
    return [
        f"{_short(model)} leaves {count} of the tensors that others change as they are."
        for model, count in report["missing"].items()
    ]


def _table(report: dict[str, Any]) -> list[str]:
    errors = report.get("error", {})
    if errors.get("all", 0.0) < ROUNDING:
        return []
    rows = [f"| {in_markdown(group)} | {error:.3%} |" for group, error in errors.items()]
    return ["", "| layers | relative error of the change |", "|---|---|", *rows]


def _short(label: str) -> str:
    """``a/b/base+c/math`` as ``math``; a Hub id stays whole. As code."""
    last = label.rpartition("+")[2]
    return code_span(Path(last).name if local_path(last) else last)
