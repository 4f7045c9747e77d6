"""Writing an edited model: theta_0 plus a change, streamed in blocks, with the base's configuration and tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
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
    """Write ``base`` plus ``change(name, start, stop)``, elements start..stop of each flattened tensor in float64.

    A change of None copies the tensor as it is. The sum is rounded once, to the base tensor's dtype.
    """
    with transaction(out, is_edited_model, base.nbytes) as work:
        files = TensorFiles(work, "model", base.tensors)
        for name in track(list(base.tensors), "Writing", quiet, lambda n: base.tensors[n].nbytes):
            tensor = base.read(name).reshape(-1)
            for start in range(0, len(tensor), BLOCK_NUMBERS):
                part = tensor[start : start + BLOCK_NUMBERS]
                update = change(name, start, start + len(part))
                files.write(name, part if update is None else (part.to(torch.float64) + update).to(part.dtype), start)
        if base.path is not None and base.path.is_dir():
            copy_side_files(base.path, work)
        write_json(work / MARKER, {"base": base.label, "edit": note})
    return out


def is_edited_model(directory: Path) -> bool:
    return (directory / MARKER).is_file()


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
