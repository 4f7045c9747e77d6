"""The merging methods of tvbases_hf as mergekit's: whatever its registry knows and mergekit does not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import NoneType
from typing import Any, Literal, get_origin

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense, reshaped, work_dtype
from tvbases_hf.algebra.dtypes import promoted
from tvbases_hf.algebra.layout import is_stack, of_experts, stacked, unstacked
from tvbases_hf.methods.registry import METHODS, Method
from tvbases_hf.models.names import as_stored, is_transposed, matrices_in
from tvbases_hf.options import Option
from tvbases_hf.storage.checkpoint import Checkpoint

from .sources import WholeMerge, models_of

LAMBDA = ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0, description="factor on the merged change")
WEIGHT = ParameterSpec(
    "weight", float, ParameterScope.NON_BASE, default=1.0, description="weight of a model; may be negative"
)
ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
CONTRACT = InputContract(base=BasePolicy.REQUIRED, min_inputs=1)


def parameter(option: Option, name: str | None = None) -> ParameterSpec:
    """An option as mergekit declares it; what it may be beyond its type is checked by the option itself."""
    kinds: list[Any] = [str if get_origin(kind) is Literal else kind for kind in option.kinds]
    kind = reduce(or_, [*kinds, NoneType] if option.may_be_none else kinds)
    return ParameterSpec(
        name or option.name, kind, ParameterScope.SHARED, default=option.default, description=option.help
    )


@dataclass(frozen=True, eq=False)
class RegisteredMerge(WholeMerge):
    """theta_0 + lambda * method(deltas, weights): the change of one weight, from the models' changes of it."""

    method: Method

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise ParameterError for parameters with which the merge would fail."""
        self.method.checked(self._own(parameters))

    def density(self, parameters: Mapping[str, Any]) -> float | None:
        """The share of entries to keep where the thresholds are those of the whole model."""
        return self.method.of_whole_model(self._own(parameters))

    def by_rows(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a block of rows of a tall matrix is all that it needs, the last step included."""
        return self.method.is_by_rows(self._own(parameters))

    def change(
        self,
        name: str,
        shape: Sequence[int],
        deltas: Sequence[Delta],
        weights: Sequence[float],
        parameters: Mapping[str, Any],
        base: Checkpoint | None = None,
    ) -> Delta:
        """What the method makes of the changes; ``parameters`` as given, and ``limits`` where they are the model's.

        ``base`` tells how its weights are stored. Experts that it does not hold under this name, because mergekit has
        packed [E, gate + up, in] of its matrices, are merged as these: as `tvbases merge` does, which reads them so.
        """
        options = self.method.checked(self._own(parameters))
        if "limits" in parameters:
            options["limits"] = parameters["limits"]
        if base is None or not _is_packed(name, shape, base):
            if base is None or name not in base.tensors or base.tensors[name].shape != tuple(shape):
                return self.method.change(name, shape, deltas, weights, options)
            turned, shape = self.method.has_side and is_transposed(name, base), matrices_in(name, base)
            change = self.method.change(name, shape, deltas, weights, options, transposed=turned)
            return as_stored(change, name, base)
        return stacked([self._packed(name, part, weights, options) for part in unstacked(deltas, shape)])

    def _packed(
        self, name: str, deltas: Sequence[Delta], weights: Sequence[float], options: Mapping[str, Any]
    ) -> Delta:
        """One expert that mergekit has packed: gate and up are two matrices."""
        if not name.endswith("gate_up_proj"):
            return self.method.change("expert", deltas[0].shape, deltas, weights, options)
        rows, columns = deltas[0].shape[0] // 2, deltas[0].shape[1]
        halves = unstacked([reshaped(d, (2, rows, columns), work_dtype(deltas)) for d in deltas], (2, rows, columns))
        found = [self.method.change("expert", (rows, columns), half, weights, options) for half in halves]
        return reshaped(stacked(found), deltas[0].shape, work_dtype(found))

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        assert group.base is not None  # the contract requires it
        base = group.base.tensor
        if not group.non_base:
            return base
        deltas = [Dense(entry.tensor, base) for entry in group.non_base]
        weights = [float(parameters["weight"][entry.id]) for entry in group.non_base]
        change = self.change(
            group.metadata.name or "a tensor", base.shape, deltas, weights, parameters, self.stored(group)
        )
        work = promoted(base.dtype, torch.float32)
        return (base.to(work) + parameters["lambda"] * dense(change, work).reshape(base.shape)).to(base.dtype)

    def stored(self, group: TensorGroup) -> Checkpoint | None:
        """The base as it is stored, where it matters and is known: how its matrices lie."""
        assert group.base is not None
        of_files = all(isinstance(entry.id, ModelReference) for entry in group.entries)
        matters = self.method.has_side or of_experts(group.metadata.name or "")
        models = models_of([group], self.planned) if of_files and matters else None
        return None if models is None else models.vectors.base

    def _execute(self, groups, parameters, options, *, input_dtypes, out_dtype=None):
        densities = [self.density(bound) for bound in parameters]
        if any(density is not None for density in densities):
            models = models_of(groups, self.planned)
            parameters = [
                bound if density is None or models is None or not group.non_base
                else {**bound, "limits": [models.limits(density)[column] for column in models.columns(group)]}
                for group, bound, density in zip(groups, parameters, densities, strict=True)
            ]  # fmt: skip
        return super()._execute(groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype)

    def _own(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {name: parameters[name] for name in self.method.options if name in parameters}


def _is_packed(name: str, shape: Sequence[int], base: Checkpoint) -> bool:
    """Whether these are matrices that the base stores one by one."""
    return is_stack(name, shape) and name not in base.tensors and any(map(ONE_EXPERT.search, base.tensors))


def registered_merge(method: Method) -> RegisteredMerge:
    spec = MergeMethodSpec(
        name=method.name,
        parameters=(LAMBDA, WEIGHT, *map(parameter, method.options.values())),
        contract=CONTRACT,
        pretty_name=method.title,
        reference_url=method.source,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )
    return RegisteredMerge(spec, method)


def missing_methods(known: set[str]) -> list[RegisteredMerge]:
    """Our methods but for those whose name mergekit knows, as of an own method."""
    return [registered_merge(method) for method in METHODS.values() if method.name not in known]
