"""What a job will read, write, compute and hold in memory, from headers alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..algebra.blocks import ENCODE_BYTES, PIECE_BYTES
from ..algebra.partial import EIGEN_OPERATIONS
from ..bases import ae_bases
from ..bases.weights import resolve_num_bases
from ..defaults import NUM_BASES, Job
from ..errors import CheckpointError, ParameterError, TvbasesError
from ..merging.merge import whole_bytes
from ..methods.registry import METHODS
from ..storage.checkpoint import DTYPES, Checkpoint, TensorInfo
from ..storage.files import HUB_ID, local_path, without_revision
from ..storage.json_files import read_object
from ..storage.model_config import check_model_config
from ..storage.parallel import default_workers
from ..storage.run import current, shares
from ..storage.tensor_files import file_bytes

# How often every model is read: ties finds two halves of its thresholds first, dare its
# lengths before and after, bases their Gram matrix.
PASSES: dict[Job, int] = {
    "gram": 1,
    "compress": 2,
    "linear": 1,
    "task_arithmetic": 1,
    "ties": 3,
    "dare": 3,
    "ae_bases": 2,
    "tsv": 1,
    "tsv_compress": 1,
    "devec_unique": 1,
    "iso_c": 1,
}
# What these do to a matrix [n, m], n <= m, of T models: so many Gram matrices, n^2 m each, and eigendecompositions of
# about 10 n^3; where a spectrum has a gap, or is not asked for, less.
DECOMPOSED: dict[str, Callable[[int], int]] = {
    "tsv": lambda models: models + 2,
    "tsv_compress": lambda models: models,
    "devec_unique": lambda models: models,
    "iso_c": lambda models: 1,
}
# Of a thread, beside its pieces: the tables of ties per model.
TABLES = {"ties": 2 * (1 << 16) * 8}
MEASURED_BYTES, MEASURED_AT_ONCE = 1 << 30, 1 << 24

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes. ``memory`` is that of one process, the program itself included; ``ranks`` what each reads."""

    job: str
    models: int
    numbers: int
    """In one task vector."""
    read: int
    written: int
    memory: int
    operations: float
    """Multiplications and additions."""
    bandwidth: float | None
    seconds: float | None
    """Reading and writing at the bandwidth, computing not counted."""
    ranks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    base: str | Infos,
    models: int,
    job: Job = "compress",
    *,
    num_bases: float = NUM_BASES,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    bandwidth: float | None = None,
) -> Plan:
    """What ``job`` does to ``models`` full fine-tunes of a base, on the threads of this Run.

    Args:
        base: the tensors' shapes and dtypes, or what ``headers`` reads them from.
        dtype: what the result is stored in; None for the base's own.
        bandwidth: bytes per second, read and written; None: measured, where the base is a local checkpoint.

    Raises ParameterError for what cannot be, CheckpointError for a base that has no headers.
    """
    if job not in PASSES:
        raise ParameterError(f"no plan for {job!r}; known: {', '.join(PASSES)}")
    if models < 1 or processes < 1:
        raise ParameterError("at least one model and one process are needed")
    if isinstance(base, str):
        base, bandwidth = headers(base), bandwidth or bandwidth_of(base)
    floating = {name: info for name, info in base.items() if info.dtype.is_floating_point}
    numbers = sum(info.numel for info in floating.values())
    size = sum(info.nbytes for info in floating.values())
    count = resolve_num_bases(num_bases, models)
    stored = {
        n: TensorInfo(i.shape, dtype or i.dtype if i.dtype.is_floating_point else i.dtype) for n, i in base.items()
    }
    match job:
        case "gram":
            written = 0
        case "compress":
            written = file_bytes({n: TensorInfo((count, *stored[n].shape), stored[n].dtype) for n in floating})
        case _:
            written = file_bytes(stored)
    read = PASSES[job] * (models + 1) * size + (sum(i.nbytes for i in base.values()) - size if written else 0)
    workers = current().workers or default_workers()
    if job in DECOMPOSED:  # as large as the largest tensors, of which each thread has one
        by_rows = METHODS[job].by_rows
        each = (whole_bytes(models, info.shape, by_rows) for info in floating.values())
        held = sum(sorted(each, reverse=True)[:workers])
    else:
        held = workers * ((ENCODE_BYTES if job == "compress" else PIECE_BYTES) + TABLES.get(job, 0) * models)
    parts = shares(list(floating.values()), lambda info: info.nbytes, processes)
    traffic = read + written
    return Plan(
        job,
        models,
        numbers,
        read,
        written,
        own_memory() + held,
        float(numbers) * operations_per_number(job, models, count)
        + sum(_decompositions(job, models, info.shape) for info in floating.values()),
        bandwidth,
        traffic / bandwidth if bandwidth else None,
        tuple(PASSES[job] * (models + 1) * sum(info.nbytes for info in part) for part in parts),
    )


