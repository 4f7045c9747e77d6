"""A library written: weight after weight, every cluster's directions and every task's rows, then the lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...models.lora_files import write_adapter
from ...storage.cards import write_card
from ...storage.output import write_json
from ...storage.parallel import each
from ...version import library_version
from ..adapters.codec import Spec
from ..info import CONFIG_FILE, LIBRARY_VERSION, BasisInfo
from ..parts import AdapterInfo, Cluster, LibraryInfo, Member
from .bits import BITS
from .card import library_card
from .encode import Codes, encode_part
from .forms import ALONE
from .packed import Packer
from .plan import Plan
from .stock import Cut, cut_sum, stock_adapter

METHOD = "library"
# Weights that are encoded before the first of them has been written.
AHEAD = 48
SAMPLED_WEIGHTS, SAMPLED_NUMBERS = 4, 16


@dataclass(frozen=True)
class Encoded:
    """One weight, ready to be written: the codes by cluster, the squared errors [T], and the sum of all tasks as the
    stock adapter has it, None where no cluster keeps anything."""

    codes: dict[int, Codes]
    lost: Tensor
    cut: Cut | None


@dataclass
class Written:
    """What came out: squared errors [T], the stock adapter's change by weight, and the squared norms of the whole merge
    and of what was cut off."""

    lost: Tensor
    stock: dict[str, LowRank] = field(default_factory=dict)
    whole: float = 0.0
    cut: float = 0.0

    def take(self, name: str, encoded: Encoded) -> None:
        self.lost += encoded.lost
        if encoded.cut is not None:
            self.stock[name] = encoded.cut.change
            self.whole, self.cut = self.whole + encoded.cut.whole, self.cut + encoded.cut.lost


def create(plan: Plan, directory: Path, alpha: float, options: Mapping[str, object]) -> BasisInfo:
    """Write all files of a library into an existing directory."""
    opened = plan.opened
    shared = _used(plan)
    clusters = {place: Packer(directory / f"{place}.cluster") for place in shared}
    tasks = [Packer(directory / f"{place}.task") for place in range(len(opened.tasks))]
    done = Written(torch.zeros(len(opened.tasks), dtype=torch.float64))
    for name, encoded in _encoded(plan):
        _add(plan, encoded.codes, clusters, tasks)
        done.take(name, encoded)
    files = {place: cluster_file(number) for number, place in enumerate(shared)}
    listed = [Cluster(files[place], clusters[place].finish(directory / files[place])) for place in shared]
    owner = {member: shared.index(place) for place in shared for member in plan.clusters[place]}
    members = []
    for number, (one, packer) in enumerate(zip(opened.factors, tasks, strict=True)):
        file = task_file(number)
        norm = float(plan.sketches.square_norms[number])
        members.append(Member(file, packer.finish(directory / file), owner.get(number, -1), norm, one.rank, one.nbytes))
    library = LibraryInfo(listed, members, plan.price, list(plan.allowed), plan.normalize, plan.curve)
    info = _info(plan, done, library, alpha, options)
    tensors, config = stock_adapter(done.stock, opened.template, opened.base, alpha, opened.dtype)
    write_adapter(directory, tensors, config)
    describe(directory, info)
    return info


def describe(directory: Path, info: BasisInfo) -> None:
    """The lists and the card."""
    write_json(directory / CONFIG_FILE, info.to_json())
    write_card(directory, library_card(info))


def cluster_file(number: int) -> str:
    return f"basis-cluster-{number:05d}.safetensors"


def task_file(number: int) -> str:
    return f"basis-task-{number:05d}.safetensors"


def _used(plan: Plan) -> list[int]:
    """The clusters that share something in some weight."""
    return sorted({cluster for (cluster, _), (form, _) in plan.choices.items() if form.kind != ALONE})


def _encoded(plan: Plan) -> Iterator[tuple[str, Encoded]]:
    """Every weight, rounded in all clusters that have a choice there."""
    size = lambda name: len(plan.opened.tasks) * sum(plan.opened.shape(name)) * plan.opened.rank  # noqa: E731
    names = plan.opened.names
    for start in range(0, len(names), AHEAD):  # what waits to be written is in memory
        yield from each(names[start : start + AHEAD], lambda name: _encode(plan, name), "Encoding", size)


def _encode(plan: Plan, name: str) -> Encoded:
    """One weight. Of every cluster only the codes stay: the numbers of all tasks take many times what they take."""
    codes, sums = {}, []
    lost = torch.zeros(len(plan.opened.tasks), dtype=torch.float64)
    for cluster, members in enumerate(plan.clusters):
        part = plan.part(cluster, name)
        if (cluster, name) not in plan.choices:
            lost[members] = part.squares
            continue
        found = encode_part(part, *plan.choices[cluster, name], plan.allowed)
        codes[cluster], lost[members] = found.stored, found.lost
        sums.append(found.total(torch.ones(len(members))))
    return Encoded(codes, lost, cut_sum(sums, plan.stock_rank, plan.opened.dtype) if sums else None)


def _add(plan: Plan, codes: Mapping[int, Codes], clusters: Mapping[int, Packer], tasks: list[Packer]) -> None:
    """Append one weight to all files."""
    none = torch.zeros(2, len(BITS), dtype=torch.int64)
    for cluster, members in enumerate(plan.clusters):
        own = codes.get(cluster)
        if cluster in clusters:
            shared = (b"", b"", none) if own is None else (own.shared_codes, own.shared_scales, own.shared_counts)
            clusters[cluster].add(*shared)
        for place, member in enumerate(members):
            if own is None:
                tasks[member].add(b"", b"", none)
            else:
                counts = torch.stack([own.counts[place], torch.zeros_like(own.counts[place])])
                tasks[member].add(own.codes[place], own.scales[place], counts)


def _info(plan: Plan, done: Written, library: LibraryInfo, alpha: float, options: Mapping[str, object]) -> BasisInfo:
    opened, norms = plan.opened, plan.sketches.square_norms
    errors = (done.lost / torch.where(norms > 0, norms, torch.ones_like(norms))).clamp_min(0).sqrt()
    layouts = opened.template.layouts
    loss = float(plan.weights @ done.lost) / float(plan.weights @ norms)
    step = max(1, len(opened.names) // SAMPLED_WEIGHTS)
    sample = {n: opened.base.read(n).reshape(-1)[:SAMPLED_NUMBERS].tolist() for n in opened.names[::step]}
    naming = {"strip": opened.template.naming.strip, "add": opened.template.naming.add}
    memory = opened.template.naming.memory
    adapters = AdapterInfo(
        alpha=alpha,
        dtype=str(opened.dtype).removeprefix("torch."),
        adapters_bytes=opened.nbytes,
        error_before_rounding=[],
        truncation_error=[],
        candidates={},
        stock_error=(done.cut / done.whole) ** 0.5 if done.whole else 0.0,
        overlap={},
        modules={name: Spec.of(layouts[name], opened.shape(name), ()) for name in opened.names},
        naming={**naming, **({"memory": dict(memory)} if memory else {})},
        base_sample=sample,
    )
    return BasisInfo(
        method=METHOD,
        options=dict(options),
        tasks=opened.tasks,
        encoder=[],
        decoder=[],
        mean=None,
        loss=loss,
        bound=loss,
        spectral_bound=loss,
        task_error=errors.tolist(),
        gram=[],
        base_id=opened.base_id,
        base_fingerprint=opened.base.fingerprint(),
        base_norm=None,
        adapters=adapters,
        library=library,
        format_version=LIBRARY_VERSION,
        library_version=library_version(),
    )
