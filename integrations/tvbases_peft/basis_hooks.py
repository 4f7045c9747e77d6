"""A basis of adapters on a transformers model: every task of it through one LoRA, by scaling its rank dimension.

All vectors of the basis become one PEFT adapter, side by side: lora_A [K, m] and lora_B [n, K], K the sum of the ranks.
Task t is then lora_B diag(c_t) lora_A with K numbers c_t, so that switching tasks changes one index, and rows of one
batch can have tasks of their own. PEFT lets an adapter bring its own way to compute and to merge a layer (LoraVariant,
what its DoRA is made of), and that is where the scaling is done. So ``merge_and_unload``, ``merge_adapter`` and
``disable_adapter`` of PEFT act on the task that is selected, while the adapter's weights, and therefore whatever
``save_pretrained`` writes, remain the whole basis: as a stock LoRA, the sum of the vectors times alpha.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf.algebra.delta import Delta, low_parts
from tvbases_hf.algebra.sums import side_by_side
from tvbases_hf.basis import LoraBasis
from tvbases_hf.basis.adapters.codec import Spec
from tvbases_hf.basis.adapters.lora_vectors import LoraVectors
from tvbases_hf.basis.adapters.task import template
from tvbases_hf.basis.info import BasisInfo
from tvbases_hf.errors import MismatchError, MissingExtraError, ParameterError
from tvbases_hf.models.lora_files import adapter_tensors
from tvbases_hf.storage.checkpoint import Checkpoint

from .basis_state import LayerState, Selection, Table, check_not_merged, find

DEFAULT_NAME, SECOND_NAME = "default", "basis"
# Half precision changes a weight by 0.4 % at most and fine-tuning by a few per cent; another model by all of it.
SAME_BASE = 0.1


def attach(basis: LoraBasis, model: Any, task: str | None = None, *, adapter_name: str | None = None) -> Any:
    """Put a basis on a model; the model is changed in place, and returned as a PeftModel.

    Args:
        model: a transformers model, or a PeftModel that has other adapters already (the basis becomes the active one).
        task: the first selection; None for the sum of the vectors, times alpha.
        adapter_name: PEFT's name for it; "default" on a fresh model, else "basis".

    Raises:
        MissingExtraError: PEFT is not installed, or too old.
        MismatchError: the model lacks a module, has another shape, or other weights than the base.
        ParameterError: an unknown task, a name that is taken, a layer or a change that cannot be switched.
    """
    peft = _peft()
    info, source = basis.info, basis.source
    row = _row(info, task)
    if source.whole:
        raise ParameterError(
            f"the adapters change {len(source.whole)} weights as a whole (first: {source.whole[0]}), which cannot be "
            "switched between tasks; use adapter(task, base=...) or restore"
        )
    host = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    names = list(model.peft_config) if isinstance(model, peft.PeftModel) else []
    adapter_name = adapter_name or (SECOND_NAME if names else DEFAULT_NAME)
    if adapter_name in names:
        raise ParameterError(f'the model has an adapter "{adapter_name}" already; give another adapter_name')
    _check_model(host, info)
    changes = _changes(source)
    assert info.adapters is not None
    specs = {name: info.adapters.modules[name] for name in changes}
    _check_unmerged(host, specs)
    attached = _insert(peft, model, source, info, changes, adapter_name)
    selection = Selection(_key(info), adapter_name, info.tasks, torch.tensor([row]))
    layers = [attached.get_base_model().get_submodule(spec.module) for spec in specs.values()]
    try:
        _check_switchable(layers)
    except ParameterError:
        attached.delete_adapter(adapter_name)
        raise
    _freeze(attached, adapter_name)
    for layer, (name, spec) in zip(layers, specs.items(), strict=True):
        layer.lora_variant[adapter_name] = _variant()(_state(source, info, name, spec, selection))
    return attached


def select(basis: LoraBasis, model: Any, task: str | None, *, adapter_name: str | None = None) -> None:
    """Switch to another task. Raises ParameterError where the basis is not attached, or its weights are merged."""
    row = _row(basis.info, task)
    selection = find(_key(basis.info), model, adapter_name)
    check_not_merged(model, selection)
    if selection.is_mixed:
        raise ParameterError("the rows of the batch have tasks of their own inside mixed(); select before or after it")
    selection.rows = torch.tensor([row])


@contextlib.contextmanager
def mixed(
    basis: LoraBasis, model: Any, tasks: Sequence[str | None], *, repeat: int = 1, adapter_name: str | None = None
) -> Iterator[None]:
    """Inside, row i of every batch uses tasks[i]; generation too, with ``repeat`` beams or sequences for each row."""
    rows = torch.tensor([_row(basis.info, task) for task in tasks])
    if not len(rows) or repeat < 1:
        raise ParameterError("mixed() needs one task for each row of the batch, and a repeat of at least 1")
    selection = find(_key(basis.info), model, adapter_name)
    check_not_merged(model, selection)
    before = selection.rows, selection.repeat
    selection.rows, selection.repeat = rows, repeat
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = host.register_forward_pre_hook(_batch_check(selection, len(rows)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        selection.rows, selection.repeat = before


def _batch_check(selection: Selection, rows: int) -> Any:
    """A hook that refuses a batch of another length before any layer sees it."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim:
                if len(value) not in (rows, rows * selection.repeat):
                    raise ParameterError(selection.complaint(len(value)))
                return

    return check


def _peft() -> Any:
    try:
        import peft
        from peft.tuners.lora.layer import LoraVariant  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'attach needs PEFT 0.20 or later ({error}); pip install "tvbases-hf[peft]"') from error
    return peft


def _row(info: BasisInfo, task: str | None) -> int:
    return len(info.tasks) if task is None else info.index(task)