def operations_per_number(job: str, models: int, num_bases: int) -> float:
    """Per number of the base: differences, products of a pair of models, sums."""
    gram = models + models * models
    match job:
        case "gram":
            return gram
        case "compress":
            return gram + models + 2 * models * num_bases + num_bases * (num_bases + models)
        case "ae_bases":
            return gram + 3 * models
        case "ties":
            return 10 * models
        case _:
            return 3 * models


def _decompositions(job: str, models: int, shape: tuple[int, ...]) -> float:
    """Of one tensor; none of other shapes than matrices."""
    if job not in DECOMPOSED or len(shape) != 2:
        return 0.0
    side, other = sorted(shape)
    return DECOMPOSED[job](models) * (float(side) * side * other + EIGEN_OPERATIONS / 2 * float(side) ** 3)


def own_memory() -> int:
    """What this process has allocated: the program and the libraries that every job comes to use."""
    ae_bases(torch.eye(2), 1)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 200_000_000


def headers(source: str) -> Infos:
    """Names, shapes and dtypes of a checkpoint directory, of a Hub repository, or of the model of a config.json.

    Of a Hub repository only the headers of its safetensors files are fetched. Raises CheckpointError.
    """
    path = local_path(source)
    if path is not None and path.name.endswith(".json") and path.is_file():
        return _of_config(path)
    repository, revision = without_revision(source)
    if path is not None or not HUB_ID.match(repository):
        return Checkpoint.open(source).tensors
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(repository, revision=revision)
    except Exception as error:  # the network, a private repository, no safetensors in it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f'"{source}": no such local directory, and the Hub gave no headers: {reason}; give a directory, or the '
            "model's config.json"
        ) from error
    return {
        name: TensorInfo(tuple(info.shape), DTYPES[info.dtype])
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }


def _of_config(file: Path) -> Infos:
    """The tensors of the causal language model that a configuration describes; nothing is allocated."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        check_model_config(read_object(file, str(file)), str(file))
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=current().trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except TvbasesError:
        raise
    except Exception as error:  # whatever transformers or torch have against a configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f'"{file}": no configuration of a causal language model: {reason}') from error
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    tensors = {n: TensorInfo(tuple(t.shape), dtype) for n, t in model.named_parameters()}
    return dict(Checkpoint(str(file), tensors, _nothing, config=config.to_dict()).tensors)


def _nothing(name: str) -> torch.Tensor:
    raise CheckpointError(f"{name} is known by its shape only")


def bandwidth_of(source: str) -> float | None:
    """Of the disk that a local checkpoint is on; None where there is no file of its weights."""
    path = local_path(source)
    if path is None:
        return None
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    return measure_bandwidth(files[0]) if files and files[0].is_file() else None


def measure_bandwidth(file: Path) -> float:
    """Bytes per second of reading the first gigabyte of a file; what is in the page cache already is faster."""
    started, read = time.perf_counter(), 0
    with open(file, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, MEASURED_BYTES, os.POSIX_FADV_DONTNEED)
        while read < MEASURED_BYTES and (part := stream.read(MEASURED_AT_ONCE)):
            read += len(part)
    return read / max(1e-9, time.perf_counter() - started)
