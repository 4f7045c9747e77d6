"""Merge methods that replace the T models by M bases, or by their reconstructions, and hand these to another method."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Optional

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    MergeMethod,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from pydantic import Field
from torch import Tensor

from tvbases_hf.algebra.blocks import BLOCK_NUMBERS
from tvbases_hf.algebra.delta import Dense, dense
from tvbases_hf.algebra.dtypes import promoted
from tvbases_hf.algebra.sums import mix
from tvbases_hf.bases import CONSTRUCTIONS, BasisWeights
from tvbases_hf.bases.registry import Construction
from tvbases_hf.errors import ParameterError, did_you_mean
from tvbases_hf.methods.sums import normalized
from tvbases_hf.options import Option

from .constructions import chosen, parameters_of
from .registered import CONTRACT, LAMBDA, RegisteredMerge, parameter
from .sources import Models, WholeMerge, models_of

OVER = Option(
    "over",
    Annotated[Literal["bases", "reconstructions"], Field(description="which vectors are merged")],
    "bases",
)
CONSENSUS = Option(
    "consensus",
    Annotated[
        Literal["mean", "sum"] | None,
        Field(description="with merge: ties, what becomes of the vectors that agree in sign"),
    ],
    None,
)
OWN = (
    ParameterSpec(
        "merge", str, ParameterScope.SHARED, default="task_arithmetic", description="the method that merges the vectors"
    ),
    parameter(OVER),
    parameter(CONSENSUS),
    LAMBDA,
    # Absent unless the user gives it, which switches to the weighted sum of the reconstructions.
    ParameterSpec("weight", Optional[float], ParameterScope.NON_BASE, default=None),  # noqa: UP045 (for pydantic on 3.10)
)


@dataclass(frozen=True, eq=False)
class BasisMerge(WholeMerge):
    """theta_0 + lambda * inner(vectors): the vectors are the M bases, or the T reconstructed task vectors.

    ``inner`` is another registered method that takes a base; it sees the vectors as models. With ``weight`` given it
    is theta_0 + lambda * sum_i w_i tau_hat_i for the default inner method: negative weights forget.
    """

    bases: Construction
    passed_on: frozenset[str]

    def check(self, parameters: Mapping[str, Any], num_tasks: int) -> None:
        """Raise ParameterError for the parameters of one tensor if its merge would fail or ignore some of them."""
        fewest, most = self.bases.counts(parameters["num_bases"], num_tasks)
        chosen(self.bases, parameters)
        weighted = _is_weighted(parameters["weight"].values())
        over_bases = OVER.check(parameters["over"], self.spec.name) == "bases" and not weighted
        inner = self.inner(parameters)
        given = [name for name in self.passed_on if _is_given(parameters[name])]
        _check_inner(inner, given, weighted)
        _check_consensus(inner, parameters[CONSENSUS.name], given)
        if isinstance(inner, RegisteredMerge):
            inner.check({name: _only_value(name, _values(parameters[name])) for name in given})
        for count in sorted({fewest, most} if over_bases else {num_tasks}):
            try:
                inner.validate_inputs(["base", *range(count)], "base")
            except ValueError as error:
                raise ParameterError(
                    f"merge: {inner.spec.name} cannot take {count} vectors and the base ({error}); choose another "
                    f"{'num_bases' if over_bases else 'number of models'} or another merge"
                ) from error

    def _execute(self, groups, parameters, options, *, input_dtypes, out_dtype=None):
        for group, bound in zip(groups, parameters, strict=True):
            if group.non_base:
                self.check(bound, len(self.planned.get(group.metadata.name) or group.non_base))
        # mergekit hands one tensor at a time from files, all at once from memory: the Gram matrix needs them all.
        models = models_of(groups, self.planned)
        parameters = [{**bound, "models": models} for bound in parameters]
        return super()._execute(groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        assert group.base is not None  # the contract requires it
        base = group.base.tensor
        if not group.non_base:
            return base
        models: Models = parameters.pop("models")
        inner, mixing, passed = self.prepare(models, models.columns(group), parameters)
        if isinstance(inner, RegisteredMerge):
            vectors = mix([Dense(entry.tensor, base) for entry in group.non_base], mixing)
            stored = models.vectors.base if isinstance(group.base.id, ModelReference) else None
            name = group.metadata.name or "a tensor"
            made = inner.change(name, base.shape, vectors, passed["weight"], passed, stored)
            change = dense(made, promoted(base.dtype, torch.float32)).reshape(base.shape)
            return (base.to(change.dtype) + parameters["lambda"] * change).to(base.dtype)
        if is_plain_sum(inner):
            weights = mixing @ mixing.new_tensor(normalized(passed["weight"], passed.get("normalize", False)))
            return _weighted_sum(base, [entry.tensor for entry in group.non_base], weights, parameters["lambda"])
        change = merge_vectors(inner, base, _combine(group, mixing), passed)
        return (base.to(change.dtype) + parameters["lambda"] * change).to(base.dtype)

    def inner(self, parameters: Mapping[str, Any]) -> MergeMethod:
        """The method that combines the vectors; ParameterError unless it takes a base."""
        return _inner_method(parameters["merge"], self.spec.name)

    def prepare(
        self, models: Models, columns: Sequence[int], parameters: Mapping[str, Any]
    ) -> tuple[MergeMethod, Tensor, dict[str, Any]]:
        """The inner method, [present tasks, vectors] float64 how its vectors are made, and its parameters."""
        weights = models.solve(self.bases, parameters["num_bases"], chosen(self.bases, parameters))
        inner = self.inner(parameters)
        mixing, task_weights = _mixing(weights, columns, parameters)
        ids, given = tuple(parameters["weight"]), {name: parameters[name] for name in self.passed_on}
        passed = _inner_parameters(inner, mixing, task_weights, ids, given)
        if consensus := parameters[CONSENSUS.name]:
            passed["normalize"] = consensus == "mean"  # mergekit's word for it
        if isinstance(inner, RegisteredMerge) and (density := inner.density(passed)):
            weighted = _is_weighted(parameters["weight"].values())
            limits = models.limits(density, weights, "reconstructions" if weighted else parameters["over"])
            passed["limits"] = [limits[column] for column in columns] if weighted else limits
        return inner, mixing, passed


def _mixing(weights: BasisWeights, columns: Sequence[int], parameters: Mapping[str, Any]) -> tuple[Tensor, list[float]]:
    """[present tasks, vectors] float64 how the merged vectors are made, and the weight of each vector."""
    given = list(parameters["weight"].values())
    rows = list(columns)
    if _is_weighted(given):
        # Where a model lacks this tensor, mergekit does not tell its weight: its reconstruction is left out.
        return weights.reconstruction[rows][:, rows], [float(weight) for weight in given]
    mixing = weights.encoder if parameters["over"] == "bases" else weights.reconstruction
    return mixing[rows], [1.0] * mixing.shape[1]


def _is_weighted(weights: Iterable[float | None]) -> bool:
    """Whether the user weighs the tasks; ParameterError if only some of them."""
    weighted = [weight is not None for weight in weights]
    if any(weighted) and not all(weighted):
        raise ParameterError(
            f"weight is set for {sum(weighted)} of {len(weighted)} models; set it for every model (0 leaves a task "
            "out), or for none to add up the bases"
        )
    return any(weighted)


def is_plain_sum(inner: MergeMethod) -> bool:
    """Whether a method adds up its vectors and does nothing else, so that the vectors need not be made."""
    return (
        isinstance(inner, GeneralizedTaskArithmeticMerge)
        and inner.consensus_method is None
        and inner.sparsification_method is None
    )


def _weighted_sum(base: Tensor, models: Sequence[Tensor], weights: Tensor, alpha: float) -> Tensor:
    """base + alpha * sum_i w_i (model_i - base) in the base's dtype, summed in float32 at least, block by block.

    Beside what it is given and the result, only one block of every model is in memory.
    """
    work = promoted(base.dtype, torch.float32)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat, flats = base.reshape(-1), [model.reshape(-1) for model in models]
    for start in range(0, len(flat), BLOCK_NUMBERS):
        part = slice(start, start + BLOCK_NUMBERS)
        own = flat[part].to(work)
        total = torch.zeros_like(own)
        for model, weight in zip(flats, weights.tolist(), strict=True):
            if weight != 0:
                total.add_(model[part].to(work) - own, alpha=weight)
        out.view(-1)[part] = own + alpha * total
    return out


def _combine(group: TensorGroup, mixing: Tensor) -> list[Tensor]:
    """The merged vectors of this tensor: sums of deltas, float32 at least, one delta in memory at a time."""
    assert group.base is not None
    work = promoted(group.base.tensor.dtype, torch.float32)
    base = group.base.tensor.to(work)
    vectors = [torch.zeros_like(base) for _ in range(mixing.shape[1])]
    for entry, shares in zip(group.non_base, mixing.tolist(), strict=True):
        delta = entry.tensor.to(work, copy=True).sub_(base)
        for vector, share in zip(vectors, shares, strict=True):
            if share != 0:
                vector.add_(delta, alpha=share)
    return vectors


def merge_vectors(inner: MergeMethod, base: Tensor, vectors: Sequence[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    """What ``inner`` adds to the base, in the vectors' dtype.

    Methods for any number of models work on the differences from the base: they get a base of zeros, so that nothing
    is lost by adding and subtracting it. Those for exactly two models (slerp, nearswap) compare the weights as such.
    """
    if inner.spec.contract.max_inputs is None:
        return _called(inner, vectors[0].new_zeros(()).expand_as(vectors[0]), vectors, parameters)
    origin = base.to(vectors[0].dtype)
    return _called(inner, origin, [origin + vector for vector in vectors], parameters) - origin


def _called(inner: MergeMethod, base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    entries = [TensorEntry(id="base", tensor=base, is_base=True)]
    entries += [TensorEntry(id=index, tensor=model) for index, model in enumerate(models)]
    (merged,) = inner((TensorGroup(tuple(entries)),), parameters=parameters)
    return merged


def _inner_method(name: str, own: str) -> MergeMethod:
    methods = {
        m.spec.name: m for m in registry.registered_methods() if _takes_base(m) and not isinstance(m, BasisMerge)
    }
    if name not in methods:
        raise ParameterError(
            f"{own}: merge: {name!r} is not a method that takes a base{did_you_mean(name, methods)}; "
            f"choose one of {', '.join(sorted(methods))}"
        )
    return methods[name]


def _takes_base(method: MergeMethod) -> bool:
    return method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)


def _inner_parameters(
    inner: MergeMethod, mixing: Tensor, weights: list[float], ids: Sequence[Hashable], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The inner method's parameters, as far as given; a per-model value becomes a basis's mean, weighted by shares."""
    declared = {spec.name: spec for spec in inner.spec.parameters}
    passed: dict[str, Any] = {}
    for name, value in parameters.items():
        if not _is_given(value):
            continue
        spec = declared[name]
        if spec.scope == ParameterScope.SHARED:
            passed[name] = _only_value(name, _values(value))
            continue
        given = [value[key] for key in ids]
        per_task = mixing.new_tensor([float(spec.default if v is None else v) for v in given])
        shares = mixing.abs() / mixing.abs().sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        equal = bool((per_task == per_task[0]).all())
        passed[name] = [float(per_task[0])] * len(weights) if equal else (per_task @ shares).tolist()
    if "weight" in declared:
        passed["weight"] = weights
    return passed


