"""T adapters compressed into one basis: the candidates, their errors, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ...algebra.rank import RankRule
from ...bases import CONSTRUCTIONS, BasisWeights, Construction
from ...errors import ParameterError
from ...models.fit import changes_nothing
from ...models.gram import Gram
from ...models.vectors import Vectors
from ...version import library_version
from ..info import AdapterInfo, BasisInfo
from ..request import COMPARED, Request
from .budget import Menu
from .choice import Plan, Survey, choose, encoded_menus, survey, vector_shares
from .encode import Encoded, encode
from .lora_vectors import LoraVectors, assemble, stock_error
from .pool import POOL_OPTIONS, Pool, base_id

# Shares of T that are tried as the number of bases where only a budget is given.
TRIED_BASES = (0.25, 0.5, 0.75)
# Another method takes the place of truncation if its error is below this share of truncation's.
BETTER = 0.98


def compress_adapters(
    vectors: Vectors, gram: Gram, request: Request, dtype: torch.dtype | None = None
) -> tuple[BasisInfo, LoraVectors]:
    """Choose, encode and describe a basis of adapters.

    Args:
        vectors: T adapters over one base.
        request: as resolved.
        dtype: what is stored; None for the adapters' own.

    Raises ParameterError for a request that cannot be met, such as a budget below what has to be kept.
    """
    if not gram.norms.any():
        raise ParameterError(
            f"nothing to compress: {changes_nothing(vectors.tasks[0])}, and there is no other (of {len(vectors)})"
        )
    pool = Pool.of(vectors, gram, dtype, **{n: v for n, v in request.options.items() if n in POOL_OPTIONS})
    found = survey(pool)
    plans = _plans(pool, found, request)
    best, candidates = _best(pool, plans, request)
    encoded = encode(pool, best, request.alpha)
    source = assemble(
        encoded.stored, encoded.specs, pool.beside, pool.template, vectors.base, request.alpha, best.row_weights
    )
    used = sum(info.nbytes for info in source.tensors.values())
    _check_useful(encoded, pool, used)
    trivial = encoded
    if best.method != "tsv":
        alone = _truncated(pool, found, max(0, used - pool.fixed_bytes(request.alpha)))
        trivial = encode(pool, alone, request.alpha, keep=False)
    info = _describe(pool, encoded, trivial, request, candidates, found, gram, stock_error(source, vectors.base))
    return info, source.fitted(request.equal_rank, request.host)


def _plans(pool: Pool, found: Survey, request: Request) -> list[Plan]:
    """What to compare: what was asked for, or truncation, shared factors and sums of tasks at the budget."""
    if request.budget is None:
        weights = _identity(len(pool), "tsv") if request.method == "tsv" else _weights(pool, found, request)
        rule = RankRule.parse(pool.rank if request.rank is None else request.rank)
        return [Plan(weights, vector_shares(weights, pool.weights), {}, rule)]
    available = request.budget * pool.adapters_bytes - pool.fixed_bytes(request.alpha)
    if available < 0:
        raise ParameterError(
            f"budget {request.budget:g} is {request.budget * pool.adapters_bytes:.0f} bytes, less than what is kept as "
            f"it is ({pool.fixed_bytes(request.alpha)} bytes of row scales, biases and saved modules)"
        )
    wanted = (request.method,) if request.method else COMPARED
    plans = []
    if "tsv" in wanted or "joint" in wanted:
        plans.append(_truncated(pool, found, available))
    if "joint" in wanted:
        plans.append(_tasks_plan(pool, found, "joint", found.joint, available))
    if set(CONSTRUCTIONS) & set(wanted) and (len(pool) > 1 or request.method):
        plans.append(_sums_plan(pool, found, request, available))
    return plans


def _truncated(pool: Pool, found: Survey, available: float) -> Plan:
    return _tasks_plan(pool, found, "tsv", found.alone, available)


def _tasks_plan(pool: Pool, found: Survey, method: str, menus: Mapping[str, Menu], available: float) -> Plan:
    """Every task by itself, over shared factors or not; the gains in the menus are exact."""
    choices, gain = choose(menus, available)
    lost = float(found.gram.diagonal() @ pool.weights) - gain
    return Plan(_identity(len(pool), method), pool.weights, choices, lost=lost)


def _sums_plan(pool: Pool, found: Survey, request: Request, available: float) -> Plan:
    """Bases that are sums of tasks at the budget; without a number of them, the one that promises the least error."""
    count = len(pool)
    tried = sorted({max(1, round(share * count)) for share in TRIED_BASES} - {count}) or [1]
    numbers: Sequence[float | None] = [request.num_bases]
    if request.num_bases is None and _construction(request).num_bases is not None:  # it finds no number of its own
        numbers = tried
    options = [_weights(pool, found, replace(request, num_bases=number)) for number in numbers]
    plans = []
    for weights, menus in zip(options, encoded_menus(pool, options), strict=True):
        choices, gain = choose(menus, available)
        total = sum(float(menu.gain[-1]) for menu in menus.values())
        residual = weights.reconstruction - torch.eye(count, dtype=torch.float64)
        missed = (residual * (found.gram @ residual)).sum(dim=0) @ pool.weights
        plans.append((float(missed) + total - gain, Plan(weights, vector_shares(weights, pool.weights), choices)))
    return min(plans, key=lambda plan: plan[0])[1]


def _construction(request: Request) -> Construction:
    return CONSTRUCTIONS[request.method or "ae"]


def _weights(pool: Pool, found: Survey, request: Request) -> BasisWeights:
    construction = _construction(request)
    options = {"normalize": pool.normalize, **request.options}
    own = {name: value for name, value in options.items() if name in construction.options}
    return construction.solve(found.gram, request.num_bases, **own)


def _identity(count: int, method: str) -> BasisWeights:
    identity = torch.eye(count, dtype=torch.float64)
    return BasisWeights(method, identity, identity, loss=0.0, bound=0.0, spectral_bound=0.0)


def _best(pool: Pool, plans: Sequence[Plan], request: Request) -> tuple[Plan, dict[str, float]]:
    """The plan of least error, truncation where another is not better; root mean square errors by method."""
    if request.budget is None:
        return plans[0], {}
    total = float((pool.square_norms * pool.weights).sum()) or 1.0
    errors = {}
    for plan in plans:
        lost = plan.lost
        if lost is None:
            lost = float(encode(pool, plan, request.alpha, keep=False).before @ pool.weights)
        errors[plan.method] = (max(0.0, lost) / total) ** 0.5
    by_method = {plan.method: plan for plan in plans}
    best = min(errors, key=errors.__getitem__)
    if "tsv" in errors and errors[best] >= BETTER * errors["tsv"]:
        best = "tsv"
    return by_method[best], errors


def _check_useful(encoded: Encoded, pool: Pool, used: int) -> None:
    if not any(spec.width for spec in encoded.specs.values()):
        smallest = min(pool.dtype.itemsize * sum(pool.shape(name)) for name in pool.names)
        raise ParameterError(
            f"the budget holds no component of any weight: {used} bytes, where the smallest takes {smallest}; "
            "give a larger one"
        )


def _describe(
    pool: Pool,
    encoded: Encoded,
    trivial: Encoded,
    request: Request,
    candidates: dict[str, float],
    found: Survey,
    gram: Gram,
    stock: float,
) -> BasisInfo:
    weights, vectors = encoded.plan.weights, pool.vectors
    total = float((pool.square_norms * pool.weights).sum()) or 1.0
    loss = float(encoded.before @ pool.weights) / total
    adapters = AdapterInfo(
        alpha=request.alpha,
        dtype=str(pool.dtype).removeprefix("torch."),
        adapters_bytes=pool.adapters_bytes,
        error_before_rounding=_errors(encoded.before, pool),
        truncation_error=_errors(trivial.after, pool),
        candidates=candidates,
        stock_error=stock,
        overlap=found.overlap,
        modules=encoded.specs,
        bias_modules=pool.template.bias_modules,
        saved=sorted(pool.template.saved),
        head=list(pool.template.head),
        naming={word: value for word, value in asdict(pool.template.naming).items() if value or word != "memory"},
        base_sample=pool.base_sample(),
    )
    return BasisInfo(
        method=weights.method,
        options={
            "budget": request.budget,
            "rank": None if request.rank is None else str(request.rank),
            **request.options,
        },
        tasks=vectors.tasks,
        encoder=weights.encoder.tolist(),
        decoder=encoded.decoder.tolist(),
        mean=None,
        loss=loss,
        bound=weights.bound / weights.total if encoded.plan.refits else loss,
        spectral_bound=weights.spectral_bound / weights.total if encoded.plan.refits else loss,
        task_error=_errors(encoded.after, pool),
        gram=gram.matrix.tolist(),
        base_id=base_id(vectors),
        base_fingerprint=vectors.base.fingerprint(),
        base_norm=gram.base_norm,
        adapters=adapters,
        library_version=library_version(),
    )


def _errors(lost: Tensor, pool: Pool) -> list[float]:
    norms = torch.where(pool.square_norms > 0, pool.square_norms, torch.ones_like(pool.square_norms))
    return (lost.clamp_min(0) / norms).sqrt().tolist()
