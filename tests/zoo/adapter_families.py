"""Adapters of related and unrelated tasks over a tiny base, and what a basis of them must be, computed densely."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from oracles.matrices import gaussian
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import Basis
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.peft_models import Case, make_base, peft_model, perturb

LLAMA = Case("llama", {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"})
TASKS = ("math", "code", "chat", "law")


@dataclass(frozen=True)
class Adapters:
    """A base and adapters over it, as directories."""

    case: Case
    base: Path
    tasks: dict[str, Path]

    def vectors(self) -> Vectors:
        return Vectors.open(self.base, self.tasks)

    def options(self) -> list[str]:
        """The command line's --base and --task."""
        tasks = [word for task, path in self.tasks.items() for word in ("--task", f"{task}={path}")]
        return ["--base", str(self.base), *tasks]


def write_lora(directory: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **words: Any) -> Path:
    """A LoRA of scaling 1 with these (B [n, r], A [r, m]) by module, written without the code under test."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {module: a.shape[0] for module, (_, a) in factors.items()}
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "alpha_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "target_modules": list(ranks),
        "task_type": "CAUSAL_LM",
        **words,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def random_adapters(root: Path, case: Case = LLAMA, tasks: Sequence[str] = TASKS) -> Adapters:
    """Adapters that PEFT wrote, all numbers random."""
    base = make_base(root / "base", case)
    return Adapters(case, base, {t: random_adapter(root / t, base, case, seed=i + 1) for i, t in enumerate(tasks)})


def random_adapter(directory: Path, base: Path, case: Case, seed: int) -> Path:
    """One adapter that PEFT wrote, its numbers those of the seed."""
    model = peft_model(base, case)
    perturb(model, seed)
    model.save_pretrained(str(directory))
    return directory


def related_adapters(
    root: Path, *, near: float = 0.2, rank: int = 4, dtype: torch.dtype = torch.float32, tasks: Sequence[str] = TASKS
) -> Adapters:
    """Adapters whose A matrices stay near a common start, as after runs from one seed; ``near`` large: unrelated."""
    base = make_base(root / "base", LLAMA)
    shapes = {
        name.removesuffix(".weight"): info.shape
        for name, info in Checkpoint.open(base).tensors.items()
        if name.removesuffix(".weight").endswith(("q_proj", "v_proj", "o_proj", "down_proj"))
    }
    paths = {}
    for index, task in enumerate(tasks):
        factors = {}
        for place, (module, (rows, columns)) in enumerate(shapes.items()):
            start = gaussian(1000 + place, rank, columns)
            a = (start + near * gaussian(100 * index + place, rank, columns)) / (1 + near)
            b = 0.1 * (1 + index) * gaussian(7000 + 100 * index + place, rows, rank)
            factors[module] = (b.to(dtype), a.to(dtype))
        paths[task] = write_lora(root / task, factors, base_model_name_or_path="some/base")
    return Adapters(LLAMA, base, paths)


def dense_changes(vectors: Vectors, name: str) -> list[Tensor]:
    """[n, m] float64 per task."""
    return [dense(delta).reshape(delta.shape[0], -1) for delta in vectors.deltas(name)]


def measured_errors(basis: Basis, vectors: Vectors, base: Path | None = None) -> list[float]:
    """|tau_hat - tau| / |tau| per task, all weights multiplied out."""
    errors = []
    for index, task in enumerate(vectors.tasks):
        found = basis.reconstruct(task, base=base)
        lost, total = 0.0, 0.0
        for name in vectors.names:
            exact = dense(vectors.deltas(name)[index])
            lost += float((found[name].double().reshape(exact.shape) - exact).square().sum())
            total += float(exact.square().sum())
        errors.append((lost / total) ** 0.5)
    return errors


def truncated_errors(vectors: Vectors, numbers: float) -> list[float]:
    """Each adapter cut alone, the components of most relative energy per number first, until ``numbers`` are used."""
    changes = {name: dense_changes(vectors, name) for name in vectors.names}
    norms = [sum(float(changes[name][t].square().sum()) for name in changes) for t in range(len(vectors))]
    offers = []
    for parts in changes.values():
        for task, part in enumerate(parts):
            for value in torch.linalg.svdvals(part).square().tolist():
                price = sum(part.shape)
                offers.append((value / norms[task] / price, price, task, value))
    lost, left = list(norms), numbers
    for _, price, task, value in sorted(offers, reverse=True):
        if price > left:
            break
        left -= price
        lost[task] -= value
    return [max(0.0, part / norm) ** 0.5 for part, norm in zip(lost, norms, strict=True)]


def mean_square(errors: Sequence[float]) -> float:
    return sum(error**2 for error in errors) / len(errors)


def stored_bytes(directory: Path) -> int:
    """Of all tensors in a directory's safetensors files."""
    files = [Checkpoint.open(file) for file in directory.glob("*.safetensors")]
    return sum(info.nbytes for file in files for info in file.tensors.values())
