"""What a basis directory says about itself: ``basis_config.json`` and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bases import BasisWeights
from ..errors import CheckpointError, ParameterError
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..storage.files import without_revision
from ..storage.output import contains_only
from ..version import library_version
from .adapters.codec import Spec

CONFIG_FILE = "basis_config.json"
VECTORS_STEM = "basis"
FORMAT_VERSION = 1
OUR_FILES = (
    CONFIG_FILE,
    f"{VECTORS_STEM}*.safetensors",
    f"{VECTORS_STEM}.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    ".gitattributes",
)


@dataclass(frozen=True)
class AdapterInfo:
    """The part of basis_config.json that only bases of adapters have.

    Errors are |tau_hat - tau| / |tau| per task; ``candidates`` the root of their mean square, before rounding, for
    every method that was compared within the budget; ``truncation_error`` that of cutting every adapter for itself at
    the bytes of this basis.
    """

    alpha: float
    """The stock file loads as theta_0 + alpha * (sum of the vectors)."""
    dtype: str
    adapters_bytes: int
    error_before_rounding: list[float]
    truncation_error: list[float]
    candidates: dict[str, float]
    stock_error: float
    """How far what PEFT loads is from alpha * (sum of the vectors), relative to that: 0 but for DoRA."""
    overlap: dict[str, float]
    """Mean share of two adapters' input and output directions that are common, and what chance gives."""
    modules: dict[str, Spec] = field(default_factory=dict)
    bias_modules: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    naming: dict[str, Any] = field(default_factory=dict)
    """How the adapters call the base's tensors; it and the three before as in lora_files.Template."""
    base_sample: dict[str, list[float]] = field(default_factory=dict)
    """The first numbers of a few weights of the base, to tell another model when the basis is attached."""

    @classmethod
    def read(cls, data: dict[str, Any]) -> AdapterInfo:
        modules = {name: Spec(**spec) for name, spec in data["modules"].items()}
        return cls(**{**data, "modules": modules})


