"""Adapters added to a library and taken out of it: the others' files stay the very same.

An adapter that comes is kept in the directions of the cluster that holds most of it, and what these miss of it beside
them, in its own file: no shared direction changes, so that no other task does. Every row pays the price per byte that
the others paid. The directory is written again as a whole, with links to the files that stay, and takes the old one's
place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...errors import ParameterError, did_you_mean
from ...models.lora_files import write_adapter
from ...models.lora_template import Template
from ...storage.checkpoint import Checkpoint
from ...storage.output import check_output, preview, transaction
from ..adapters.task import template
from ..info import BasisInfo, is_basis_directory
from ..parts import AdapterInfo, Member
from .create import describe, task_file
from .encode import Coded, encode_cores
from .factors import Factors, Opened, open_factors
from .forms import ALONE, BOTH, LEFT, RIGHT, Form, Part, counts_of
from .packed import Packed, Packer
from .report import library_report
from .stock import cut_sum, stock_adapter
from .vectors import LibraryVectors, carry

# Weights by which the clusters are compared.
COMPARED_WEIGHTS = 8
# A cluster is an adapter's own where its directions hold so many times what they hold of any.
ABOVE_CHANCE = 2.0
Stock = dict[str, LowRank]


def add_to_library(
    directory: str | Path,
    info: BasisInfo,
    base: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    again: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Add adapters; ``again``: one of the same name takes the place of the old. All are opened before any is added.

    Raises ParameterError for a name that is there, and MismatchError for another base.
    """
    path = Path(directory)
    known = [task for task in tasks if task in info.tasks]
    if known and not again:
        raise ParameterError(
            f'{len(known)} of the tasks are in "{directory}" already (first: {known[0]}); give it another name, or let '
            "it take the old one's place (--replace)"
        )
    opened = open_factors(base, tasks)
    _check_same(info, opened, str(directory))
    check_output(path, is_basis_directory)
    if dry_run:
        return preview(path, None, None) | {"warnings": opened.warnings}
    source = LibraryVectors.open(path, info, str(directory))
    kept, stock = _without(info, source, known, _stock_of(source))

    def write(work: Path) -> BasisInfo:
        return _added(kept, source, opened, stock, work)

    return _rewritten(path, source, kept, write) | {"added": list(tasks), "warnings": opened.warnings}


def remove_from_library(
    directory: str | Path, info: BasisInfo, names: Sequence[str], *, dry_run: bool = False
) -> dict[str, Any]:
    """Take tasks out. A cluster without any task goes too. Raises ParameterError for a task that is not there."""
    path = Path(directory)
    for name in names:
        if name not in info.tasks:
            near = did_you_mean(name, info.tasks)
            raise ParameterError(f'no task "{name}" in "{directory}"{near}; it has {len(info.tasks)}, see library list')
    if not names or len(set(names)) >= len(info.tasks):
        raise ParameterError(
            f"{len(set(names))} of {len(info.tasks)} tasks are to go; a library has at least one: name fewer, or "
            "remove the directory itself"
        )
    check_output(path, is_basis_directory)
    if dry_run:
        return preview(path, None, None)
    source = LibraryVectors.open(path, info, str(directory))
    kept, stock = _without(info, source, names, _stock_of(source))

    def write(work: Path) -> BasisInfo:
        _write_stock(work, kept, source, stock)
        return kept

    return _rewritten(path, source, kept, write) | {"removed": list(dict.fromkeys(names)), "warnings": []}


def _rewritten(
    path: Path, source: LibraryVectors, kept: BasisInfo, write: Callable[[Path], BasisInfo]
) -> dict[str, Any]:
    assert kept.library is not None
    with transaction(path, is_basis_directory) as work:
        carry(source.path, work, [one.file for one in (*kept.library.clusters, *kept.library.members)])
        info = write(work)
        describe(work, info)
    return library_report(info, path)


def _without(info: BasisInfo, source: LibraryVectors, names: Sequence[str], stock: Stock) -> tuple[BasisInfo, Stock]:
    """What the lists, and the merged adapter, say when some tasks are gone."""
    assert info.library is not None and info.adapters is not None
    gone = {info.index(name) for name in names}
    if not gone:
        return info, stock
    stay = [place for place in range(len(info.tasks)) if place not in gone]
    members = [info.library.members[place] for place in stay]
    used = sorted({member.cluster for member in members if member.cluster >= 0})
    renamed = {old: new for new, old in enumerate(used)} | {-1: -1}
    library = replace(
        info.library,
        clusters=[info.library.clusters[place] for place in used],
        members=[replace(member, cluster=renamed[member.cluster]) for member in members],
    )
    kept = replace(
        info,
        tasks=tuple(info.tasks[place] for place in stay),
        task_error=[info.task_error[place] for place in stay],
        library=library,
        adapters=replace(info.adapters, adapters_bytes=sum(member.nbytes for member in members)),
    )
    for place in sorted(gone):
        stock, kept = _merged(kept, stock, {name: source.change(name, place) for name in source.names}, -1.0)
    return kept, stock


