"""The command: ask every study, write RESULTS-LLM.md and its figures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence import archive
from evidence.runner import Answers, Study, known, run

from tvbases_hf.errors import TvbasesError

from . import addition, base, budgets, causes, finetune, others, spoilt, unlearning, written
from .report import results
from .settings import EVERYTHING, FULL, QUICK, Settings
from .workshop import Workshop

WORKDIR = Path("~/.cache/tvbases-hf/llm")
RESULTS = Path(__file__).resolve().parents[1] / "RESULTS-LLM.md"
KEPT = archive.FOLDER / "llm.tar.gz"
MODEL = "LLM"

# In the order in which they are asked; the fine-tunes have to be first.
STUDIES: tuple[Study, ...] = (
    finetune.STUDY,
    addition.STUDY,
    budgets.STUDY,
    budgets.SERVED,
    written.STUDY,
    causes.STUDY,
    others.COMBINED,
    others.COUNTED,
    spoilt.STUDY,
    unlearning.STUDY,
)


def answers(workshop: Workshop, processes: int) -> dict[str, Answers]:
    """Everything, from the files of an earlier run where these hold; the fine-tunes first, as all else needs them."""
    workshop.workdir.mkdir(parents=True, exist_ok=True)
    print(f"The base is {workshop.base}; the tasks are in {workshop.folder}")
    tuned = run(STUDIES[:1], workshop, processes)
    return tuned | run([s for s in STUDIES[1:] if workshop.settings.asks(s.name)], workshop, processes)


def stored(workshop: Workshop) -> tuple[dict[str, Answers], dict[str, int]]:
    """The answers that an earlier run left, and how many of each study are missing."""
    found, missing = {}, {}
    for study in (s for s in STUDIES if s is STUDIES[0] or workshop.settings.asks(s.name)):
        asked = list(study.questions(workshop.settings))
        found[study.name] = known(workshop, study)
        missing[study.name] = len(asked) - len(found[study.name].found)
    return {name: answers for name, answers in found.items() if answers.found}, missing


def main(arguments: Sequence[str] | None = None) -> Mapping[str, Answers]:
    parser = argparse.ArgumentParser(
        description="Merging, compressing and unlearning on a language model; writes RESULTS-LLM.md. A run that was "
        "interrupted goes on where it stopped.",
        epilog="example: LLM=HuggingFaceTB/SmolLM2-360M-Instruct python examples/benchmarks/bench_llm.py --quick",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four tasks, one seed, the main claims only")
    size.add_argument("--all", action="store_true", help="DoRA, full fine-tunes and text domains too; goes on likewise")
    parser.add_argument("--report", action="store_true", help="ask nothing: write what earlier runs have answered")
    parser.add_argument("--anew", action="store_true", help="do not go on from the answers kept in answers/")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one per core (the default)")
    parser.add_argument("--workdir", type=Path, default=WORKDIR, help=f"models and answers (default: {WORKDIR})")
    parser.add_argument("--tasks", default="auto", help="a tasks.json.gz or hub; default: that file if found, else hub")
    parser.add_argument(
        "--model", default=os.environ.get(MODEL, "auto"), help=f"a path or Hub id; default: ${MODEL}, else {base.HUB}"
    )
    parser.add_argument("--out", type=Path, help="the results; default: RESULTS-LLM.md beside this script, if in full")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else EVERYTHING if options.all else FULL
    workdir = options.workdir.expanduser().absolute() / directory(options.model, settings)
    out = options.out or (workdir / RESULTS.name if options.quick or options.model != "auto" else RESULTS)
    workshop = Workshop(workdir, settings, f"{options.tasks}|{options.model}")
    ours = out == RESULTS
    try:
        if ours and not options.anew:
            archive.unpack(KEPT, workdir / "answers")
        if not options.report:
            answers(workshop, options.processes)
        found, missing = stored(workshop)
    except TvbasesError as error:
        parser.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(found, missing, workshop, out)
    if ours:
        archive.pack(workdir / "answers", KEPT)
    print(f"Results {out}\nModels and answers {workdir}")
    return found


def directory(model: str, settings: Settings) -> str:
    """Of the answers: one for every model and size of the run."""
    return settings.name if model == "auto" else f"{Path(model).name}-{settings.name}"