def _check_inner(inner: MergeMethod, given: Sequence[str], weighted: bool) -> None:
    """Raise ParameterError for a parameter that the inner method would ignore, or needs and does not get."""
    declared = {spec.name: spec for spec in inner.spec.parameters}
    for name in (*sorted(given), *(["weight"] if weighted else [])):
        if name not in declared:
            takes = ", ".join(key for key in declared if key not in ("weight", "lambda")) or "none"
            raise ParameterError(
                f"{name} is not a parameter of merge: {inner.spec.name}, which would ignore it; remove it, or choose "
                f"another merge (parameters of {inner.spec.name}: {takes})"
            )
    for name, spec in declared.items():
        if spec.required and name != "weight" and name not in given:
            raise ParameterError(f"merge: {inner.spec.name} needs the parameter {name}; add it under parameters")


def _check_consensus(inner: MergeMethod, consensus: str | None, given: Sequence[str]) -> None:
    """Raise ParameterError where a consensus is asked of a method that has none, or is said twice."""
    CONSENSUS.check(consensus, inner.spec.name)
    if consensus is None:
        return
    if not (isinstance(inner, GeneralizedTaskArithmeticMerge) and inner.consensus_method is not None):
        raise ParameterError(f"consensus is what ties makes of vectors that agree; merge: {inner.spec.name} has none")
    if "normalize" in given:
        raise ParameterError("consensus: mean and sum are mergekit's normalize: true and false; give one of the two")


