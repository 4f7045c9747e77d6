"""Tasks of a basis directory as LoRA directories on disk, at most so many at a time."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from tvbases_hf.basis import LoraBasis
from tvbases_hf.errors import ParameterError
from tvbases_hf.storage.output import transaction

# What a directory of the cache holds beside the LoRA, so that nothing else is ever removed.
MARK = "tvbases_vllm.txt"


@dataclass
class AdapterCache:
    """``path(task)`` is a directory that vLLM can load: the task at one rank, no larger than ``max_rank``.

    Of more than ``size`` directories the one that was used longest ago is removed. Several threads may ask at once.
    """

    basis: LoraBasis
    directory: Path
    size: int = 64
    max_rank: int = 16
    _used: OrderedDict[str, Path] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.size < 1 or self.max_rank < 1:
            raise ParameterError(
                f"the cache holds at least one adapter of rank 1 or more; got {self.size} of rank {self.max_rank}"
            )

    def path(self, task: str) -> Path | None:
        """None for a task that the basis does not have."""
        if task not in self.basis.tasks:
            return None
        with self._lock:
            place = self._used.get(task)
            if place is None or not place.is_dir():
                place = self._write(task)
            self._used[task] = place
            self._used.move_to_end(task)
            while len(self._used) > self.size:
                _, old = self._used.popitem(last=False)
                if (old / MARK).is_file():
                    shutil.rmtree(old)
            return place

    def number(self, task: str) -> int:
        """vLLM's lora_int_id: positive, the same in every process, another one for another task."""
        return 1 + self.basis.info.index(task)

    def _write(self, task: str) -> Path:
        """By a digest of the name: a task may be called what no file system takes."""
        place = self.directory / hashlib.sha256(task.encode()).hexdigest()[:32]
        adapter = self.basis.adapter(task, rank=self.max_rank, equal_rank=True, host="vllm")
        needed = sum(tensor.nbytes for tensor in adapter.tensors.values())
        with transaction(place, lambda old: (old / MARK).is_file(), needed) as work:
            adapter.save_pretrained(work)
            (work / MARK).write_text(task, encoding="utf-8")
        return place
