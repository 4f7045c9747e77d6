"""What other programs keep many models in, read task by task: vlora-dev, lorashare, and TaskVectorBasis.

vlora-dev keeps per module and side a mean and components [k, r * d] of the flattened factors, and k loadings per task;
lorashare components [d, k] of each side, and loadings [k, r] per task. TaskVectorBasis (the AE paper's code) keeps M
sums of full task vectors and W [M, T].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.finite import count_not_finite
from ...errors import CheckpointError, ParameterError, TvbasesError
from ...models.lora_parts import PREFIX
from ...storage.checkpoint import Checkpoint
from ...storage.file_names import check_name

VLORA, LORASHARE, TASK_VECTOR_BASIS = "subspace_meta.json", "share_config.json", "AWB.pt"


@dataclass(frozen=True)
class ForeignAdapters:
    """``read(task)`` gives the tensors and the configuration of a stock LoRA."""

    tasks: tuple[str, ...]
    read: Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class ForeignVectors:
    """Full task vectors: ``read(name)`` gives one weight's for all tasks, [T, *shape] float32; ``shapes`` by name."""

    tasks: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_foreign(directory: Path) -> ForeignAdapters | ForeignVectors:
    """Raises CheckpointError for what none of the three has written, or what is damaged."""
    for file, opened in ((VLORA, _vlora), (LORASHARE, _lorashare), (TASK_VECTOR_BASIS, _task_vector_basis)):
        if (directory / file).is_file():
            found = _told(opened, f'"{directory}": not what {file} says')(directory)
            return replace(found, read=_told(found.read, f'"{directory}": not what {file} says'))
    raise CheckpointError(
        f'"{directory}": has none of {VLORA} (vlora-dev), {LORASHARE} (lorashare) and {TASK_VECTOR_BASIS} '
        "(TaskVectorBasis), by which a directory of theirs is known"
    )


def _told(read: Callable[[Any], Any], what: str) -> Callable[[Any], Any]:
    """``read``, whose own errors become one CheckpointError."""

    def run(item: Any) -> Any:
        try:
            return read(item)
        except TvbasesError:
            raise
        except (LookupError, ValueError, TypeError, OSError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{what} ({error!r}); copy it again") from error

    return run


def _vlora(directory: Path) -> ForeignAdapters:
    meta = _json(directory / VLORA)
    if meta.get("format", "float32") != "float32":
        raise CheckpointError(
            f'"{directory}": vlora-dev keeps its components in {meta["format"]}; load it there and write it with '
            "SharedSubspace.save, which keeps the same numbers in float32"
        )
    shared, files = Checkpoint.open(directory / "subspace.safetensors"), meta.get("task_filenames", {})

    def read(task: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = Checkpoint.open(directory / check_name(f"task_{files.get(task, task)}.safetensors", "task"))
        tensors = {}
        for module in meta["layer_names"]:
            for side in "ab":
                loadings, components = own.read(f"{module}.loadings_{side}"), shared.read(f"{module}.components_{side}")
                flat = loadings.float() @ components.float() + shared.read(f"{module}.mean_{side}").float()
                tensors[_key(module, side.upper())] = flat.reshape(meta[f"shapes_{side}"][module])
        return tensors, _config(tensors, {"r": meta["rank"], "lora_alpha": meta["rank"]})

    return ForeignAdapters(_tasks(meta["task_ids"]), read)


def _lorashare(directory: Path) -> ForeignAdapters:
    config, shared = _json(directory / LORASHARE), Checkpoint.open(directory / "shared_components.safetensors")

    def read(task: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        place = directory / "adapters" / task
        if (place / "classifier_head.safetensors").is_file():
            raise CheckpointError(f'"{directory}": "{task}" has a classifier of its own; restore it with lorashare')
        own, tensors = Checkpoint.open(place / "loadings.safetensors"), {}
        for name in own.tensors:
            module, _, side = name.rpartition(":")
            factor = shared.read(name).float() @ own.read(name).float()
            tensors[_key(module, side)] = factor.T if side == "A" else factor
        return tensors, _config(tensors, _json(place / "adapter_meta.json")["original_config"])

    return ForeignAdapters(_tasks(config["adapter_names"]), read)


def _task_vector_basis(directory: Path) -> ForeignVectors:
    state = torch.load(directory / TASK_VECTOR_BASIS, map_location="cpu", weights_only=True)
    held = torch.load(directory / "basis_vectors.pt", map_location="cpu", weights_only=True, mmap=True)
    vectors, decoder, tasks = held["basis_vectors"], state["W"].float(), state["metadata"]["datasets"]
    if state["metadata"].get("softmax_w") or decoder.shape != (len(vectors), len(tasks)):
        raise ValueError(f"W is {list(decoder.shape)} of {len(vectors)} vectors and {len(tasks)} tasks, or a softmax")
    shapes = {name: tuple(tensor.shape) for name, tensor in vectors[0].items() if tensor.is_floating_point()}

    def read(name: str) -> Tensor:
        stacked = torch.stack([vector[name].float() for vector in vectors])
        return torch.tensordot(decoder.T, stacked, dims=1)

    return ForeignVectors(_tasks(tasks), shapes, read)


def _key(module: str, side: str) -> str:
    return f"{PREFIX}{module.removeprefix(PREFIX)}.lora_{side}.weight"


def _config(tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that PEFT reads, with the modules that there are. ValueError for factors that are none."""
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    for module in modules:
        a, b = (tensors[_key(module, side)] for side in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ValueError(f"the factors of {module} are {list(b.shape)} and {list(a.shape)}")
        if bad := count_not_finite(a) + count_not_finite(b):
            raise ValueError(f"the factors of {module} hold {bad} NaN or infinite numbers")
    if words.get("use_dora") or words.get("peft_type", "LORA") != "LORA":
        raise ParameterError("an adapter that is no plain LoRA, of which only factors were kept; compress the original")
    return {"base_model_name_or_path": None, "bias": "none", **words, "peft_type": "LORA", "target_modules": modules}


def _tasks(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its tasks are {names!r}")
    return tuple(names)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
