"""What compressing kept and what it cost, as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.gram import Gram
from ..models.vectors import Vectors
from .adapters.verdict import verdict
from .basis import Basis
from .info import AdapterInfo, BasisInfo


def compression(basis: Basis, vectors: Vectors, gram: Gram, out: Path) -> dict[str, Any]:
    """What was kept and what it cost, for a basis as it is stored."""
    info = basis.info
    stored = sum(tensor.nbytes for tensor in basis.tensors.values())
    return {
        "out": str(out),
        "method": info.method,
        "tasks": list(info.tasks),
        "num_bases": info.num_bases,
        "loss": info.loss,
        "bound": info.bound,
        "spectral_bound": info.spectral_bound,
        "effective_weights": info.effective_weights,
        "task_error": info.task_error,
        "norm_ratio": None if gram.norm_ratios is None else gram.norm_ratios.tolist(),
        "bytes": stored,
        "bytes_of_task_vectors": sum(vectors.base.tensors[name].nbytes for name in vectors.names) * len(vectors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in basis.tensors.values()}),
        **(adapter_compression(info.adapters, info) if info.adapters else {}),
    }


def adapter_compression(adapters: AdapterInfo, info: BasisInfo) -> dict[str, Any]:
    """What only a basis of adapters has to say; ``bytes_of_task_vectors`` is then that of the adapters."""
    return {
        "bytes_of_task_vectors": adapters.adapters_bytes,
        "alpha": adapters.alpha,
        "error_before_rounding": adapters.error_before_rounding,
        "truncation_error": adapters.truncation_error,
        "candidates": adapters.candidates,
        "stock_error": adapters.stock_error,
        "overlap": adapters.overlap,
        "verdict": verdict(info),
    }
