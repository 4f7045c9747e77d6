"""``tvbases mergekit-yaml``: mergekit's own command with our methods, a check beforehand and a whole result or none."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvbases_hf.errors import ParameterError, TvbasesError
from tvbases_hf.merging.merge import is_merge, leave_marker
from tvbases_hf.storage.cards import CARD, seal_card
from tvbases_hf.storage.inputs import Input
from tvbases_hf.storage.output import check_output, preview, transaction
from tvbases_hf.storage.run import current, using
from tvbases_hf.storage.side_files import put
from tvbases_hf.text import printable

from .registration import register

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

CONFIG_FILE = "mergekit_config.yml"

DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="Check everything, say what would be written, write nothing.")
INTERMEDIATE = click.Option(
    ["--intermediate-dir", "-I"],
    type=click.Path(),
    help="Where the merges that have a name are written, of a CONFIG with several documents.",
)


def merge(arguments: list[str]) -> dict[str, Any] | None:
    """Run ``mergekit-yaml`` with these arguments: CONFIG OUT and every option that mergekit has.

    The model is written beside OUT and takes its place when it is complete. With --dry-run it is not, and what would be
    written is returned.

    Raises:
        TvbasesError: whatever is wrong with the configuration, its models or the output.
    """
    register()
    from mergekit.scripts.run_yaml import main

    from .several import is_several, merge_all

    command = copy.copy(main)
    command.help = "mergekit-yaml with the merge methods of tvbases, a check beforehand, and a whole model or none."
    command.params = [*command.params, DRY_RUN, INTERMEDIATE]
    command.epilog = "Example: tvbases mergekit-yaml merge.yml merged/ --cuda"
    try:
        context = command.make_context("tvbases mergekit-yaml", list(arguments))
    except click.exceptions.Exit as done:  # --help
        sys.exit(done.exit_code)
    except click.UsageError as error:
        raise ParameterError(f"{error.format_message()} Usage: tvbases mergekit-yaml CONFIG OUT [OPTIONS]") from error
    except ValueError as error:  # the one option that mergekit parses itself
        raise ParameterError(
            f"--out-shard-size takes a number, or one of thousands, millions or billions: 500M ({error})"
        ) from error
    given = context.params
    dry_run, folder = given.pop("dry_run"), given.pop("intermediate_dir")
    file, out = Path(given["config_file"]), Path(given["out_path"])
    if folder is None or not is_several(file):
        return _merge(command, context, file, out, dry_run)
    return merge_all(file, out, Path(folder), lambda f, to: _merge(command, context, f, to, dry_run), _check, dry_run)


def _check(config: MergeConfiguration, out: Path) -> None:
    """What is known of a merge without its models."""
    from .configuration import find_method
    from .preflight import check_structure

    check_output(out, is_merge)
    check_structure(config, find_method(config.merge_method))


def _merge(command: Any, context: Any, file: Path, out: Path, dry_run: bool) -> dict[str, Any] | None:
    """One merge, by the options that were given for it or for all of a file."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from .configuration import read_config
    from .mended import mended_mergekit
    from .preflight import check_config, side_files_left_out
    from .tokens import merging

    given = context.params
    options = MergeOptions(**{name: given[name] for name in MergeOptions.model_fields})
    config = read_config(file)
    check_output(out, is_merge)  # before anything is downloaded
    how = using(replace(current(), quiet=options.quiet, trust_remote_code=options.trust_remote_code))
    with how, reported(), _stopped(options.verbosity > 0), mended_mergekit(), merging(config):
        LoaderCache().loaders.clear()  # of an earlier merge in this process, whose files may be others now
        needed, inputs = check_config(config, options, out)
        if dry_run:
            return preview(out, None, needed)
        with transaction(out, is_merge, needed) as work:
            given["config_file"], given["out_path"] = str(file), str(work)
            with _reading(inputs):
                command.invoke(context)
            if not (work / CONFIG_FILE).is_file():  # --no-write-model-card; it tells the next run that this is a merge
                shutil.copyfile(file, work / CONFIG_FILE)
            put(side_files_left_out(config, options, work), work)
            if (work / CARD).is_file():
                seal_card(work, (work / CARD).read_text(encoding="utf-8"))
            leave_marker(work, {"merge": "mergekit-yaml"})


@contextlib.contextmanager
def _reading(inputs: Sequence[Input]) -> Iterator[None]:
    """For mergekit's own loaders, which tell nobody: the transaction sees then whether a file has changed."""
    for file in inputs:
        file.now_read()
    try:
        yield
    except Exception:  # whatever it says to a file that was half written
        for file in inputs:
            file.check()
        raise


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), "\n")


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Show what our methods say; mergekit shows warnings only, and transformers none that a user could act on."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _OURS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    handler = logging.StreamHandler()
    handler.setFormatter(_Text("%(message)s"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if current().quiet else logging.INFO)
        logger.propagate = False
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _stopped(verbose: bool) -> Iterator[None]:
    """One message for what mergekit refuses half-way, without its traceback; our own defects keep theirs."""
    try:
        yield
    except (TvbasesError, MemoryError):
        raise
    except Exception as error:
        if verbose or not _is_mergekits(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        known = any(words in reason for words in ("required but not present", "Promotion for Float8"))
        way = "; `tvbases merge` takes the same YAML" if known else ""
        raise TvbasesError(f"mergekit stopped: {reason} (-v shows where){way}") from error


def _is_mergekits(error: Exception) -> bool:
    """Whether mergekit, or a library that it called, raised the error, and not a merge method of ours."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    involved = [name for name in (module.partition(".")[0] for module in modules) if name in ("mergekit", *_OURS)]
    return bool(involved) and involved[-1] == "mergekit"


_OURS = ("tvbases_hf", "tvbases_mergekit")
