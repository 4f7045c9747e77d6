"""``tvbases mergekit-yaml``: mergekit's own command with our methods, a check beforehand and a whole result or none."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from safetensors import SafetensorError

from tvbases_hf.errors import OutputError, ParameterError
from tvbases_hf.output import transaction

from . import register


def merge(arguments: list[str]) -> None:
    """Run ``mergekit-yaml`` with these arguments: CONFIG OUT and every option that mergekit has.

    The model is written beside OUT and takes its place when it is complete.

    Raises:
        TvbasesError: whatever can be known to be wrong with the configuration, its models or the output.
    """
    register()
    from mergekit.scripts.run_yaml import main as command

    from . import sources
    from .preflight import check_config, read_config

    try:
        context = command.make_context("tvbases mergekit-yaml", arguments)
    except click.exceptions.Exit as done:  # --help
        sys.exit(done.exit_code)
    except click.UsageError as error:
        raise ParameterError(f"{error.format_message()}; usage: tvbases mergekit-yaml CONFIG OUT [OPTIONS]") from error
    given = context.params
    sources.quiet = bool(given.get("quiet"))
    out = Path(given["out_path"])
    needed = check_config(
        read_config(Path(given["config_file"])),
        given.get("transformers_cache"),
        truncates_vocabulary=bool(given.get("unsafe_truncate_embeddings")),
    )
    with (
        transaction(out, is_merged_model, needed) as work,
        _reported(sources.quiet),
        _disk_errors(out),
        _offline_card(),
    ):
        given["out_path"] = str(work)
        command.invoke(context)


def is_merged_model(directory: Path) -> bool:
    """Whether mergekit wrote this directory (it leaves its configuration there)."""
    return (directory / "mergekit_config.yml").is_file()


@contextlib.contextmanager
def _reported(quiet: bool) -> Iterator[None]:
    """Show what our methods say; mergekit shows warnings only."""
    logger = logging.getLogger("tvbases_mergekit")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextlib.contextmanager
def _offline_card() -> Iterator[None]:
    """Keep the model card from ending a merge: mergekit asks the Hub about local directories too."""
    from mergekit import card

    ask = card.is_hf

    def is_hf(path: str) -> bool:
        if Path(path).exists():
            return False
        try:
            return ask(path)
        except Exception as error:  # whatever the HTTP library raises: the card then has no link, and says so
            logging.getLogger("tvbases_mergekit").warning("model card without a link to %s: %s", path, error)
            return False

    card.is_hf = is_hf
    try:
        yield
    finally:
        card.is_hf = ask


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OutputError(f'the disk of "{out.parent}" is full; nothing was left behind') from error
        raise
