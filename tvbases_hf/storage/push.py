"""What was written, uploaded to a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputError, ParameterError, first_line
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


def push(directory: str | Path, repository: str) -> str:
    """Upload all files of a directory; returns the commit's address. OutputError where that fails: nothing is lost."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        message = "Upload what tvbases-hf has written"
        return str(api.upload_folder(repo_id=repository, folder_path=str(directory), commit_message=message))
    except Exception as error:
        raise OutputError(
            f'"{directory}" is written, and could not be uploaded to {repository} ({first_line(error)}); try '
            f"`hf upload {repository} {directory}`"
        ) from error
