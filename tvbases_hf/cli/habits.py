"""Options of mergekit's that fingers know: understood, or answered with what there is instead."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..errors import ParameterError
from ..text import printable

NO_USE = "An option of mergekit's that has no use here."
# Said of each where it is given; the merge goes on.
NOT_NEEDED = {
    "copy_tokenizer": "the tokenizer is always copied: the base's, or the fine-tunes' where all agree on another",
    "lazy_unpickle": "files are mapped, never loaded whole",
    "low_cpu_memory": "one piece of a weight is in memory at a time; --memory sets a limit",
    "lora_merge_cache": "adapters are added in their factors, and never merged into models first",
}


def _answered(parameter: typer.CallbackParam, value: Any) -> Any:
    if value:
        name = str(parameter.name)
        print(printable(f"note: --{name.replace('_', '-')} is not needed: {NOT_NEEDED[name]}"), file=sys.stderr)
    return value


def _refused(value: str | None) -> str | None:
    if value is not None:
        raise ParameterError("--out-shard-size: shards have 5 GB here; tvbases mergekit-yaml writes others")
    return value


Cuda = Annotated[bool, typer.Option("--cuda", help="mergekit's --device cuda.", hidden=True)]
CopyTokenizer = Annotated[bool, typer.Option("--copy-tokenizer", help=NO_USE, hidden=True, callback=_answered)]
LazyUnpickle = Annotated[bool, typer.Option("--lazy-unpickle", help=NO_USE, hidden=True, callback=_answered)]
LowCpuMemory = Annotated[bool, typer.Option("--low-cpu-memory", help=NO_USE, hidden=True, callback=_answered)]
LoraMergeCache = Annotated[str | None, typer.Option("--lora-merge-cache", help=NO_USE, hidden=True, callback=_answered)]
OutShardSize = Annotated[str | None, typer.Option("--out-shard-size", help=NO_USE, hidden=True, callback=_refused)]
