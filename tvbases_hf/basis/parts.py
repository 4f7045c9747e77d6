"""The parts of basis_config.json that only some bases have: what adapters need, and the state of an online basis.

With ``info.BasisInfo`` these are the format: a file is read into them by pydantic, strictly, and what a type cannot say
is checked by ``check``, which raises ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .adapters.codec import Spec

# As JSON has them: numbers are no words, truth values no numbers, and no key is without a meaning.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
DtypeName = Annotated[str, Field(pattern="^(float64|float32|float16|bfloat16)$")]
Size = Annotated[float, Field(ge=0)]
Matrix = list[list[float]]
OVERLAP = {"input", "output", "input_by_chance", "output_by_chance"}


@dataclass(frozen=True)
class AdapterInfo:
    """The part of basis_config.json that only bases of adapters have.

    Errors are |tau_hat - tau| / |tau| per task; ``candidates`` the root of their mean square, before rounding, for
    every method that was compared within the budget; ``truncation_error`` that of cutting every adapter for itself at
    the bytes of this basis.
    """

    __pydantic_config__ = STRICT

    alpha: float
    """The stock file loads as theta_0 + alpha * (sum of the vectors)."""
    dtype: DtypeName
    adapters_bytes: Annotated[int, Field(ge=0)]
    error_before_rounding: list[Size]
    truncation_error: list[Size]
    candidates: dict[str, Size]
    stock_error: Size
    """How far what PEFT loads is from alpha * (sum of the vectors), relative to that: 0 but for DoRA."""
    overlap: dict[str, float]
    """Mean share of two adapters' input and output directions that are common, and what chance gives."""
    modules: dict[str, Spec] = field(default_factory=dict)
    bias_modules: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    naming: dict[Annotated[str, Field(pattern="^(strip|add|memory)$")], str | dict[str, str]] = field(
        default_factory=dict
    )
    """How the adapters call the base's tensors; it and the three before as in lora_files.Template."""
    base_sample: dict[str, list[float]] = field(default_factory=dict)
    """The first numbers of a few weights of the base, to tell another model when the basis is attached."""

    def check(self, num_tasks: int, num_vectors: int | None) -> None:
        """``num_vectors``: None for a library, which says of every task what it is and no more."""
        if not self.alpha:
            raise ValueError("adapters.alpha is 0")
        if num_vectors is None:
            if any(spec.ranks or spec.shared or spec.pivots for spec in self.modules.values()):
                raise ValueError("adapters.modules of a library have ranks, which are in its files")
            return
        if set(self.overlap) != OVERLAP:
            raise ValueError(f"adapters.overlap does not hold {', '.join(sorted(OVERLAP))}, and these alone")
        if odd := [word for word, value in self.naming.items() if isinstance(value, dict) != (word == "memory")]:
            raise ValueError(f"adapters.naming.{odd[0]} is of another kind")
        for name in ("error_before_rounding", "truncation_error"):
            check_sizes(f"adapters.{name}", getattr(self, name), num_tasks)
        for name, spec in self.modules.items():
            spec.check(f"adapters.modules.{name}", num_vectors)


FileName = Annotated[str, Field(pattern=r"^basis-(cluster|task)-[0-9]{5,}\.safetensors$")]


@dataclass(frozen=True)
class Cluster:
    """Adapters with directions in common: the file that holds these, and its CRC-32."""

    __pydantic_config__ = STRICT

    file: FileName
    checksum: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Member:
    """A task of a library: its file and CRC-32, its cluster (-1: none), squared norm and rank of its adapter."""

    __pydantic_config__ = STRICT

    file: FileName
    checksum: Annotated[int, Field(ge=0)]
    cluster: Annotated[int, Field(ge=-1)]
    square_norm: Size
    rank: Annotated[int, Field(ge=0)]
    nbytes: Annotated[int, Field(ge=0)]
    """Bytes of the adapter that it was made of."""


@dataclass(frozen=True)
class LibraryInfo:
    """The part of basis_config.json that only a library of adapters has.

    The weights in its files are those of ``adapters.modules``, in that order, each a matrix of ``shape``.
    """

    __pydantic_config__ = STRICT

    clusters: list[Cluster]
    members: list[Member]
    price: Size
    """What a byte had to save, in relative squared error of one adapter: adapters that are added pay the same."""
    bits: Annotated[list[Annotated[int, Field(ge=4, le=16)]], Field(min_length=1)]
    """What rows may be kept in."""
    normalize: bool
    """Whether errors count relative to each adapter's own norm."""
    curve: list[list[float]]
    """[bytes, root mean square error] that were planned at other prices, the cheapest first."""

    def check(self, num_tasks: int) -> None:
        check_sizes("library.members", self.members, num_tasks)
        if any(member.cluster >= len(self.clusters) for member in self.members):
            raise ValueError("library.members name a cluster that there is not")
        files = [one.file for one in (*self.clusters, *self.members)]
        if len(set(files)) < len(files):
            raise ValueError("library names a file twice")
        if any(bits not in (4, 8, 16) for bits in self.bits):
            raise ValueError("library.bits are not of 4, 8 and 16")
        check_sizes("library.curve", self.curve, len(self.curve), 2)


@dataclass(frozen=True)
class OnlineState:
    """options.online of an online basis: how it goes on (see online.Settings), and the small matrices (see Buffer)."""

    __pydantic_config__ = STRICT

    method: str
    num_bases: Annotated[int, Field(ge=1)]
    dtype: DtypeName | None
    seed: int
    options: dict[str, Any]
    weights: list[float]
    gram: Matrix
    norms: list[Size]
    estimates: list[Size]

    def check(self, num_tasks: int, num_vectors: int) -> None:
        for name, count in (("norms", num_tasks), ("estimates", num_tasks), ("weights", num_vectors)):
            check_sizes(f"options.online.{name}", getattr(self, name), count)
        check_sizes("options.online.gram", self.gram, num_vectors, num_vectors)


def check_sizes(name: str, values: Sequence[Any], *sizes: int) -> None:
    """ValueError unless a list, or a list of lists, has these sizes."""
    if len(values) != sizes[0]:
        raise ValueError(f"{name} has {len(values)} entries, and {sizes[0]} are needed")
    for index, row in enumerate(values) if len(sizes) > 1 else ():
        check_sizes(f"{name}.{index}", row, *sizes[1:])


def check_ranks(ranks: Mapping[str, Sequence[int]], num_vectors: int) -> None:
    """ValueError unless every weight in factors has a rank for each vector."""
    for name, kept in ranks.items():
        check_sizes(f"ranks.{name}", kept, num_vectors)