def _added(kept: BasisInfo, source: LibraryVectors, opened: Opened, stock: Stock, work: Path) -> BasisInfo:
    """Write the files of the new tasks, and the merged adapter with them."""
    for number, one in zip(_free_numbers(kept), opened.factors, strict=False):
        kept, changes = _add_one(kept, source, opened, one, work / task_file(number))
        stock, kept = _merged(kept, stock, changes, 1.0)
    _write_stock(work, kept, source, stock)
    return kept


def _add_one(
    kept: BasisInfo, source: LibraryVectors, opened: Opened, one: Factors, file: Path
) -> tuple[BasisInfo, Stock]:
    assert kept.library is not None and kept.adapters is not None
    library, allowed = kept.library, tuple(kept.library.bits)
    changes = {name: change for name in source.names if (change := one.change(name)) is not None}
    norm = sum(_square(change) for change in changes.values())
    weight = 1 / norm if library.normalize and norm else 1.0
    cluster = _best_cluster(source, kept, changes)
    packer, lost, made = Packer(file.with_suffix(".codes")), 0.0, {}
    for place, name in enumerate(source.names):
        change = changes.get(name, LowRank.zeros(source.shape(name)))
        directions = _directions(source, cluster, place)
        parts = _encoded(change, directions, weight, library.price, allowed)
        stored = [part.stored for part in parts]
        counts = torch.stack([one.counts[0] for one in stored])
        packer.add(b"".join(one.codes[0] for one in stored), b"".join(one.scales[0] for one in stored), counts)
        lost += float(parts[-1].lost[0])
        kept_parts = [part.made(0) for part in parts]
        made[name] = LowRank(
            torch.cat([part.left for part in kept_parts], dim=1), torch.cat([part.right for part in kept_parts])
        )
    member = Member(file.name, packer.finish(file), cluster, norm, one.rank, one.nbytes)
    info = replace(
        kept,
        tasks=(*kept.tasks, one.task),
        task_error=[*kept.task_error, (lost / norm) ** 0.5 if norm else 0.0],
        library=replace(library, members=[*library.members, member]),
        adapters=replace(kept.adapters, adapters_bytes=kept.adapters.adapters_bytes + one.nbytes),
    )
    return info, made


def _encoded(
    change: LowRank, directions: tuple[Tensor, Tensor], weight: float, price: float, allowed: Sequence[int]
) -> list[Coded]:
    """The core between the shared directions, then what these miss, by itself."""
    weights = torch.tensor([weight], dtype=torch.float64)
    left, right = directions
    form = _form(left, right)
    whole = Part(LowRank(change.left[None], change.right[None]), weights, (left.T, right.T))
    if form.kind == ALONE:
        nothing = torch.zeros(1, 3, dtype=torch.int64)
        core = encode_cores(whole, form, nothing, None, None)
        return [core, encode_cores(whole, form, counts_of(whole, form, price, allowed), None, None)]
    counts = counts_of(whole, form, price, allowed)
    core = encode_cores(whole, form, counts, left if len(left) else None, right if len(right) else None)
    made = core.made(0)
    rest = LowRank(torch.cat([change.left, -made.left], dim=1)[None], torch.cat([change.right, made.right])[None])
    beside = Part(rest, weights)
    return [core, encode_cores(beside, Form(ALONE), counts_of(beside, Form(ALONE), price, allowed), None, None)]


def _form(left: Tensor, right: Tensor) -> Form:
    kinds = {(False, False): ALONE, (False, True): RIGHT, (True, False): LEFT, (True, True): BOTH}
    return Form(kinds[bool(len(left)), bool(len(right))], len(left), len(right))


def _directions(source: LibraryVectors, cluster: int, place: int) -> tuple[Tensor, Tensor]:
    """[R, n] and [R', m] shared directions of a weight, with no rows where there are none."""
    rows, columns = list(source.specs.values())[place].shape
    if cluster < 0:
        return torch.empty(0, rows), torch.empty(0, columns)
    shared = source.cluster(cluster)
    return shared.stack(place, 0), shared.stack(place, 1)


