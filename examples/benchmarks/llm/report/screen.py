"""The first screen: one YAML and what it is worth, short enough to be quoted."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.markdown import table

from ..merges import ALL
from ..settings import Settings
from ..workshop import Workshop
from .claims import Found, own

YAML = """```yaml
merge_method: tsv             # every adapter's leading directions, made orthogonal to the others'
base_model: SmolLM2-135M-Instruct
models: [{models}]
parameters: {lambda: 1.0}
```
`tvbases merge tsv.yml merged-lora/ --adapter`"""
ROWS = (
    ("tsv", 1.0, "TSV-Merge, λ = 1"),
    ("iso_c", None, "Iso-C"),
    ("ties", None, "TIES"),
    ("task_arithmetic", None, "task arithmetic"),
)


def screen(found: Found, settings: Settings) -> str:
    """Empty where there is no merge yet."""
    base, rows = found["finetune"].of(kind="base"), []
    if "addition" not in found or not base:
        return ""
    before = base[0]
    for method, alpha, title in ROWS:
        answers = found["addition"].of(method=method, kind=ALL, alpha=alpha, adapters=None)
        if answers:
            rows.append(_row(title, answers))
    rows.sort(key=lambda row: -float(row[1]))
    tuned = own(found)
    rows = [["each task its own adapter", f"{tuned:.1f}", "", ""], *rows, _row("the base, zero-shot", [before])]
    header = [f"one model, {len(settings.tasks)} tasks", "accuracy, %", "instructions followed, %", "bits per byte"]
    shown = ", ".join(settings.tasks[:3]) + ", ..."
    return f"## In short\n\n{YAML.replace('{models}', shown)}\n\n{table(header, rows)}"


def _row(title: str, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    mean = statistics.mean(a["accuracy"] for a in answers)
    followed = statistics.mean(a["abilities"]["followed"] for a in answers)
    bits = statistics.mean(a["abilities"]["bits"] for a in answers)
    return [title, f"{mean:.1f}", f"{followed:.0f}", f"{bits:.2f}"]


def name_of(workshop: Workshop) -> str:
    """The model, by the name that it was asked for, or its configuration's size."""
    asked = workshop.source.partition("|")[2]
    if asked not in ("auto", "package", ""):
        return asked
    config = json.loads((workshop.base / "config.json").read_text(encoding="utf-8"))
    return f"SmolLM2-135M-Instruct with {config['num_hidden_layers']} layers of {config['hidden_size']}"
