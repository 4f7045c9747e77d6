"""One full fine-tune as a LoRA: what its change is and which of it is kept; written one weight at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..algebra.blocks import PIECE_BYTES, pieces
from ..algebra.delta import Delta, Dense, LowRank, dense
from ..algebra.finite import count_not_finite
from ..algebra.products import square_distance
from ..algebra.rank import RankRule, within_budget
from ..algebra.svd import singular_values, svd
from ..errors import ParameterError
from ..models.adapter import Adapter
from ..models.hosts import check_host, host_notes
from ..models.lora_config import CONFIG_FILE
from ..models.lora_files import factors
from ..models.modules import Modules
from ..models.vectors import Vectors, open_model
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.output import write_json
from ..storage.parallel import remembered, rows, written
from ..storage.system import readable_size
from ..storage.tensor_files import TensorFiles
from ..storage.tied import EMBEDDINGS, is_output, leaf
from .contents import Contents, contents_of

STEM = "adapter_model"
ONE_FILE = 1 << 60  # PEFT reads no shards
# What a decomposition holds of a matrix at most, in bytes a number: the change in float32 and float64, and its factors.
DECOMPOSITION_BYTES = 24


@dataclass(frozen=True)
class Size:
    """How much is kept: a rank rule for every matrix, or a share of the fine-tune's bytes; ``equal``: at one rank."""

    rule: RankRule | None
    budget: float | None
    equal: bool = False

    @classmethod
    def of(cls, rank: str | float | RankRule | None, budget: float | None, equal: bool) -> Size:
        """Raises ParameterError unless it is one of the two, and a rule or a share."""
        if (rank is None) == (budget is None):
            raise ParameterError("give --rank RULE (16, 0.25, energy:0.95, gavish-donoho) or --budget, one of the two")
        if budget is not None and not 0 < budget <= 1:
            raise ParameterError(f"budget is a share of the models' bytes, between 0 and 1; got {budget}")
        return cls(None if rank is None else RankRule.parse(rank), budget, equal)

    def __str__(self) -> str:
        return str(self.rule) if self.rule else f"budget:{self.budget:g}"

    @property
    def spends(self) -> bool:
        """Whether all singular values of all matrices decide together."""
        return self.rule is None and not self.equal

    @property
    def needs_spectrum(self) -> bool:
        return self.spends or (self.rule is not None and self.rule.needs_spectrum)

    def seen(self, delta: Delta, width: int) -> list[float]:
        """[width] what is remembered of a matrix: its rank, or its singular values where these are compared."""
        if not self.needs_spectrum:
            return [float(self.rule.of_shape(*delta.shape)) if self.rule else 1.0]
        values = singular_values(delta).cpu()
        if self.rule is not None:
            return [float(self.rule.of_spectrum(values, *delta.shape))]
        return [*values.tolist(), *[0.0] * (width - len(values))]


@dataclass(frozen=True)
class Target:
    """How adapters are written: what is saved whole, the dtype (None: the fine-tune's own), what will load them."""

    save: defaults.Saved = "all"
    dtype: torch.dtype | None = None
    host: defaults.Host | None = None


