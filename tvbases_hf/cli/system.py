"""``tvbases doctor`` and ``tvbases demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingExtraError
from .app import app, console
from .options import Json, Quiet, file_option, report


@app.command(epilog="Example: tvbases doctor")
def doctor(json: Json = None) -> None:
    """Show versions, extras, the hook and free disk space."""
    from .doctor import examine, print_findings

    found = examine()
    report(json, found)
    print_findings(found, console)


@app.command(epilog="Example: tvbases demo --json demo.json")
def demo(
    workdir: Annotated[
        Path | None, typer.Option(help="Where to keep the models for the next run.", metavar="DIR")
    ] = None,
    plot: Annotated[Path | None, file_option("Draw the results.", "PNG", draws=True)] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Run the main job on real weights, in minutes. Fine-tune, compress, merge with mergekit, compare."""
    try:
        from tvbases_demo import run_demo
    except ImportError as error:
        raise MissingExtraError(f'the demo needs more packages ({error}); pip install "tvbases-hf[demo]"') from error

    run_demo(workdir, json_file=json, plot=plot, quiet=quiet)
