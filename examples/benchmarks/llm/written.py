"""Study: the merges as the command line writes them, adapters in and an adapter out: bytes, seconds, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from evidence.runner import Answer, Question, Study

from tvbases_hf.errors import CheckpointError

from . import addition
from .merges import ALL, write_config
from .settings import Settings
from .workshop import Workshop

METHODS = ("task_arithmetic", "tsv", "iso_c", "ties")


def questions(settings: Settings) -> Iterator[Question]:
    seed, quarter = settings.seeds[0], settings.num_bases[1]
    yield from (addition.ask(method, seed=seed) for method in METHODS)
    yield addition.ask("iso_c", "balanced", quarter, seed=seed)


def answer(workshop: Workshop, question: Question) -> Answer:
    """``tvbases merge CONFIG OUT --adapter`` in a process of its own. Raises CheckpointError where it fails."""
    name = question["method"] if question["kind"] == ALL else f"{question['method']}-{question['num_bases']}"
    out = workshop.workdir / "written" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    config, errors = write_config(workshop, question), out.with_suffix(".log")
    command = [sys.executable, "-m", "tvbases_hf", "merge", str(config), str(out), "--adapter", "--quiet"]
    began = time.perf_counter()
    with errors.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise CheckpointError(f"{' '.join(command)} failed: {errors.read_text('utf-8').strip()[-300:]}")
    written = json.loads((out / "adapter_config.json").read_text("utf-8"))
    ranks = {written["r"], *written.get("rank_pattern", {}).values()}
    return {
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
        "command_seconds": time.perf_counter() - began,
        "command_processor_seconds": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "rank": max(ranks),
    }


STUDY = Study("written", questions, answer)
