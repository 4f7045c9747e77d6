"""The layers of one component of a LoRA file, checked by their headers and read one at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, Dense, Dora, LowRank
from ..errors import CheckpointError, MismatchError
from ..models.lora_config import LoraOptions
from ..storage.checkpoint import Checkpoint
from .lora_names import factors_fit

A, B, BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
BIAS_SUFFIX = ".bias"


def read_checked(stored: Checkpoint, name: str) -> Tensor:
    """A tensor in float32; NaN and infinity are refused by name."""
    tensor = stored.read(name).to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f'"{stored.label}": {name} holds NaN or infinite numbers; use an earlier checkpoint')
    return tensor


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """float16 holds every 8-bit float, and what is computed from such."""
    return torch.float16 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


class LoraLayers(Mapping[str, Delta]):
    """A component's changes by module: LowRank (Dora where there is a magnitude), alpha / rank inside and counted once.

    ``<module>.bias`` is the Dense change of a bias. Convolutions are flattened to [out, in * kernel]. Opening looks at
    shapes only; factors are read into float32 each time that they are asked for.
    """

    def __init__(
        self,
        label: str,
        stored: Checkpoint,
        parts: Mapping[str, Mapping[str, Any]],
        options: LoraOptions | None = None,
        base: Checkpoint | None = None,
    ) -> None:
        """``parts``: by module, the stored names of its PEFT parts, and its alpha where the file gives one.

        Raises CheckpointError for incomplete or contradictory parts.
        """
        self.label, self._stored, self._parts, self._options, self._base = label, stored, parts, options, base
        self._scales = {module: self._checked_scale(module, own) for module, own in parts.items()}
        biases = [f"{module}{BIAS_SUFFIX}" for module, own in parts.items() if BIAS in own]
        self._names = dict.fromkeys([*parts, *biases])

    def __getitem__(self, name: str) -> Delta:
        if name not in self._parts and name in self._names:
            module = name.removesuffix(BIAS_SUFFIX)
            return Dense(self._scales[module] * self._read(module, BIAS))
        a, b = self._read(name, A), self._read(name, B)
        low = LowRank(self._scales[name] * b.reshape(len(b), -1), a.reshape(len(a), -1))
        return self._dora(name, low) if self.is_dora(name) else low

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        """Without reading, which Mapping's own would do."""
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have factors; the other names are biases of theirs."""
        return tuple(self._parts)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype of 16 bits or more that holds every stored factor."""
        stored = dict.fromkeys(_arithmetic(self._info(module, part).dtype) for module in self._parts for part in (A, B))
        return functools.reduce(torch.promote_types, stored or (torch.float16,))

    def shape(self, module: str) -> tuple[int, int]:
        """Of the change, flattened."""
        return self._info(module, B).shape[0], math.prod(self._info(module, A).shape[1:])

    def rank(self, module: str) -> int:
        return self._info(module, A).shape[0]

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel's size if the module is a convolution, else empty."""
        return self._info(module, A).shape[2:]

    def has_bias(self, module: str) -> bool:
        return BIAS in self._parts[module]

    def is_dora(self, module: str) -> bool:
        return MAGNITUDE in self._parts[module]

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Its parts as they are stored, in float32, but alpha / rank is in the second factor and the bias."""
        found = {part: self._read(module, part) for part in (A, B, BIAS, MAGNITUDE) if part in self._parts[module]}
        return {part: self._scales[module] * own if part in (B, BIAS) else own for part, own in found.items()}

    def _info(self, module: str, part: str) -> Any:
        return self._stored.tensors[self._parts[module][part]]

    def _read(self, module: str, part: str) -> Tensor:
        return read_checked(self._stored, self._parts[module][part])

    def _checked_scale(self, module: str, parts: Mapping[str, Any]) -> float:
        missing = [part for part in (A, B) if part not in parts]
        if missing:
            raise CheckpointError(f"{self.label}: {module} has no {missing[0]}; the file is incomplete")
        a, b = self._info(module, A).shape, self._info(module, B).shape
        if not factors_fit(a, b):
            raise CheckpointError(f"{self.label}: the factors of {module} do not fit: {list(b)}, {list(a)}")
        for part in {BIAS, MAGNITUDE} & parts.keys():
            if self._info(module, part).numel != b[0]:
                shape = list(self._info(module, part).shape)
                raise CheckpointError(
                    f"{self.label}: {module} has {b[0]} outputs and a {part} of {shape}; save it again"
                )
        rank, alpha = a[0], parts.get(ALPHA)
        if self._options is None:
            return 1.0 if alpha is None else alpha / rank
        if alpha is not None:
            raise CheckpointError(f"{self.label}: gives an alpha twice, as a tensor and as metadata")
        if self._options.use_dora and MAGNITUDE not in parts:
            raise CheckpointError(
                f"{self.label}: its metadata says DoRA, but {module} has no magnitudes; save it again"
            )
        name = parts.get("name", module)  # which the patterns of ranks and alphas are for
        if self._options.rank_of(name) != rank:
            raise CheckpointError(
                f"{self.label}: {module} has rank {rank} but its metadata says {self._options.rank_of(name)}"
            )
        return self._options.scaling(name, rank)

    def _dora(self, module: str, low: LowRank) -> Delta:
        name = f"{module}.weight"
        if self._base is None or name not in self._base.tensors:
            raise MismatchError(
                f"{self.label}: {module} is DoRA, whose change depends on the base's {name}; give the base of this "
                "component (bases=...)"
            )
        base, magnitude = self._base.read(name), self._read(module, MAGNITUDE)
        if base.numel() != low.shape[0] * low.shape[1] or magnitude.numel() != low.shape[0]:
            raise MismatchError(f"{self.label}: {module} does not fit the base's {name} {list(base.shape)}")
        return Dora.of(low, magnitude.reshape(-1), base)
