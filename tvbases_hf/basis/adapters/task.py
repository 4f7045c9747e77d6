"""One task of a basis as a stand-alone LoRA again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import defaults
from ...algebra.delta import Delta, LowRank, zeros
from ...algebra.products import inner
from ...algebra.rank import RankRule
from ...algebra.sums import total
from ...algebra.svd import svd
from ...errors import ParameterError
from ...merging.card import edit_card
from ...models.hosts import fitted
from ...models.lora_files import Layout, adapter_tensors, is_adapter_directory, write_adapter
from ...models.lora_parts import PREFIX
from ...models.lora_template import Template
from ...models.names import Naming
from ...storage.cards import write_card
from ...storage.checkpoint import Checkpoint
from ...storage.output import transaction
from ..info import AdapterInfo, BasisInfo
from .codec import Spec


class StockSource(Protocol):
    """What is needed of a basis's vectors to write one task in the form of the stock adapter beside them."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    @property
    def stock(self) -> Checkpoint: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def whole(self) -> tuple[str, ...]: ...

    @property
    def scaled(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class TaskAdapter:
    """A PEFT adapter in memory: ``tensors`` and ``config`` of adapter_model.safetensors and adapter_config.json.

    ``note`` says in a line what it is, for its card; ``cut`` is the norm of what its rank leaves out, relative to the
    task's.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    note: str
    cut: float = 0.0

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write an adapter directory as a transaction; PEFT loads it without this package."""
        needed = sum(tensor.nbytes for tensor in self.tensors.values())
        base = self.config.get("base_model_name_or_path") or "base"
        with transaction(save_directory, is_adapter_directory, needed) as work:
            write_adapter(work, self.tensors, self.config)
            write_card(work, edit_card(self.note, base, adapter=True))


# tau_hat's part of one weight, by its name, as a sum of multiples of changes.
Terms = Callable[[str], list[tuple[float, Delta]]]


def task_adapter(
    basis: BasisInfo,
    source: StockSource,
    task: str,
    terms: Terms,
    alpha: float,
    base: Checkpoint | None,
    rank: str | float | RankRule | None = None,
    equal_rank: bool = False,
    host: defaults.Host | None = None,
) -> TaskAdapter:
    """alpha * tau_hat at the rank that the reconstruction has, or a rule gives; in the basis's own dtype."""
    info, rule = basis.adapters, None if rank is None else RankRule.parse(rank)
    assert info is not None
    _check_scale(alpha)
    if base is None and (source.scaled or source.whole):
        what = "DoRA adapters" if source.scaled else "adapters with saved modules or biases"
        raise ParameterError(f"this basis is of {what}, which are written relative to the base model: give base=")
    changes: dict[str, Delta] = {}
    squares: list[tuple[float, float]] = []
    for name in source.names:
        change = _change(terms(name), source.specs.get(name), lambda low: _compact(low, rule, alpha, squares), alpha)
        if change.low is None or change.low.rank or source.scaled:
            changes[name] = change
    if not changes:
        raise ParameterError(f'nothing of "{task}" is left in this basis; compress with a larger budget')
    empty = Checkpoint.from_state_dict({})
    tensors, config = adapter_tensors(changes, template(info, source), base or empty, getattr(torch, info.dtype))
    whole, kept = (sum(column) for column in zip(*squares, strict=True)) if squares else (0.0, 0.0)
    cut = max(0.0, 1 - kept / whole) ** 0.5 if rule is not None and whole else 0.0
    note = f"{task} from a basis of {len(basis.tasks)} tasks, alpha {alpha:g}"
    return TaskAdapter(*fitted(tensors, config, equal_rank, host), note, cut)


def _check_scale(alpha: float) -> None:
    if not 0 < abs(alpha) < float("inf"):
        raise ParameterError(f"alpha scales the task, and {alpha:g} of it is no adapter; give another number than 0")


def template(info: AdapterInfo, source: StockSource) -> Template:
    """Where the factors go, as in the adapters that the basis was made of."""
    layouts = {name: layout(spec) for name, spec in info.modules.items()}
    words = ("base_model_name_or_path", "task_type", "auto_mapping")
    config = {word: source.config[word] for word in words if word in source.config}
    head = {name: source.stock.read(f"{PREFIX}{name}") for name in info.head}
    modules = frozenset(source.config.get("modules_to_save") or ())
    naming: dict[str, Any] = dict(info.naming)
    return Template(layouts, dict(info.bias_modules), config, frozenset(info.saved), Naming(**naming), head, modules)


def layout(spec: Spec) -> Layout:
    return Layout(spec.module, spec.kind, tuple(spec.kernel))


def _change(
    terms: list[tuple[float, Delta]], spec: Spec | None, compact: Callable[[LowRank], LowRank], alpha: float
) -> Delta:
    if not terms:
        assert spec is not None  # what is kept whole has a term of its own
        return zeros(spec.shape)
    return total([delta for _, delta in terms], [alpha * share for share, _ in terms]).with_low(compact)


def _compact(delta: LowRank, rule: RankRule | None, alpha: float, squares: list[tuple[float, float]]) -> LowRank:
    """At the rank that it really has, or the rule gives, both factors of one size: neither loses digits in a short
    dtype. Squared norms before and after are added to ``squares``."""
    if not delta.rank:
        return delta
    if not bool(torch.isfinite(delta.left).all() and torch.isfinite(delta.right).all()):
        raise ParameterError(f"alpha {alpha:g} makes changes that are larger than float32 can hold; give a smaller one")
    exact = LowRank(delta.left.to(torch.float64), delta.right.to(torch.float64))
    found = svd(exact, rule)
    root = found.S.sqrt()
    squares.append((float(inner(exact, exact)), float(found.S.square().sum())))
    return LowRank((found.U * root).float(), (found.V * root).T.float())