def _key(info: BasisInfo) -> str:
    """Tells an attached basis from another one; the same for a basis that was saved and loaded."""
    return hashlib.sha256(json.dumps(info.to_json(), sort_keys=True).encode()).hexdigest()


def _changes(source: LoraVectors) -> dict[str, Delta]:
    """All vectors of each weight side by side; weights that no task changes are left out."""
    found: dict[str, Delta] = {}
    for name, spec in source.specs.items():
        if sum(spec.ranks) or source.scales(name) is not None:
            joined = side_by_side([(part, 1.0) for part in low_parts(source.deltas(name))])
            found[name] = joined.to(joined.device, torch.float32)
    return found


def _insert(peft: Any, model: Any, source: LoraVectors, info: BasisInfo, changes: dict[str, Delta], name: str) -> Any:
    """The PeftModel with the vectors as an active adapter. Its own scaling is alpha, as in the stock file."""
    assert info.adapters is not None
    alpha = info.adapters.alpha
    tensors, words = adapter_tensors(changes, template(info.adapters, source), Checkpoint.from_state_dict({}))
    words |= {"lora_alpha": alpha * words["lora_alpha"]}
    words |= {"alpha_pattern": {module: alpha * value for module, value in words["alpha_pattern"].items()}}
    config = peft.LoraConfig(**{word: value for word, value in words.items() if word != "peft_type"})
    if isinstance(model, peft.PeftModel):
        attached = model
        attached.add_adapter(name, config)
        attached.set_adapter(name)
    else:
        config.base_model_name_or_path = None  # PEFT writes the model's own, and would warn of another
        attached = peft.get_peft_model(model, config, adapter_name=name)
    result = peft.set_peft_model_state_dict(attached, tensors, adapter_name=name)
    if result.unexpected_keys:
        raise MismatchError(f"PEFT did not take {len(result.unexpected_keys)} tensors ({result.unexpected_keys[0]})")
    return attached


def _freeze(model: nn.Module, adapter_name: str) -> None:
    """PEFT makes the adapter that it activates trainable; training would change all tasks at once."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad_(False)


def _state(source: LoraVectors, info: BasisInfo, name: str, spec: Spec, selection: Selection) -> LayerState:
    """Coefficients relative to the adapter's scaling: decoder / alpha for the tasks, ones for the sum."""
    assert info.adapters is not None
    alpha = info.adapters.alpha
    decoder = torch.tensor(info.decoder, dtype=torch.float64)
    sizes = torch.tensor(spec.ranks)
    coefficients = torch.cat([decoder.T / alpha, torch.ones(1, len(sizes), dtype=torch.float64)])
    table = coefficients.repeat_interleave(sizes, dim=1).float()
    if not table.shape[1]:
        table = torch.zeros(len(coefficients), 1)
    scales = source.scales(name)
    if scales is None:
        return LayerState(selection, Table(table))
    total = alpha * (source.weights @ scales.to(torch.float64))
    return LayerState(selection, Table(table), Table(torch.cat([scales.float(), total.float()[None]])))


def _check_model(host: Any, info: BasisInfo) -> None:
    """MismatchError unless the model has the modules of the basis, in their shapes and with the base's numbers."""
    assert info.adapters is not None
    specs = info.adapters.modules
    found = dict(host.named_modules())
    missing = [spec.module for spec in specs.values() if spec.module not in found]
    if missing:
        raise MismatchError(
            f"the model lacks {len(missing)} of the {len(specs)} modules of the basis (first: {missing[0]}), which was "
            f"built on {info.base_id}; load that, with the class the adapters were made for"
        )
    weights = {name: weight for name, spec in specs.items() if (weight := _weight(found[spec.module])) is not None}
    for name, weight in weights.items():
        shape, spec = [len(weight), weight.numel() // max(1, len(weight))], specs[name]
        if shape != spec.shape:
            raise MismatchError(
                f"{spec.module} is {shape} in this model and {spec.shape} in the basis, which was built on "
                f"{info.base_id}; attach it to that model"
            )
    for name, numbers in info.adapters.base_sample.items():
        sample = torch.tensor(numbers)
        own = weights[name].detach().reshape(-1)[: len(sample)].float().cpu() if name in weights else sample
        if (own - sample).norm() > SAME_BASE * sample.norm():
            raise MismatchError(
                f"the weights of {specs[name].module} are not those of {info.base_id}, on which the basis was built; "
                "attach it to that model"
            )


def _weight(module: nn.Module) -> Tensor | None:
    """The module's own weight below any adapters; None where it is quantised or not in memory."""
    below = getattr(module, "get_base_layer", None)
    base = below() if callable(below) else module
    weight = getattr(base, "weight", None)
    usable = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta
    return weight if usable else None


def _check_unmerged(host: Any, specs: dict[str, Spec]) -> None:
    for spec in specs.values():
        if getattr(host.get_submodule(spec.module), "merged", False):
            raise ParameterError(f"an adapter is merged into {spec.module}; unmerge it first (model.unmerge_adapter())")


def _check_switchable(layers: list[Any]) -> None:
    """ParameterError for a kind of layer (some quantised ones) whose forward pass does not ask for a LoraVariant."""
    for layer in layers:
        code = getattr(type(layer).forward, "__code__", None)
        if code is not None and "lora_variant" not in code.co_names:
            raise ParameterError(
                f"PEFT's {type(layer).__module__}.{type(layer).__name__} cannot switch tasks; load the base "
                "without this quantisation, or use adapter(task)"
            )


def _variant() -> Any:
    """The LoraVariant; its base class is PEFT's, which is imported only now."""
    from .basis_layer import BasisVariant

    return BasisVariant
