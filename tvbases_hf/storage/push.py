"""What was written, uploaded to a repository of the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import OutputError, ParameterError, first_line
from .cards import seal_card
from .files import HUB_ID


def check_push(repository: str) -> None:
    """Before the work: ParameterError for what is no id of the Hub, and where the Hub knows nobody who asks."""
    from huggingface_hub import HfApi

    if not HUB_ID.match(repository):
        raise ParameterError(f'--push-to-hub "{repository}" is no repository of the Hub; give OWNER/NAME')
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: whatever the client raises
        raise ParameterError(
            f'--push-to-hub "{repository}": the Hub does not say who you are ({first_line(error)}); run `hf auth '
            "login` first"
        ) from error


def push(output: Path, repository: str, card: str | None = None) -> str:
    """Upload all files of a directory, or a file; returns the commit's address. OutputError where that fails.

    ``card`` is the README.md of a file, which has none beside it.
    """
    if output.is_file():
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tvbases-") as folder:
            os.link(output, Path(folder) / output.name)
            seal_card(Path(folder), card or "")
            return _pushed(Path(folder), output, repository)
    return _pushed(output, output, repository)


def _pushed(directory: Path, written: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        message = "Upload what tvbases-hf has written"
        return str(api.upload_folder(repo_id=repository, folder_path=str(directory), commit_message=message))
    except Exception as error:
        raise OutputError(
            f'"{written}" is written, and could not be uploaded to {repository} ({first_line(error)}); try '
            f"`hf upload {repository} {written}`"
        ) from error
