"""What a study works with: a work directory, how much is measured, and where the data comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Workshop(ABC):
    """One process's view of a work directory. A copy that goes to another process reads everything anew there."""

    def __init__(self, workdir: Path, settings: Any, source: str) -> None:
        self.workdir, self.settings, self.source = workdir, settings, source

    def __reduce__(self) -> tuple[type[Workshop], tuple[Path, Any, str]]:
        return type(self), (self.workdir, self.settings, self.source)

    @property
    @abstractmethod
    def key(self) -> str:
        """Digest of all that decides an answer beside the question."""
