"""The vectors of a basis of adapters: a stock PEFT LoRA that makes their sum, and beside it what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import defaults
from ...algebra.blocks import blocks
from ...algebra.delta import Delta, Dense, Dora, LowRank, zeros
from ...algebra.sums import total
from ...errors import CheckpointError, ParameterError
from ...models.adapter import Adapter
from ...models.finite import read_finite
from ...models.hosts import fitted
from ...models.lora_config import WEIGHT_FILES, read_config
from ...models.lora_files import adapter_tensors, nonzero, write_adapter
from ...models.lora_parts import MAGNITUDE
from ...models.lora_template import Template
from ...storage.checkpoint import Checkpoint, TensorInfo
from ..info import VECTORS_STEM, BasisInfo
from .codec import MIX, REST, Spec, Stored, restored, stock_factors

STOCK_FILE = WEIGHT_FILES[0]
BESIDE_FILE = f"{VECTORS_STEM}.safetensors"
SCALE, OWN = ".scale", ".own"


@dataclass(frozen=True)
class LoraVectors:
    """An VectorSource over the two files, or over the same tensors before they are written.

    ``stock`` and ``config`` are adapter_model.safetensors and adapter_config.json. ``beside`` (basis.safetensors) holds
    by weight: ``.rest`` and ``.mix`` of shared factors; ``.scale`` [T, n] float32, the row scales of the tasks' DoRA;
    ``.own`` [T, *shape], changes that are kept whole (trained biases, saved modules).
    """

    specs: Mapping[str, Spec]
    stock: Checkpoint
    beside: Checkpoint
    config: Mapping[str, Any]
    alpha: float
    weights: Tensor
    """[T] what each task weighs in the sum of the vectors."""

    @classmethod
    def open(cls, path: Path, info: BasisInfo, label: str) -> LoraVectors:
        """Map the files of a basis directory. Raises CheckpointError when one is absent or does not fit the other."""
        assert info.adapters is not None
        if not (path / STOCK_FILE).is_file():
            raise CheckpointError(f'"{label}": {STOCK_FILE} is absent; copy or download the basis again')
        stock = Checkpoint.open(path / STOCK_FILE, label=label)
        has_beside = (path / BESIDE_FILE).is_file()
        beside = Checkpoint.open(path / BESIDE_FILE, label=label) if has_beside else Checkpoint.from_state_dict({})
        weights = torch.tensor(info.effective_weights, dtype=torch.float64)
        found = cls(info.adapters.modules, stock, beside, read_config(path, label), info.adapters.alpha, weights)
        found.check(label, info)
        return found

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {**self.stock.tensors, **self.beside.tensors}

    @property
    def whole(self) -> tuple[str, ...]:
        """The weights whose changes are kept whole, task by task."""
        return tuple(name.removesuffix(OWN) for name in self.beside.tensors if name.endswith(OWN))

    @property
    def scaled(self) -> tuple[str, ...]:
        """The weights whose rows some task scales (DoRA)."""
        return tuple(name.removesuffix(SCALE) for name in self.beside.tensors if name.endswith(SCALE))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.specs, *self.whole)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.specs[name].shape) if name in self.specs else self.beside.tensors[name + OWN].shape[1:]

    def deltas(self, name: str) -> list[Delta]:
        """One low-rank delta per vector; none for a weight that is kept whole. Raises CheckpointError for NaN."""
        if name not in self.specs:
            return []
        spec = self.specs[name]
        if not spec.width and not self._has_factors(spec):
            return [zeros(spec.shape) for _ in spec.ranks]
        rest, mix = (self._beside(name + end) if spec.shared else None for end in (REST, MIX))
        left, right = stock_factors(self._stock, spec)
        return list(restored(Stored(left, right, rest, mix), spec, self._factor(name, len(left))))

    def scales(self, name: str) -> Tensor | None:
        """[T, n] how much every task scales the base's rows, or None."""
        return self._beside(name + SCALE) if name + SCALE in self.beside.tensors else None

    def own(self, name: str, task: int, base: Checkpoint | None) -> list[Delta]:
        if name + OWN in self.beside.tensors:
            return [Dense(self._beside(name + OWN)[task])]
        scales = self.scales(name)
        if scales is None or not scales[task].any():
            return []
        if base is None:
            raise ParameterError(
                "this basis is of DoRA adapters, whose changes are relative to the base model: give base="
            )
        weight = base.read(name)
        columns = weight.numel() // len(weight)
        return [Dora(scales[task], weight, LowRank.zeros((len(weight), columns)))]

    def write(self, directory: Path, info: BasisInfo) -> BasisInfo:
        """Both files as they are: errors were measured on the rounded numbers."""
        write_adapter(directory, {name: self._stock(name) for name in self.stock.tensors}, self.config)
        beside = {name: self._beside(name).contiguous() for name in self.beside.tensors}
        if beside:
            save_file(beside, directory / BESIDE_FILE, {"format": "pt"})
        return info

    def fitted(self, equal_rank: bool, host: defaults.Host | None) -> LoraVectors:
        """The same vectors in a stock file of one rank, if wanted. ParameterError for one that ``host`` cannot load."""
        tensors = {name: self.stock.read(name) for name in self.stock.tensors}
        found, config = fitted(tensors, self.config, equal_rank, host)
        return replace(self, stock=Checkpoint.from_state_dict(found), config=config) if equal_rank else self

    def check(self, label: str, info: BasisInfo) -> None:
        """CheckpointError unless every weight holds as many vectors, of its shape, as the configuration names."""
        tasks = len(info.tasks)
        for name, spec in self.specs.items():
            if not self._holds(name, spec):
                raise CheckpointError(f'"{label}": {name} does not hold the vectors that the configuration names')
        for name, tensor in self.beside.tensors.items():
            per_task = name.endswith((SCALE, OWN))
            if not tensor.dtype.is_floating_point or (per_task and tensor.shape[:1] != (tasks,)):
                raise CheckpointError(f'"{label}": {name} does not hold the numbers of {tasks} tasks')

    def _holds(self, name: str, spec: Spec) -> bool:
        """Whether all that is stored of a weight has the sizes that its entry says."""
        others, (rows, columns) = sum(spec.ranks) - spec.width, spec.shape
        try:
            if self._has_factors(spec):
                left, right = stock_factors(lambda stored: _empty(self.stock.tensors[stored]), spec)
                if (left.shape, right.shape) != ((rows, spec.width), (spec.width, columns)):
                    return False
            elif spec.width:
                return False
            if spec.shared:
                rest = (others, columns) if spec.shared == "left" else (rows, others)
                found = [self.beside.tensors[name + end].shape for end in (REST, MIX)]
                return found == [rest, (others, spec.width)] and self._scale_fits(name, rows)
            return self._scale_fits(name, rows)
        except (KeyError, RuntimeError, IndexError):
            return False

    def _scale_fits(self, name: str, rows: int) -> bool:
        return name + SCALE not in self.beside.tensors or self.beside.tensors[name + SCALE].shape[1:] == (rows,)

    def _stock(self, stored: str) -> Tensor:
        return read_finite(self.stock, stored)

    def _beside(self, stored: str) -> Tensor:
        return read_finite(self.beside, stored)

    def _has_factors(self, spec: Spec) -> bool:
        # A trained bias of the module may stand there without any.
        return any(name.startswith(f"{spec.prefix}.lora_") for name in self.stock.tensors)

    def _factor(self, name: str, rows: int) -> Tensor:
        """[n] what the stock file's left factor was divided by: 1 + alpha * the weighted sum of the tasks' scales."""
        scales = self.scales(name)
        if scales is None:
            return torch.ones(rows, dtype=torch.float64)
        return row_factor(scales, self.alpha, self.weights)


