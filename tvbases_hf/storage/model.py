"""Writing an edited model: theta_0 plus a change, streamed in blocks, with the base's configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.delta import BLOCK_NUMBERS
from .checkpoint import Checkpoint, TensorInfo
from .output import write_json
from .parallel import written
from .tensor_files import TensorFiles

MARKER = "tvbases_edit.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def stream_model(
    base: Checkpoint,
    directory: Path,
    pieces: Callable[[str], Iterable[Tensor] | None],
    *,
    dtype: torch.dtype | None = None,
    need: Callable[[str], int] = lambda _: 0,
    reads: Callable[[str], Iterable[Tensor]] | None = None,
) -> None:
    """Put weights, configuration and tokenizer into an existing directory, on several threads.

    ``pieces(name)`` are those of a flattened change, in order and of any sizes; None for a tensor that stays. Each
    thread has one of them in memory, and what they are made of: ``need(name)`` bytes. What ``reads(name)`` gives of the
    next weights is read ahead. The sum is taken in the dtype of the change, or in the
    base's if that is wider, and rounded once, to ``dtype``; None for each tensor's own. Integers stay as they are.
    """
    tensors = {name: _converted(info, dtype) for name, info in base.tensors.items()}
    files = TensorFiles(directory, "model", tensors)

    def write(name: str) -> tuple[float, ...]:
        tensor, start = base.read(name).reshape(-1), 0
        for update in _unchanged(tensor) if (found := pieces(name)) is None else found:
            part = tensor[start : start + len(update)]
            if found is not None:
                part = part.to(update.device, torch.promote_types(part.dtype, update.dtype)) + update
            files.write(name, part.to(tensors[name].dtype), start)
            start += len(update)
        if start != len(tensor):
            raise RuntimeError(f"{name}: the change has {start} numbers, the tensor {len(tensor)}; this is a defect")
        return ()

    written(files, list(tensors), write, 0, "Writing", lambda n: tensors[n].nbytes, need, reads)
    if base.path is not None and base.path.is_dir():
        copy_side_files(base.path, directory)
        if dtype is not None:
            _declare_dtype(directory / "config.json", dtype)


def _unchanged(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.split(BLOCK_NUMBERS) if len(tensor) else ()


def _converted(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and info.dtype.is_floating_point else info


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """The configuration names the dtype that the weights are loaded in, under an older or a newer key."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        write_json(file, config | {key: str(dtype).removeprefix("torch.")})


def is_edited_model(directory: Path) -> bool:
    """Whether a directory holds an edited model (merging.changes.Edit), and nothing else."""
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return {file.name for file in directory.iterdir()} <= {MARKER, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def copy_side_files(source: Path, target: Path) -> None:
    """Configuration, tokenizer and code: every small file of the base but its weights and its card."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and not file.name.endswith(WEIGHT_SUFFIXES)
            and file.name != "README.md"
            and file.name[0] != "."
        ):
            shutil.copyfile(file, target / file.name)
