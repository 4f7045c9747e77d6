"""The command: ask every study, write RESULTS.md and its figures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from evidence import sources
from evidence.claims import Claim
from evidence.runner import Answers, Study, run
from rich.console import Console
from rich.table import Table

from tvbases_hf.errors import TvbasesError

from . import adapters, addition, bounds, choices, devec, finetune, models, negation, online, ood, singular
from . import with_data as methods
from .report import results
from .report.claims import claims
from .settings import EVERYTHING, FULL, MANY, QUICK, Settings
from .workshop import Workshop

WORKDIR = Path("~/.cache/tvbases-hf/text")
RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"

# In the order in which they are asked; the fine-tunes have to be first.
STUDIES: tuple[Study, ...] = (
    finetune.STUDY,
    addition.STUDY,
    choices.LOSSES,
    negation.STUDY,
    online.STUDY,
    methods.STUDY,
    choices.SIZES,
    choices.TEMPERATURE,
    choices.SUBSAMPLES,
    singular.UNTUNED,
    singular.ABLATION,
    singular.COMPRESSION,
    ood.STUDY,
    devec.FRACTIONS,
    devec.GAINS,
    devec.TRAINED,
    adapters.STUDY,
    bounds.STUDY,
)


def answers(workdir: Path, settings: Settings, source: str, processes: int, quiet: bool = False) -> dict[str, Answers]:
    """Everything, from the files of an earlier run where these hold; the fine-tunes first, as all else needs them."""
    workdir.mkdir(parents=True, exist_ok=True)
    models.base_model(workdir)
    workshop = Workshop(workdir, settings, source)
    tuned = run(STUDIES[:1], workshop, processes)
    return tuned | run([s for s in STUDIES[1:] if settings.asks(s.name)], workshop, processes)


def main(arguments: Sequence[str] | None = None) -> list[Claim]:
    parser = argparse.ArgumentParser(
        description="The papers' tables on a real model and real text tasks; writes RESULTS.md. A run that was "
        "interrupted goes on where it stopped.",
        epilog="example: python examples/benchmarks/bench_text.py --quick --out /tmp/RESULTS.md",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="less data, one seed, the main claims only: minutes")
    size.add_argument("--many", type=int, choices=[len(m.tasks) for m in MANY], help="so many tasks, in addition alone")
    size.add_argument("--all", action="store_true", help="every cell of every table; goes on from a run without")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one per core (the default)")
    parser.add_argument("--workdir", type=Path, default=WORKDIR, help=f"models and answers (default: {WORKDIR})")
    parser.add_argument(
        "--tasks", default="auto", help=f"a {sources.FILE}, or hub; default: that file if found, else hub"
    )
    parser.add_argument(
        "--out", type=Path, help="the results; default: RESULTS.md beside this script, not with --quick"
    )
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else EVERYTHING if options.all else FULL
    settings = next((many for many in MANY if len(many.tasks) == options.many), settings)
    workdir = options.workdir.expanduser().absolute()
    out = options.out or (workdir / settings.name / RESULTS.name if settings.name != FULL.name else RESULTS)
    try:
        found = answers(workdir / settings.name, settings, options.tasks, options.processes)
    except TvbasesError as error:
        parser.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(found, settings, out)
    listed = claims(found, settings)
    show(listed, Console(width=110))
    print(f"Results {out}\nModels and answers {workdir / settings.name}")
    return listed


def show(listed: Sequence[Claim], console: Console) -> None:
    table = Table("claim", "measured", "needed", "holds", title="in points of accuracy", title_justify="left")
    for claim in listed:
        needed = f"{'at most' if claim.at_most else 'at least'} {claim.needed:.1f}"
        table.add_row(claim.text, f"{claim.measured:.1f}", needed, "yes" if claim.holds else "NO")
    console.print(table)
