"""Where the task files are."""

from pathlib import Path


def include_path() -> Path:
    """The directory that lm-eval's ``--include_path`` takes."""
    return Path(__file__).parent / "tasks"
