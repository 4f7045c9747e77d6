"""What is asked for when models are to become a basis, checked and completed against their kind: once, and only here.

Python's ``Basis.build`` and the command line ask with the same words; ``build`` makes what a resolved request says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from .. import defaults
from ..algebra.rank import RankRule
from ..bases import CONSTRUCTIONS
from ..bases.weights import resolve_num_bases
from ..errors import ParameterError, did_you_mean
from ..methods.registry import METHODS, find_method
from ..options import Option, checked
from .adapters.pool import POOL_OPTIONS
from .library.plan import LIBRARY_OPTIONS
from .masks import MASK_OPTIONS
from .masks import METHOD as MASKS

# What keeps every task by itself: cut to a rank, or (adapters) over shared factors.
PER_TASK = {
    "tsv": "every task truncated by itself",
    "joint": "every task by itself, over shared factors",
    "library": "every task a small core between factors that its cluster shares",
}
# Without a method, more adapters than this become a library: the others take work that grows with their number squared.
MANY = 64
# Compared where adapters get a budget and no method.
COMPARED = ("tsv", "joint", "ae")
DEFAULT_BUDGET = 0.5


def methods_of(adapters: bool) -> dict[str, Mapping[str, Option]]:
    """The options of every way to make a basis, of adapters or of full checkpoints, by name."""
    if not adapters:
        return {**{name: found.options for name, found in CONSTRUCTIONS.items()}, "tsv": {}, MASKS: MASK_OPTIONS}
    sums = {name: found.options | POOL_OPTIONS for name, found in CONSTRUCTIONS.items() if not found.has_mean}
    return {**sums, **dict.fromkeys(PER_TASK, POOL_OPTIONS), "library": LIBRARY_OPTIONS}


def all_options() -> dict[str, dict[str, Option]]:
    """Those of every method, whatever the models are, but for POOL_OPTIONS; ``inner`` may be any merging method."""
    found = {**{name: dict(made.options) for name, made in CONSTRUCTIONS.items()}, **{name: {} for name in PER_TASK}}
    found["library"] = {name: option for name, option in LIBRARY_OPTIONS.items() if name not in POOL_OPTIONS}
    found[MASKS] = dict(MASK_OPTIONS)
    inner = found["cluster"]["inner"]
    words = (*inner.choices, *(name for name in METHODS if name not in inner.choices))
    described = Field(description=f"{inner.help}; for checkpoints, by any merging method")
    found["cluster"]["inner"] = Option("inner", Annotated[Literal[words], described], inner.default)
    return found


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        method: None for ``ae``; of adapters with no number of bases and no rank, whatever loses least.
        num_bases: M, or a fraction of T when below 1; None for what the method's own default is.
        budget: share of the task vectors' bytes to use: ``tsv``, and any method of adapters.
        rank: instead of a budget, a rank rule for every matrix (of adapters: of every basis vector).
        alpha: of adapters: the directory loads in PEFT as base + alpha * sum of the basis vectors.
        equal_rank, host: of adapters: one rank in all modules of the directory; what will load it (models.hosts).
        options: of the method; ``inner`` of ``cluster`` may also be a merging method, followed by its options.
    """

    method: str | None = None
    num_bases: float | None = None
    budget: float | None = None
    rank: str | float | RankRule | None = None
    alpha: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    equal_rank: bool = False
    host: defaults.Host | None = None

    @property
    def merges_clusters(self) -> bool:
        """Whether the vectors are clusters merged by a method, which need not be linear."""
        inner = CONSTRUCTIONS["cluster"].options["inner"]
        return self.method == "cluster" and self.options.get("inner", inner.default) not in inner.choices

    def resolved(self, adapters: bool, num_tasks: int) -> Request:
        """With the defaults filled in. Raises ParameterError for what is unknown or does not go together."""
        asked = replace(self, method=self._method(adapters, num_tasks))
        asked._check_sizes(adapters)
        asked = replace(asked, options=asked._options(adapters))
        budget, num_bases = asked.budget, asked.num_bases
        construction = CONSTRUCTIONS.get(asked.method or "")
        if construction and budget is None and num_bases is None:
            num_bases = construction.num_bases
        elif adapters and not construction and budget is None and asked.rank is None:
            budget = DEFAULT_BUDGET
        if num_bases is not None:
            resolve_num_bases(num_bases, num_tasks)
        return replace(asked, budget=budget, num_bases=num_bases)

    def _method(self, adapters: bool, num_tasks: int) -> str | None:
        method, known = self.method, methods_of(adapters)
        if method is None:
            sized = self.budget is None and (self.num_bases is not None or self.rank is not None)
            if adapters and not sized and num_tasks > MANY:
                return "library"
            return None if adapters and not sized else "ae"
        if adapters and method in CONSTRUCTIONS and method not in known:
            raise ParameterError(
                f"{method} of adapters has no stock form: its vectors are not a sum of tasks; use ae or joint"
            )
        if method in PER_TASK and method not in known:
            raise ParameterError(f"{method} is for adapters only, and these are full checkpoints; leave it out")
        if adapters and method == MASKS:
            raise ParameterError("masks are of full checkpoints, whose entries they pick; of adapters use tsv or joint")
        if method not in known:
            kind = " for adapters" if adapters else ""
            raise ParameterError(
                f"unknown method {method!r}{kind}{did_you_mean(method, known)}; choose one of {', '.join(known)}"
            )
        return method

    def _check_sizes(self, adapters: bool) -> None:
        """Number of bases, rank, budget and alpha, by themselves and together."""
        if self.method == MASKS and not (self.num_bases is None and self.rank is None and self.budget is None):
            raise ParameterError("masks are one vector and one bit an entry for each task; num_bases, rank and budget "
                                 "go with other methods: leave them out")  # fmt: skip
        if self.method in PER_TASK and self.num_bases is not None:
            raise ParameterError(f"{self.method} keeps every task: num_bases goes with ae; give a budget instead")
        if not adapters and self.method != "tsv" and (self.rank is not None or self.budget is not None):
            raise ParameterError(
                f"rank and budget are of method tsv: {self.method} keeps whole vectors of full checkpoints, and "
                "num_bases says how many"
            )
        if self.rank is not None:
            RankRule.parse(self.rank)
            if self.budget is not None or self.method in ("joint", "library"):
                raise ParameterError(
                    "rank and budget both decide the ranks; give one of them (joint and library take a budget)"
                )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ParameterError(f"budget is a share of the models' bytes, between 0 and 1; got {self.budget}")
        if not adapters and self.alpha != 1:
            raise ParameterError("alpha is for adapters only, and these are full checkpoints; leave it out")
        if not adapters and (self.equal_rank or self.host):
            raise ParameterError("equal_rank and host are of adapters, and these are full checkpoints; leave them out")
        if not self.alpha or not abs(self.alpha) < float("inf"):
            raise ParameterError(f"alpha is the weight of the merged adapter, a number other than 0; got {self.alpha}")

    def _options(self, adapters: bool) -> dict[str, Any]:
        """Every option checked; ParameterError for one that the method does not have."""
        if self.merges_clusters and not adapters:
            own = {name: value for name, value in self.options.items() if name in _CLUSTERING}
            rest = {name: value for name, value in self.options.items() if name not in (*own, "inner")}
            inner = self.options["inner"]
            given = {**CONSTRUCTIONS["cluster"].checked(own), "inner": inner, **find_method(inner).checked(rest)}
            return {name: given[name] for name in self.options}
        methods = methods_of(adapters)
        known = POOL_OPTIONS if self.method is None else methods[self.method]
        for name in self.options:
            others = [method for method, options in methods.items() if name not in known and name in options]
            if others:
                of = self.method or f"the best of {', '.join(COMPARED)}, which is taken without a method"
                raise ParameterError(f"{name} is an option of method {' or '.join(others)}, not of {of}; leave it out")
        given = checked(self.method or "a basis of adapters", known, self.options)
        if found := CONSTRUCTIONS.get(self.method or ""):
            found.checked({name: value for name, value in given.items() if name in found.options})
        return given


_CLUSTERING = [name for name in CONSTRUCTIONS["cluster"].options if name != "inner"]
