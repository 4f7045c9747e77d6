"""From models on disk to a basis directory, in one call: what ``tvbases compress`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import defaults
from ..algebra.rank import RankRule
from ..bases import CONSTRUCTIONS
from ..defaults import ExtraRows
from ..errors import ParameterError
from ..models.adapter import Adapter
from ..models.gram import gram_matrix
from ..models.hosts import check_foreseen, host_notes
from ..models.lora_template import Template
from ..models.vectors import Vectors, are_adapters
from ..storage.output import check_apart, check_output, preview
from ..storage.run import current
from .adapters.pool import check_kinds
from .basis import Basis
from .info import is_basis_directory
from .library.compress import compress_library
from .library.create import METHOD as LIBRARY
from .lora import LoraBasis
from .report import compression
from .request import MANY, Request


def compress(
    base: str | Path,
    tasks: Mapping[str, str | Path],
    out: str | Path,
    num_bases: float | None = None,
    *,
    method: str | None = None,
    budget: float | None = None,
    rank: str | float | RankRule | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    extra_rows: ExtraRows | None = None,
    device: str = "cpu",
    equal_rank: bool = False,
    host: defaults.Host | None = None,
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a basis directory of T fine-tuned models, and report what it kept and what it cost.

    Args:
        base, tasks: paths or Hub ids; the tasks by name.
        extra_rows: of tasks whose vocabulary has more or fewer rows than the base's, which stays as it is; see
            models.vocabulary.
        dry_run: check everything but the numbers, and report what would be written.
        device: where full checkpoints are computed: cpu, cuda, cuda:1.

    The others are those of ``Basis.build``. Raises TvbasesError for whatever cannot be, where possible before reading.
    """
    asked = Request(method, num_bases, budget, rank, alpha, options, equal_rank, host)
    if method == LIBRARY or (method is None and len(tasks) > MANY and are_adapters(tasks)):
        request = asked.resolved(True, len(tasks))
        if request.method == LIBRARY:
            _check_library(device, dtype, extra_rows)
            return compress_library(base, tasks, out, request, dry_run)
    check_output(out, is_basis_directory)
    check_apart(out, map(str, (base, *tasks.values())))
    vectors = Vectors.open(base, tasks, device=device, extra_rows=extra_rows, rows_of_base=True)
    request = asked.resolved(vectors.are_adapters, len(vectors))
    _check_run(vectors, request)
    if dry_run:
        return preview(out, *_size(vectors, request, dtype)) | {"warnings": vectors.coverage.notes()}
    gram = gram_matrix(vectors)
    how: dict[str, Any] = {"method": method, "budget": budget, "rank": rank, "alpha": alpha, **options}
    how |= {"equal_rank": equal_rank, "host": host}
    Basis.build(vectors, num_bases, dtype=dtype, gram=gram, **how).save_pretrained(out)
    basis = Basis.from_pretrained(out)
    found = compression(basis, vectors, gram, Path(out))
    if isinstance(basis, LoraBasis):
        found["loading"] = host_notes(host, basis.source.config)
    return {**found, "warnings": list(dict.fromkeys([*vectors.coverage.notes(), *gram.warnings()]))}


def _check_library(device: str, dtype: torch.dtype | None, extra_rows: ExtraRows | None) -> None:
    """What the other bases of adapters can be asked, and a library cannot."""
    for word, given, why in (
        ("device", device != "cpu", "factors of adapters are small"),
        ("dtype", dtype is not None, "a library is kept in 16, 8 or 4 bits, see --bits"),
        ("extra_rows", extra_rows is not None, "a library holds no embeddings that are saved whole"),
    ):
        if given:
            raise ParameterError(f"{word} is not for a library: {why}; leave it out")
    if current().memory is not None or current().team.size > 1:
        raise ParameterError(
            "a library is made by one process, weight by weight, within its own bounds of memory; leave --memory and "
            "the other processes out"
        )


def _check_run(vectors: Vectors, request: Request) -> None:
    """Adapters and full checkpoints are not read in the same way, and what loads adapters cannot read all of them."""
    adapters = [model for model in vectors.models.values() if isinstance(model, Adapter)]
    if adapters and vectors.are_adapters:
        check_kinds(vectors)
        check_foreseen(request.host, adapters, Template.of(adapters, vectors.base.label), None)
    if vectors.are_adapters and vectors.device.type != "cpu":
        raise ParameterError("a device is for full checkpoints; factors of adapters are small: leave it out")
    streamed = request.method in CONSTRUCTIONS and not (vectors.are_adapters or request.merges_clusters)
    if current().memory is not None and not streamed:
        raise ParameterError(
            "a limit of memory is kept by bases that are sums of full checkpoints; adapters, methods tsv and masks, "
            "and clusters that are merged by another method take whole tensors: leave it out"
        )


def _size(vectors: Vectors, request: Request, dtype: torch.dtype | None) -> tuple[int | None, int | None]:
    """Tensors and bytes that will be written, as far as they do not depend on the numbers."""
    construction = CONSTRUCTIONS.get(request.method or "")
    if vectors.are_adapters or construction is None:
        return None, None
    fewest, most = construction.counts(request.num_bases, len(vectors))
    base = vectors.base.tensors
    one = sum(base[name].numel * (dtype or base[name].dtype).itemsize for name in vectors.names)
    return len(vectors.names), one * (most + construction.has_mean) if fewest == most else None
