"""Writing an edited model: theta_0 plus a change, streamed in blocks, with the base's configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo
from .delta import BLOCK_NUMBERS
from .output import TensorFiles, transaction, write_json
from .progress import track

MARKER = "tvbases_edit.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def write_model(
    base: Checkpoint,
    out: Path,
    change: Callable[[str, int, int], Tensor | None],
    note: str,
    *,
    quiet: bool = True,
) -> Path:
    """Write ``base`` plus a change as a directory of its own; see stream_model."""
    with transaction(out, is_edited_model, base.nbytes) as work:
        stream_model(base, work, change, quiet=quiet)
        files = sorted(file.name for file in work.iterdir())
        write_json(work / MARKER, {"base": base.label, "edit": note, "files": files})
    return out


def stream_model(
    base: Checkpoint,
    directory: Path,
    change: Callable[[str, int, int], Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    quiet: bool = True,
) -> None:
    """Put weights, configuration and tokenizer into an existing directory, a block of one weight in memory at a time.

    ``change(name, start, stop)`` gives elements start..stop of each flattened tensor's change in float64, None for a
    tensor that stays. The sum is rounded once, to ``dtype``; None for each tensor's own. Integers stay as they are.
    """
    tensors = {name: _converted(info, dtype) for name, info in base.tensors.items()}
    files = TensorFiles(directory, "model", tensors)
    for name in track(list(tensors), "Writing", quiet, lambda n: tensors[n].nbytes):
        tensor = base.read(name).reshape(-1)
        for start in range(0, len(tensor), BLOCK_NUMBERS):
            part = tensor[start : start + BLOCK_NUMBERS]
            update = change(name, start, start + len(part))
            edited = part if update is None else part.to(torch.float64) + update
            files.write(name, edited.to(tensors[name].dtype), start)
    if base.path is not None and base.path.is_dir():
        copy_side_files(base.path, directory)
        if dtype is not None:
            _declare_dtype(directory / "config.json", dtype)


def _converted(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and info.dtype.is_floating_point else info


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """The configuration names the dtype that the weights are loaded in, under an older or a newer key."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        write_json(file, config | {key: str(dtype).removeprefix("torch.")})


def is_edited_model(directory: Path) -> bool:
    """Whether a directory holds a model that write_model wrote, and nothing else."""
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
