"""``--push-to-hub``, of every command that writes a directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .app import console


def _checked(repository: str | None) -> str | None:
    if repository is not None:
        from ..storage.push import check_push

        check_push(repository)
    return repository


PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", help="Then upload the output to this repository.", metavar="OWNER/NAME", callback=_checked
    ),
]


def push_output(found: Mapping[str, Any], repository: str | None) -> None:
    """Upload what a command reports to have written; by the first of several processes, and not after a dry run."""
    from ..storage.run import current

    if repository is None or found.get("dry_run") or current().team.rank > 0:
        return
    from ..storage.push import push

    console.print(f"uploaded: {push(found['out'], repository)}", highlight=False, soft_wrap=True)