def _is_given(value: Any) -> bool:
    return any(v is not None for v in _values(value))


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else [value]


def _only_value(name: str, values: Iterable[Any]) -> Any:
    distinct = {value for value in values if value is not None}
    if len(distinct) > 1:
        raise ParameterError(f"{name} must be the same for all models with this merge method; got {sorted(distinct)}")
    return distinct.pop()


def build_methods(others: Sequence[MergeMethod]) -> list[BasisMerge]:
    """Our methods, declaring the parameters of every base-taking method in ``others``: undeclared ones are ignored."""
    own = {spec.name for spec in (*OWN, *(spec for bases in CONSTRUCTIONS.values() for spec in parameters_of(bases)))}
    passed: dict[str, ParameterSpec] = {}
    for method in others:
        if not _takes_base(method) or isinstance(method, BasisMerge):
            continue
        for spec in method.spec.parameters:
            # Where two methods scope one name differently, per-model values serve both.
            if spec.name not in own and (spec.name not in passed or spec.scope == ParameterScope.NON_BASE):
                passed[spec.name] = replace(spec, value_type=Optional[spec.value_type], default=None)  # noqa: UP045
    return [
        BasisMerge(
            MergeMethodSpec(
                name=bases.yaml,
                parameters=(*OWN, *parameters_of(bases), *passed.values()),
                contract=CONTRACT,
                pretty_name=bases.title,
                reference_url=bases.paper,
                optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
            ),
            bases,
            frozenset(passed),
        )
        for bases in CONSTRUCTIONS.values()
    ]
