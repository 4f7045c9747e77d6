"""README.md of a library."""

from __future__ import annotations

from pathlib import Path

from ...storage.files import local_path, without_revision
from ...storage.system import readable_size
from ...text import code_span, in_markdown, in_yaml, quoted
from ..info import BasisInfo

# Tasks that the card lists; all of them are in basis_config.json.
LISTED = 50


def library_card(info: BasisInfo) -> str:
    """What it is, the errors, how to use it with and without this package."""
    assert info.adapters is not None and info.library is not None
    local = local_path(info.base_id) is not None or "/" not in info.base_id
    repository, _ = without_revision(info.base_id)
    header = "" if local else f"base_model: {in_yaml(repository)}\n"
    shown = code_span(Path(info.base_id).name if local else info.base_id)
    base = '"path/to/the/base"' if local else quoted(repository)
    first, count, clusters = quoted(info.tasks[0]), len(info.tasks), len(info.library.clusters)
    rows = "\n".join(
        f"| {in_markdown(task)} | {error:.1%} | {member.cluster if member.cluster >= 0 else 'none'} |"
        for task, error, member in list(zip(info.tasks, info.task_error, info.library.members, strict=True))[:LISTED]
    )
    more = f"\n{count - LISTED} more are in basis_config.json.\n" if count > LISTED else ""
    mean = (sum(error**2 for error in info.task_error) / count) ** 0.5
    return f"""---
library_name: peft
tags: [lora, task-arithmetic, model-merging, tvbases-hf]
{header}---

# A library of {count} adapters

Of {count} adapters over {shown}, {readable_size(info.adapters.adapters_bytes)} as they were: in {clusters} clusters
that share directions, each adapter a small core between them. The root mean square of their relative errors is
{mean:.1%}.

| task | relative error of the task's adapter, as stored | cluster |
|---|---|---|
{rows}
{more}
## With PEFT alone

The directory is an ordinary LoRA: the sum of all tasks, times {info.adapters.alpha:g}, cut to a small rank (what is cut
off is {info.adapters.stock_error:.1%} of it).

## With tvbases-hf: every single task

```python
from transformers import AutoModelForCausalLM  # or the class that the adapters were trained with

from tvbases_hf import Basis

library = Basis.from_pretrained("path/to/this/directory")
library.adapter({first}).save_pretrained("path/to/a/lora")  # a stand-alone LoRA
few = library.only([{first}])                               # some tasks, to switch between without loading
model = few.attach(AutoModelForCausalLM.from_pretrained({base}), task={first})
```

`tvbases library list`, `export`, `add` and `remove` do the same from the command line. The licences of the base model
and of the adapters apply.
"""
