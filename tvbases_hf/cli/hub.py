"""``--push-to-hub``, of every command that writes: what it reports to have written is uploaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from .app import console

_asked: list[str] = []


def _checked(context: typer.Context, repository: str | None) -> str | None:
    """The repository is known as long as the command runs, and whether it can be written to before the work."""
    if repository is not None:
        from ..storage.push import check_push

        check_push(repository)
        context.with_resource(_uploading(repository))
    return repository


@contextlib.contextmanager
def _uploading(repository: str) -> Iterator[None]:
    _asked.append(repository)
    try:
        yield
    finally:
        _asked.pop()


PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Upload the output to this repository afterwards.",
        metavar="OWNER/NAME",
        callback=_checked,
    ),
]


def push_output(found: Mapping[str, Any]) -> None:
    """Upload what a command reports to have written; by the first of several processes, and not after a dry run."""
    from ..storage.run import current

    if not _asked or "out" not in found or found.get("dry_run") or current().team.rank > 0:
        return
    from ..storage.files import home_path
    from ..storage.push import push

    out = home_path(found["out"])
    card = None
    if out.is_file():
        from ..styles.card import mix_card

        card = mix_card(out)
    console.print(f"uploaded: {push(out, _asked[-1], card)}", highlight=False, soft_wrap=True)
