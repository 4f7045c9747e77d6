"""Writing an edited model: theta_0 plus a change, streamed in blocks, with the base's configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.blocks import BLOCK_NUMBERS
from ..algebra.dtypes import promoted
from ..algebra.finite import count_not_finite
from ..errors import CheckpointError, ParameterError, TvbasesError
from .checkpoint import Checkpoint
from .json_files import read_json
from .output import files_in, write_json
from .parallel import written
from .quantised import without_quantisation
from .run import once
from .side_files import put, side_files
from .tensor_files import TensorFiles

MARKER = "tvbases_edit.json"


def stream_model(
    base: Checkpoint,
    directory: Path,
    pieces: Callable[[str], Iterable[Tensor] | None],
    *,
    dtype: torch.dtype | None = None,
    need: Callable[[str], int] = lambda _: 0,
    reads: Callable[[str], Iterable[Tensor]] | None = None,
    beside: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Put weights, configuration and tokenizer into an existing directory, on several threads.

    ``pieces(name)`` are those of a flattened change, in order and of any sizes; None for a tensor that stays. Each
    thread has one of them in memory, and what they are made of: ``need(name)`` bytes. What ``reads(name)`` gives of the
    next weights is read ahead. The sum is taken in the dtype of the change, or in the base's if that is wider, and
    rounded once, to ``dtype``; see Checkpoint.written. Integers stay as they are. ``beside`` are the files that travel
    with it; None for the base's own.

    Raises ParameterError for numbers that do not fit into that dtype, CheckpointError for NaN in the base.
    """
    beside, tensors = side_files_of(base) if beside is None else beside, base.written(dtype)
    files = TensorFiles(directory, "model", tensors)

    def write(name: str) -> tuple[float, ...]:
        tensor, start, lost = base.read(name).reshape(-1), 0, 0
        for update in _unchanged(tensor) if (found := pieces(name)) is None else found:
            before = part = tensor[start : start + len(update)]
            if found is not None:
                part = part.to(update.device, promoted(part.dtype, update.dtype)) + update
            part = part.to(tensors[name].dtype)
            lost += count_not_finite(part, before)
            files.write(name, part, start)
            start += len(update)
        if lost:
            raise not_stored(base.label, name, tensor, lost, tensors[name].dtype)
        if start != len(tensor):
            raise RuntimeError(f"{name}: the change has {start} numbers, the tensor {len(tensor)}; this is a defect")
        return ()

    needed = lambda name: need(name) + base.copied(name)  # noqa: E731
    written(files, list(tensors), write, 0, "Writing", lambda n: tensors[n].nbytes, needed, reads)

    def describe() -> None:
        copy_side_files(beside, directory)
        if dtype is not None:
            _declare_dtype(directory / "config.json", dtype)

    once(describe)  # of several processes one would read what another is writing


def _unchanged(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.split(BLOCK_NUMBERS) if len(tensor) else ()


def not_stored(label: str, name: str, before: Tensor, lost: int, dtype: torch.dtype) -> TvbasesError:
    """What to say of ``lost`` numbers of a changed weight that are not finite once they are rounded to ``dtype``."""
    if own := count_not_finite(before, before):
        return CheckpointError(
            f'"{label}": {own} of {before.numel()} numbers of {name} are NaN; the file is damaged or the training run '
            "diverged: use an earlier checkpoint"
        )
    stored = str(dtype).removeprefix("torch.")
    return ParameterError(
        f'"{label}" with its change: {lost} of {before.numel()} numbers of {name} are infinite or NaN as {stored}; '
        "write it as bfloat16 or float32 (--dtype, or dtype in a mergekit YAML; else convert the models), or make the "
        "change smaller"
    )


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """The configuration names the dtype that the weights are loaded in, under an older or a newer key."""
    if file.is_file():
        config = read_json(file)
        key = "dtype" if "dtype" in config else "torch_dtype"
        write_json(file, config | {key: str(dtype).removeprefix("torch.")})


def is_edited_model(directory: Path) -> bool:
    """Whether a directory holds an edited model (merging.changes.Edit), and nothing else."""
    try:
        files = read_json(directory / MARKER)["files"]
        return set(files_in(directory)) <= {MARKER, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def copy_side_files(files: Mapping[str, Path | bytes], target: Path) -> None:
    """What travels with the weights, see side_files; nothing says any more how quantised weights were stored."""
    put(files, target)
    _forget_quantisation(target / "config.json")


def side_files_of(base: Checkpoint) -> dict[str, Path | bytes]:
    """Those of a base that is a directory, or a file of weights beside its configuration."""
    if base.path is None:
        return {}
    directory = base.path if base.path.is_dir() else base.path.parent
    return dict(side_files(directory)) if base.path.is_dir() or (directory / "config.json").is_file() else {}


def _forget_quantisation(file: Path) -> None:
    config = read_json(file) if file.is_file() else {}
    plain = without_quantisation(config)
    if plain != config:
        write_json(file, plain)