@dataclass(frozen=True)
class BasisInfo:
    """The contents of basis_config.json. Matrices are nested lists of float64; errors and bounds are relative.

    ``loss``, ``bound`` and ``spectral_bound`` are shares of the task vectors' total squared norm, before rounding;
    ``task_error`` is |tau_hat - tau| / |tau| per task, after rounding to the stored dtype.
    """

    method: str
    options: dict[str, Any]
    tasks: tuple[str, ...]
    encoder: list[list[float]]
    decoder: list[list[float]]
    mean: list[float] | None
    loss: float
    bound: float
    spectral_bound: float
    task_error: list[float]
    gram: list[list[float]]
    base_id: str
    base_fingerprint: str
    base_norm: float | None
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Per weight stored in factors, the rank of each vector's part."""
    adapters: AdapterInfo | None = None
    """Of a basis of adapters."""
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    @property
    def num_bases(self) -> int:
        return len(self.encoder[0])

    @property
    def effective_weights(self) -> list[float]:
        """What each task weighs in the sum of the bases."""
        return [sum(row) for row in self.encoder]

    def index(self, task: str) -> int:
        """Column of a task; ParameterError names the tasks there are."""
        if task not in self.tasks:
            raise ParameterError(f'no task "{task}" in this basis; it has {", ".join(self.tasks)}')
        return self.tasks.index(task)

    def refitted(self, decoder: Tensor, saved: Tensor) -> BasisInfo:
        """With the decoder fitted to the stored vectors, which takes ``saved`` [T] off the squared norms."""
        norms = torch.tensor(self.gram, dtype=torch.float64).diagonal()
        return replace(self, decoder=decoder.tolist()).with_errors(norms - saved)

    def with_errors(self, lost: Tensor) -> BasisInfo:
        """With the errors of reconstructions that miss ``lost`` [T] of the squared norms."""
        norms = torch.tensor(self.gram, dtype=torch.float64).diagonal()
        return replace(self, task_error=_relative_error(lost, norms))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _check(self) -> None:
        """ValueError unless all matrices are of numbers and fit the tasks."""
        count = len(self.tasks)
        wanted = {"encoder": (count, None), "decoder": (None, count), "gram": (count, count), "task_error": (count,)}
        for name, sizes in wanted.items():
            found = torch.tensor(getattr(self, name), dtype=torch.float64).shape
            fits = len(found) == len(sizes) and all(b in (None, a) for a, b in zip(found, sizes, strict=True))
            unknown = found == (0,) and (name == "decoder" or (name == "gram" and "online" in self.options))
            if not fits and not unknown:
                raise ValueError(f"{name} of shape {list(found)} for {count} tasks")

    @classmethod
    def read(cls, file: Path, label: str) -> BasisInfo:
        """Raises CheckpointError when the file is damaged or from a newer format."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.get("format_version", 0) > FORMAT_VERSION:
                raise CheckpointError(
                    f'"{label}": basis format {data["format_version"]} is newer than this library knows '
                    f"({FORMAT_VERSION}); pip install -U tvbases-hf"
                )
            adapters = AdapterInfo.read(data["adapters"]) if data.get("adapters") else None
            info = cls(**{**data, "tasks": tuple(data["tasks"]), "adapters": adapters})
            info._check()
            return info
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {error}') from error


def describe(
    vectors: Vectors,
    gram: Gram,
    weights: BasisWeights,
    options: Mapping[str, Any],
    ranks: Mapping[str, list[int]] | None = None,
) -> BasisInfo:
    """The info of a basis that has just been chosen, before any rounding."""
    decoder = weights.decoder
    if weights.mean is not None:
        decoder = torch.cat([decoder, torch.ones(1, len(vectors), dtype=torch.float64)])
    residual = weights.reconstruction - torch.eye(len(vectors), dtype=torch.float64)
    squares = (residual * (gram.matrix @ residual)).sum(dim=0)
    total = weights.total or 1.0
    return BasisInfo(
        method=weights.method,
        options=dict(options),
        tasks=vectors.tasks,
        encoder=weights.encoder.tolist(),
        decoder=decoder.tolist(),
        mean=None if weights.mean is None else weights.mean.tolist(),
        loss=weights.loss / total,
        bound=weights.bound / total,
        spectral_bound=weights.spectral_bound / total,
        task_error=_relative_error(squares, gram.matrix.diagonal()),
        gram=gram.matrix.tolist(),
        base_id=vectors.base.label,
        base_fingerprint=vectors.base.fingerprint(),
        base_norm=gram.base_norm,
        ranks=dict(ranks or {}),
        library_version=library_version(),
    )


def is_basis_directory(directory: Path) -> bool:
    """Whether a directory holds a basis and nothing that we did not write."""
    return (directory / CONFIG_FILE).is_file() and contains_only(directory, OUR_FILES)


def _relative_error(squares: Tensor, norms: Tensor) -> list[float]:
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    return (squares.clamp_min(0) / safe).sqrt().tolist()


def model_card(info: BasisInfo) -> str:
    """README.md of a basis directory: what it is, the error of each task, how to use it."""
    rows = "\n".join(
        f"| {task} | {weight:.3f} | {error:.1%} |"
        for task, weight, error in zip(info.tasks, info.effective_weights, info.task_error, strict=True)
    )
    on_hub = "/" in info.base_id and not Path(info.base_id).exists()
    base = f"base_model: {without_revision(info.base_id)[0]}\n" if on_hub else ""
    return f"""---
library_name: tvbases-hf
tags: [task-arithmetic, model-merging]
{base}---

# {info.num_bases} bases of {len(info.tasks)} task vectors

Method `{info.method}` over `{Path(info.base_id).name if Path(info.base_id).exists() else info.base_id}`. {_loss(info)}

| task | weight in the sum of the bases | relative error of its reconstruction, as stored |
|---|---|---|
{rows}

```python
from tvbases_hf import Basis

basis = Basis.from_pretrained("path/to/this/directory")
basis.restore("{info.tasks[0]}", base="path/to/base", out="{info.tasks[0]}-restored")
```

The licences of the base model and of the fine-tuned models apply.
"""


def _loss(info: BasisInfo) -> str:
    if "online" in info.options:
        weights = ", ".join(f"{weight:.4g}" for weight in info.options["online"]["weights"])
        return (
            "Tasks were added one by one, so errors are\nupper bounds. The merged vector is the sum of the bases with "
            f"weights {weights}."
        )
    return (
        f"The bases\nleave {info.loss:.2%} of the task vectors' energy unexplained; the least possible under the "
        f"method's constraint is\n{info.bound:.2%}."
    )