def _empty(info: TensorInfo) -> Tensor:
    """A tensor of this shape and without numbers."""
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def stock_error(source: LoraVectors, base: Checkpoint) -> float:
    """How far the stock file is from alpha * (sum of the vectors), relative to that, in Frobenius norm.

    A stock LoRA holds the very same numbers: 0. DoRA goes through magnitudes in float32 and rows that cannot vanish.
    """
    if not source.scaled:
        return 0.0
    stock = Adapter("the basis", source.config, source.stock, base)
    lost = whole = 0.0
    for name in source.specs:
        found, parts = stock.delta(name), source.deltas(name)
        own = [
            (share, delta)
            for task, share in enumerate(source.weights.tolist())
            for delta in source.own(name, task, base)
        ]
        expected = total(
            [*parts, *(delta for _, delta in own)],
            [*(source.alpha for _ in parts), *(source.alpha * share for share, _ in own)],
        )
        for part in blocks([expected] if found is None else [expected, found]):
            lost += float((part[0] - part[1:].sum(0)).square().sum())
            whole += float(part[0].square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def row_factor(scales: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """[n] float64 1 + alpha * sum_t weights[t] scales[t]: how the merged adapter scales the base's rows."""
    return nonzero(1 + alpha * (weights @ scales.to(torch.float64)))


def assemble(
    stored: Mapping[str, Stored],
    specs: Mapping[str, Spec],
    beside: Mapping[str, Tensor],
    template: Template,
    base: Checkpoint,
    alpha: float,
    weights: Tensor,
) -> LoraVectors:
    """The stock adapter theta_0 + alpha * (sum of the vectors) around the stored factors.

    ``beside`` are the scales and whole changes that go into basis.safetensors, by stored name.
    """
    factors = {n: row_factor(beside[n + SCALE], alpha, weights) for n in stored if n + SCALE in beside}
    changes: dict[str, Delta] = {}
    for name, part in stored.items():
        low = LowRank(part.left, part.right)
        if factors:  # then every module is a DoRA
            changes[name] = Dora(torch.zeros(len(low.left)), base.read(name), low)
        elif low.rank:  # PEFT has no rank 0
            changes[name] = low
    for name in (name.removesuffix(OWN) for name in beside if name.endswith(OWN)):
        own = beside[name + OWN]
        changes[name] = Dense(alpha * torch.tensordot(weights, own.to(torch.float64), dims=1).float())
    dtype = next(part.left.dtype for part in stored.values())
    tensors, config = adapter_tensors(changes, template, base, dtype)
    for name, part in stored.items() if factors else ():
        key = f"{specs[name].prefix}.{MAGNITUDE}"
        magnitude = _magnitude(base.read(name), part, alpha, factors.get(name))
        tensors[key] = magnitude.reshape(tensors[key].shape)
    config = times_alpha(config, alpha)
    others = dict(beside)
    for name, part in stored.items():
        others |= {name + end: tensor for end, tensor in part.beside.items()}
    stock, rest = Checkpoint.from_state_dict(tensors), Checkpoint.from_state_dict(others)
    return LoraVectors(specs, stock, rest, config, alpha, weights)


def _magnitude(base: Tensor, part: Stored, alpha: float, factor: Tensor | None) -> Tensor:
    """[n] float32 f * |rows of W + alpha L' R|: DoRA then computes f (W + alpha L' R) = f W + alpha L R."""
    rows = alpha * part.left.to(torch.float64) @ part.right.to(torch.float64)
    norm = (rows + base.reshape(rows.shape).to(torch.float64)).norm(dim=1)
    return (norm if factor is None else factor * norm).to(torch.float32)


def times_alpha(config: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """The configuration of an adapter that is scaled by alpha."""
    pattern = {name: _times(alpha, value) for name, value in config["alpha_pattern"].items()}
    return {**config, "lora_alpha": _times(alpha, config["lora_alpha"]), "alpha_pattern": pattern}


def _times(alpha: float, rank: float) -> float:
    product = alpha * rank
    return int(product) if product == int(product) else product
