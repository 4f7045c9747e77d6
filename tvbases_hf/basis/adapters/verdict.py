"""What compressing adapters brought against the trivial alternative, in sentences; and the model card."""

from __future__ import annotations

from pathlib import Path

from ...storage.cards import header
from ...storage.files import local_path, without_revision
from ...text import code_span, in_markdown, quoted
from ..info import AdapterInfo, BasisInfo

# Two errors closer than this (as a ratio, and in absolute terms) are the same: rounding tells them apart at most.
SAME_RATIO, SAME_ERROR = 1.02, 1e-6
# An error at least this much smaller (as a ratio) than that of truncation is called a gain; less is "about the same".
CLEAR_GAIN = 0.85
# An error of the stock file below this is the rounding of its float32 magnitudes.
STOCK_ROUNDING = 1e-5
# Rounding to bfloat16 costs an error of about 0.2 %: above this, half of the digits are better spent on components.
HALF_PRECISION = 0.01


def root_mean_square(errors: list[float]) -> float:
    return (sum(error**2 for error in errors) / max(1, len(errors))) ** 0.5


def verdict(info: BasisInfo) -> list[str]:
    """What came out against the trivial alternative, and why, in sentences."""
    assert info.adapters is not None
    found, trivial = root_mean_square(info.task_error), root_mean_square(info.adapters.truncation_error)
    shared = info.adapters.overlap
    by_chance = f"by chance: {shared['input_by_chance']:.0%} and {shared['output_by_chance']:.0%}"
    directions = (
        f"Two adapters have {shared['input']:.0%} of their input directions and {shared['output']:.0%} of their output "
        f"directions in common ({by_chance})."
    )
    others = {name: error for name, error in info.adapters.candidates.items() if name not in ("tsv", info.method)}
    best = min(others, key=others.__getitem__) if others else None
    if info.method == "tsv" and best is None:
        line = f"Each adapter is truncated alone: an error of {found:.1%}."
    elif info.method == "tsv":
        line = (
            "No method beats truncating each adapter alone at these bytes, so that is what is stored: an error of "
            f"{found:.1%} (the best other, {best}: {others[str(best)]:.1%})."
        )
    elif found > SAME_RATIO * trivial + SAME_ERROR:
        line = (
            f"Truncating each adapter alone at the same bytes is better: an error of {trivial:.1%} against "
            f"{found:.1%}; use method tsv, or a budget without a method."
        )
    elif found > CLEAR_GAIN * trivial:
        line = (
            f"No method beats truncating each adapter alone by much: an error of {found:.1%} ({info.method}) against "
            f"{trivial:.1%} at the same bytes."
        )
    else:
        line = f"{info.method}: an error of {found:.1%} where truncating each adapter alone gives {trivial:.1%}."
    lines = [line, directions + _reason(shared), *_stock(info.adapters)]
    if info.adapters.dtype == "float32" and info.adapters.candidates and found > HALF_PRECISION:
        lines.append("Stored in bfloat16 (--dtype), twice as many components fit into the same bytes.")
    return lines


def _stock(adapters: AdapterInfo) -> list[str]:
    """How well PEFT's DoRA, which the stock file is then, holds the sum of the vectors."""
    if not adapters.stock_error:
        return []
    exactly = "exactly up to rounding" if adapters.stock_error < STOCK_ROUNDING else "approximately"
    return [f"PEFT alone loads their weighted sum {exactly}, as DoRA (relative error {adapters.stock_error:.1e})."]


def _reason(shared: dict[str, float]) -> str:
    if shared["input"] > 0.5 and shared["input"] > 2 * shared["input_by_chance"]:
        return " Runs from one seed start from the same A matrices and stay near them, which can be stored once."
    if shared["input"] < 2 * shared["input_by_chance"]:
        return " Runs from different seeds have no A matrix in common: there is little to share."
    return ""


def adapter_card(info: BasisInfo) -> str:
    """README.md of a basis of adapters: what it is, the error of each task, how to use it with and without us."""
    assert info.adapters is not None
    adapters, first, last = info.adapters, quoted(info.tasks[0]), quoted(info.tasks[-1])
    local = local_path(info.base_id) is not None or "/" not in info.base_id
    repository, _ = without_revision(info.base_id)
    tags = ["lora", "task-arithmetic", "model-merging", "tvbases-hf"]
    head = "\n".join(header("peft", info.base_id, "adapter", tags))
    base = quoted(repository) if not local else '"path/to/the/base"'
    rows = "\n".join(
        f"| {in_markdown(task)} | {weight * adapters.alpha:.3f} | {error:.1%} | {trivial:.1%} |"
        for task, weight, error, trivial in zip(
            info.tasks, info.effective_weights, info.task_error, adapters.truncation_error, strict=True
        )
    )
    return f"""{head}

# {len(info.tasks)} adapters in one: {", ".join(map(in_markdown, info.tasks))}

A basis of {len(info.tasks)} adapters over {code_span(Path(info.base_id).name if local else info.base_id)} (method
{code_span(info.method)}). {" ".join(verdict(info))}

| task | weight in the merged adapter | relative error of the task's adapter, as stored | truncated alone, same bytes |
|---|---|---|---|
{rows}

## With PEFT alone

The directory is an ordinary LoRA, the merged multi-task adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM  # or the class that the adapters were trained with

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "path/to/this/directory")
```

## With tvbases-hf: every single task

```python
from tvbases_hf import Basis

basis = Basis.from_pretrained("path/to/this/directory")
model = basis.attach(AutoModelForCausalLM.from_pretrained({base}), task={first})
basis.select(model, {last})                    # no reloading
with basis.mixed(model, [{first}, {last}]):     # rows of one batch with different tasks
    ...
basis.adapter({first}).save_pretrained("path/to/a/lora")        # a stand-alone LoRA
basis.negate({first}, 0.5).save_pretrained("path/to/another")  # a LoRA that forgets
```

The licences of the base model and of the adapters apply.
"""