def _best_cluster(source: LibraryVectors, kept: BasisInfo, changes: Mapping[str, LowRank]) -> int:
    """The cluster whose directions hold most of the changes of some weights; -1 where none holds more than chance."""
    assert kept.library is not None
    step = max(1, len(source.names) // COMPARED_WEIGHTS)
    sample = [(place, name) for place, name in enumerate(source.names) if name in changes][::step]
    best, most = -1, 0.0
    for cluster in range(len(kept.library.clusters)):
        held = by_chance = 0.0
        shared = Packed.open(source.path / kept.library.clusters[cluster].file, source.label, source.cluster_sizes)
        for place, name in sample:
            left, right, square = shared.stack(place, 0), shared.stack(place, 1), _square(changes[name])
            inside, chance = changes[name], 1.0
            for rows, side in ((left, 0), (right, 1)):
                if len(rows):
                    basis = torch.linalg.qr(rows.T).Q
                    chance *= len(rows) / rows.shape[1]
                    inside = (
                        LowRank(basis.T @ inside.left, inside.right)
                        if side == 0
                        else LowRank(inside.left, inside.right @ basis)
                    )
            if len(left) or len(right):
                held, by_chance = held + _square(inside), by_chance + chance * square
        if held > ABOVE_CHANCE * by_chance and held > most:
            best, most = cluster, held
    return best


def _check_same(info: BasisInfo, opened: Opened, label: str) -> None:
    """ParameterError for another base, and for weights that the library's adapters do not change."""
    assert info.adapters is not None
    if opened.base.fingerprint() != info.base_fingerprint:
        raise ParameterError(
            f'"{opened.base.label}" is not the base of "{label}" ({info.base_id}): its fingerprint differs; give the '
            "same base, in the same dtype"
        )
    if others := [name for name in opened.names if name not in info.adapters.modules]:
        task = next(one.task for one in opened.factors if others[0] in one.modules)
        raise ParameterError(
            f'"{task}": {len(others)} weights that it changes have no place in "{label}" (first: {others[0]}), whose '
            "adapters leave them alone; compress all of them again"
        )


def _free_numbers(info: BasisInfo) -> Iterator[int]:
    """Numbers for the files of new tasks: higher than any there is, so that no name comes back as another task."""
    assert info.library is not None
    found = [int(match[1]) for member in info.library.members if (match := re.search(r"(\d+)\.", member.file))]
    number = max(found, default=-1) + 1
    while True:
        yield number
        number += 1


def _square(change: LowRank) -> float:
    inner, outer = change.left.T @ change.left, change.right @ change.right.T
    return float((inner.double() * outer.double()).sum().clamp_min(0))


def _stock_of(source: LibraryVectors) -> Stock:
    """The merged adapter's changes, without its alpha."""
    from ..adapters.codec import stock_factors

    tensors, found = source.read_stock(), {}
    for name, spec in source.specs.items():
        if any(stored.startswith(f"{spec.prefix}.lora_") for stored in tensors):
            wide = replace(spec, ranks=[min(spec.shape)])
            left, right = stock_factors(tensors.__getitem__, wide)
            found[name] = LowRank(left.to(torch.float32), right.to(torch.float32))
    return found


def _merged(info: BasisInfo, stock: Stock, changes: Stock, sign: float) -> tuple[Stock, BasisInfo]:
    """The merged adapter with a task more or less, cut to the rank that it has; what it misses adds up."""
    assert info.adapters is not None
    dtype = getattr(torch, info.adapters.dtype)
    found, lost = dict(stock), 0.0
    rank = max((part.left.shape[1] for part in stock.values()), default=1)
    for name, change in changes.items():
        if change.rank:
            parts = [LowRank(sign * change.left, change.right), *([stock[name]] if name in stock else [])]
            cut = cut_sum(parts, rank, dtype)
            found[name] = LowRank(cut.change.left.float(), cut.change.right.float())
            lost += cut.lost
    # What was cut off is orthogonal to what is kept, or nearly: of the whole it is the sine of an angle.
    sine = min(info.adapters.stock_error, 1 - 1e-9)
    before = sine / (1 - sine**2) ** 0.5 * sum(_square(part) for part in stock.values()) ** 0.5
    missed, now = before + lost**0.5, sum(_square(part) for part in found.values())
    error = missed / (now + missed**2) ** 0.5 if now + missed else 0.0
    return found, replace(info, adapters=replace(info.adapters, stock_error=error))


def _write_stock(work: Path, info: BasisInfo, source: LibraryVectors, stock: Stock) -> None:
    adapters: AdapterInfo | None = info.adapters
    assert adapters is not None
    shape: Template = template(adapters, source)
    dtype = getattr(torch, adapters.dtype)
    empty = Checkpoint.from_state_dict({})
    tensors, config = stock_adapter(stock, shape, empty, adapters.alpha, dtype)
    write_adapter(work, tensors, config)
