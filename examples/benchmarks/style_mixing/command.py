"""The command: train, ask every study, write RESULTS-STYLES.md and its picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evidence import archive
from evidence.runner import Answers, known, run

from tvbases_hf.errors import TvbasesError

from . import picture, report
from .settings import DIGITS, FAMILY, FULL, QUICK
from .studies import BASE, FINAL, LORAS, SCREEN
from .ways import DEFAULT, PLAIN
from .workshop import Workshop

WORKDIR = Path("~/.cache/tvbases-hf/styles")
HERE, EXAMPLES = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]
RESULTS = {"full": HERE / "RESULTS-STYLES.md", "digits": HERE / "RESULTS-STYLES-DIGITS.md"}
KEPT = {"full": archive.FOLDER / "styles.tar.gz", "digits": archive.FOLDER / "styles_digits.tar.gz"}
PICTURES = {"full": EXAMPLES / "flux_styles.png", "digits": HERE / "figures" / "flux_digits.png"}


class NotGoodEnough(TvbasesError):
    """The small Flux does not draw what it is told."""


def answers(workshop: Workshop, processes: int, quiet: bool = False) -> None:
    """Ask what is not answered. Raises NotGoodEnough before anything is mixed with a base that draws badly."""
    workshop.workdir.mkdir(parents=True, exist_ok=True)
    base = run([BASE], workshop, min(processes, 2), quiet=quiet)[BASE.name]
    right, needed = base.one(what="base")["content"], workshop.settings.needed
    if right < needed:
        raise NotGoodEnough(f"contents are right in {right:.1%} of the base's pictures, of {needed:.0%} needed")
    for part in workshop.settings.parts():
        for study in (LORAS, SCREEN, FINAL):
            run([study], Workshop(workshop.workdir, part, workshop.source), processes, quiet=quiet)


def stored(workshop: Workshop) -> dict[str, Answers]:
    return {study.name: known(workshop, study) for study in (BASE, LORAS, SCREEN, FINAL)}


def trained(workshop: Workshop) -> bool:
    """Whether there is a model to draw with; answers alone may come from the repository."""
    return (workshop.workdir / "base").is_dir()


def main(arguments: Sequence[str] | None = None) -> dict[str, Answers]:
    parser = argparse.ArgumentParser(
        description="Mixes of style LoRAs on a small Flux, by every way; writes RESULTS-STYLES.md and a picture. A run "
        "that was interrupted goes on where it stopped."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="train hardly anything, to see that it runs")
    size.add_argument("--digits", action="store_true", help="the main rows on scikit-learn's digits, not on shapes")
    parser.add_argument("--group", action="append", choices=FULL.groups, help="only these mixes; repeat")
    parser.add_argument("--report", action="store_true", help="ask nothing: write what earlier runs have answered")
    parser.add_argument("--anew", action="store_true", help="do not go on from the answers kept in answers/")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one per core (the default)")
    parser.add_argument("--workdir", type=Path, default=WORKDIR, help=f"models and answers (default: {WORKDIR})")
    parser.add_argument(
        "--out", type=Path, help="the results; default: RESULTS-STYLES.md beside this script, if in full"
    )
    parser.add_argument("--picture", type=Path, help="default: examples/flux_styles.png, if in full")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else DIGITS if given.digits else FULL
    settings = replace(settings, groups=tuple(given.group or settings.groups))
    workdir: Path = given.workdir.expanduser().absolute() / settings.name
    workshop = Workshop(workdir, settings, "")
    ours = RESULTS.get(settings.name, workdir / "RESULTS-STYLES.md")
    out: Path = given.out or ours
    kept = KEPT.get(settings.name)
    try:
        if kept and out == ours and not given.anew:
            archive.unpack(kept, workdir / "answers")
        if not given.report:
            answers(workshop, given.processes, given.quiet)
    except TvbasesError as error:
        parser.error(str(error))
    shown: Path = given.picture or PICTURES.get(settings.name, workdir / "flux_styles.png")
    found = stored(workshop)
    mixed = all(found[SCREEN.name].of(group=FAMILY, way=way) for way in (PLAIN, DEFAULT))
    if mixed and (trained(workshop) or not given.report):
        picture.draw_picture(workshop, shown)
    mixed = mixed and shown.is_file()
    out.write_text(report.results(workshop, found, shown if mixed else None, out), encoding="utf-8")
    if kept and out == ours:
        archive.pack(workdir / "answers", kept)
    print(
        f"Results {out}\nPicture {shown if mixed else 'of mixes: none is measured yet'}\nModels and answers {workdir}"
    )
    return found