@dataclass(frozen=True)
class Extraction:
    """One fine-tune: its change over the base, and the tensors of which it has more rows than the base (tokens)."""

    task: str
    modules: Modules
    vectors: Vectors
    grown: tuple[str, ...]
    target: Target
    size: Size

    @property
    def model(self) -> Checkpoint:
        model = self.vectors.models[self.task]
        assert isinstance(model, Checkpoint)
        return model

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes [n, m] of the weights that LoRA has factors for, kernels flattened as PEFT does."""
        homes, base = self.modules.homes, self.vectors.base.tensors
        names = (name for name in self.vectors.names if name in homes and homes[name].layout)
        return {name: (base[name].shape[0], base[name].numel // max(1, base[name].shape[0])) for name in names}

    def change(self, name: str) -> Delta:
        """Of one tensor; as a matrix where LoRA has factors for it."""
        (delta,) = self.vectors.deltas(name)
        home = self.modules.homes.get(name)
        if home is None or not home.layout or len(delta.shape) < 3:
            return delta
        assert isinstance(delta, Dense) and delta.base is not None
        return Dense(*(tensor.reshape(len(tensor), -1) for tensor in (delta.tuned, delta.base)))

    def info(self, name: str) -> TensorInfo:
        """Of a tensor as it is written: 16 bits at least."""
        holder = self.model if name in self.model.tensors else self.vectors.base
        info = holder.written(self.target.dtype)[name]
        short = info.dtype.is_floating_point and info.dtype.itemsize < 2
        return TensorInfo(info.shape, torch.bfloat16) if short else info

    def need(self, name: str) -> int:
        """About the bytes that are in memory while a weight is decomposed."""
        return DECOMPOSITION_BYTES * self.vectors.base.tensors[name].numel + self.vectors.copied(name)

    def survey(self, work: Path) -> tuple[Contents, dict[str, float]]:
        """What the adapter will hold, and the squared norm of every tensor's change: one pass over the fine-tune.

        Raises ParameterError for a model that is the base, a budget that is too small, and what the host cannot load.
        """
        base, size, matrices, names = self.vectors.base.tensors, self.size, self.matrices, self.vectors.names
        width = max((min(shape) for shape in matrices.values()), default=1) if size.spends else 1

        def row(name: str) -> list[float]:
            delta = self.change(name)
            square = sum(float(piece.square().sum()) for piece in pieces(delta))
            return [square, *(size.seen(delta, width) if square and name in matrices else [0.0] * width)]

        def need(name: str) -> int:
            return self.need(name) if size.needs_spectrum and name in matrices else PIECE_BYTES

        reads, seen = self.vectors.stored, remembered(work, row)
        table = rows(names, seen, 1 + width, f"Reading {self.task}", lambda n: base[n].nbytes, need, reads)
        squares = dict(zip(names, table[:, 0].tolist(), strict=True))
        found = {name: row[1:] for name, row in zip(names, table, strict=True) if name in matrices and squares[name]}
        others = [*(name for name in names if squares[name] and name not in matrices), *self.grown]
        if not found and not others:
            raise ParameterError(f'"{self.task}" is equal to the base ({self.vectors.base.label}); nothing to extract')
        contents = contents_of(self.modules, self._ranks(found, others), others, self.target.save)
        contents = contents.with_rank(max(contents.ranks.values())) if size.equal else contents
        check_host(self.target.host, contents.config(self.vectors.base, {}))
        return contents, squares

    def write(self, directory: Path, contents: Contents, squares: Mapping[str, float]) -> dict[str, Any]:
        """The adapter, and what it keeps: a second pass, over what it holds something of."""
        stored = {name: contents.stored(name, self.info(name).shape, self.info(name).dtype) for name in contents.names}
        infos = {key: info for own in stored.values() for key, info in own.items()}
        files = TensorFiles(directory, STEM, infos, ONE_FILE)

        def write(name: str) -> tuple[float, float]:
            tensors, lost = self._stored(name, contents)
            for key, tensor in zip(stored[name], tensors, strict=True):
                files.write(key, tensor)
            return lost

        def need(name: str) -> int:
            return self.need(name) if name in contents.layouts else PIECE_BYTES + self.vectors.copied(name)

        def weight(name: str) -> int:
            return self.info(name).nbytes

        names, reads, title = contents.names, self.vectors.stored, f"Writing {self.task}"
        table = written(files, names, write, 2, title, weight, need, reads, lambda name: tuple(stored[name]))
        config = contents.config(self.vectors.base, self.modules.words)
        write_json(directory / CONFIG_FILE, config)
        missed = sum(square for name, square in squares.items() if name not in names)
        errors = [_ratio(missed + float(lost), sum(squares.values())) for lost in table.sum(dim=0)]
        return self._report(contents, config, infos, errors)

    def foreseen(self) -> dict[str, TensorInfo]:
        """The tensors that will be written if all tensors change; not where ranks depend on the numbers."""
        shapes = self.matrices
        rule = self.size.rule or RankRule("absolute", 1)
        ranks = {name: rule.of_shape(*shape) for name, shape in shapes.items()}
        others = [*(name for name in self.vectors.names if name not in shapes), *self.grown]
        if self.size.rule is None:
            ranks = self._ranks({name: torch.ones(1) for name in shapes}, others)
        contents = contents_of(self.modules, ranks, others, self.target.save)
        contents = contents.with_rank(max(ranks.values())) if self.size.equal else contents
        infos = {name: self.info(name) for name in contents.names}
        return {key: info for n, own in infos.items() for key, info in contents.stored(n, own.shape, own.dtype).items()}

    def notes(self) -> list[str]:
        """What a reader should know before the work."""
        lines = [line for line in self.vectors.coverage.notes() if "differ in shape" not in line]
        for name in self.grown:
            rows = self.model.tensors[name].shape[0]
            how = (
                f"resize the base to that before PEFT loads the adapter: model.resize_token_embeddings({rows})"
                if self.target.save == "all"
                else f"they are left out, and what else changes there (--save {self.target.save})"
            )
            lines.append(f'"{self.task}": {name} has {rows} rows, the base {self._rows(name)}; {how}')
        return lines

    def _rows(self, name: str) -> int:
        return self.vectors.base.tensors[name].shape[0]

    def _ranks(self, found: Mapping[str, Tensor], others: Sequence[str]) -> dict[str, int]:
        """By matrix; those of a budget keep most of the change beside what is saved whole."""
        if self.size.rule is not None:
            return {name: int(values[0]) for name, values in found.items() if values[0]}
        assert self.size.budget is not None
        whole = contents_of(self.modules, dict.fromkeys(found, 1), others, self.target.save)
        kept = {name: self.info(name) for name in (*whole.biases, *whole.saved)}
        fixed = sum(info.nbytes * len(whole.stored(name, info.shape, info.dtype)) for name, info in kept.items())
        allowed = self.size.budget * sum(self.info(name).nbytes for name in self.vectors.names)
        costs = [sum(self.matrices[name]) * self.info(name).dtype.itemsize for name in found]
        least = fixed + sum(costs) * self.size.equal
        if allowed < least:
            raise ParameterError(
                f'"{self.task}": a budget of {self.size.budget:g} is {readable_size(allowed)}, and {len(kept)} tensors '
                f"that are saved whole{' and rank 1' * self.size.equal} take {readable_size(least)}; give more, or "
                "save less (--save norms)"
            )
        if self.size.equal:
            return dict.fromkeys(found, int((allowed - fixed) // max(1, sum(costs))))
        counts = within_budget(list(found.values()), costs, allowed - fixed)
        return {name: count for name, count in zip(found, counts, strict=True) if count}

    def _stored(self, name: str, contents: Contents) -> tuple[list[Tensor], tuple[float, float]]:
        """What is written of one tensor, and the squared errors before and after rounding."""
        dtype = self.info(name).dtype
        if name in contents.layouts:
            change, rank = self.change(name), contents.ranks[name]
            low = _balanced(svd(change, RankRule("absolute", rank)).low_rank())
            rounded = LowRank(low.left.to(dtype), low.right.to(dtype))
            lost = square_distance(change, low)[0], square_distance(change, rounded)[0]
            tensors = list(factors(contents.layouts[name], _padded(rounded, rank), dtype).values())
        elif name in contents.biases and contents.lora_bias:
            change = self.change(name)
            tensors = [dense(change).to(dtype)]
            lost = 0.0, square_distance(change, Dense(tensors[0]))[0]
        else:
            own = (self.model if name in self.model.tensors else self.vectors.base).read(name)
            tensors = [own.to(dtype)] * len(contents.biases.get(name) or contents.saved[name])
            rounded = dtype != own.dtype and name in self.vectors.names
            lost = 0.0, square_distance(Dense(tensors[0]), Dense(own))[0] if rounded else 0.0
        for tensor in tensors:
            self._check_finite(name, tensor)
        return tensors, lost

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and (lost := count_not_finite(tensor)):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ParameterError(
                f'"{self.task}": {lost} numbers of what is stored of {name} are infinite or NaN as {dtype}; write it '
                "as bfloat16 or float32 (--dtype)"
            )

    def _report(
        self, contents: Contents, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], errors: Sequence[float]
    ) -> dict[str, Any]:
        left = contents.left
        notes = []
        if left:
            notes.append(
                f'"{self.task}": {len(left)} tensors that change are left as the base has them (first: {left[0]}): '
                + ("PEFT can neither factor nor save them" if self.target.save == "all" else "see --save")
            )
        return {
            "error_before_rounding": errors[0],
            "error": errors[1],
            "ranks": dict(sorted(Counter(contents.ranks.values()).items())),
            "modules_to_save": list(contents.modules),
            "biases": len(contents.biases),
            "left": list(left),
            "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}),
            "bytes": sum(info.nbytes for info in infos.values()),
            "bytes_of_fine_tune": self.model.nbytes,
            "loading": host_notes(self.target.host, config),
            "notes": notes,
        }


def open_fine_tune(
    base: Checkpoint, task: str, source: str | Path, device: torch.device, extra_rows: defaults.ExtraRows | None = None
) -> Vectors:
    """The vector of one task, without matrices of tokens that have more rows than the base's unless these are dropped.

    Raises ParameterError for an adapter; else what Vectors.of_models does.
    """
    model = open_model(source, base)
    if isinstance(model, Adapter):
        raise ParameterError(
            f'"{task}" ({source}) is an adapter already; `tvbases merge CONFIG OUT --adapter --rank RULE` of it alone '
            "cuts its rank"
        )
    if extra_rows == "drop":
        return Vectors.of_models(base, {task: model}, device=device, extra_rows="drop", rows_of_base=True)
    vectors = Vectors.of_models(base, {task: model}, skip_mismatched=True, device=device)
    if not all(_has_more_tokens(name, model, base) for name in vectors.coverage.skipped):
        Vectors.of_models(base, {task: model})  # which says what is wrong
    return vectors


def _has_more_tokens(name: str, model: Checkpoint, base: Checkpoint) -> bool:
    theirs, ours = model.tensors[name].shape, base.tensors[name].shape
    of_tokens = leaf(name) in EMBEDDINGS or is_output(name)
    return of_tokens and theirs[1:] == ours[1:] and theirs[0] > ours[0]


def _balanced(low: LowRank) -> LowRank:
    """U diag(S) and V^T as U diag(sqrt S) and diag(sqrt S) V^T: neither loses digits or overflows in a short dtype."""
    root = low.left.norm(dim=0).sqrt()
    return LowRank(low.left / root, low.right * root[:, None])


def _padded(low: LowRank, rank: int) -> LowRank:
    """With components of zeros up to ``rank``; what the decomposition left out is rounding noise."""
    more = rank - low.rank
    left = torch.cat([low.left, low.left.new_zeros(len(low.left), more)], dim=1)
    return LowRank(left, torch.cat([low.right, low.right.new_zeros(more, low.right.shape[1])]))


def _ratio(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total > 0 else 0.0
