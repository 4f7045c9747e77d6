"""Adapters added to a library and taken out of it: the others' files stay the very same.

An adapter that comes is kept in the directions of the cluster that holds most of it, and what these miss of it beside
them, in its own file: no shared direction changes, so that no other task does. Every row pays the price per byte that
the others paid. The directory is written again as a whole, with links to the files that stay, and takes the old one's
place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...errors import OutputError, ParameterError, did_you_mean
from ...storage.output import check_output, preview, transaction
from ..info import OUR_FILES, BasisInfo, is_basis_directory
from ..parts import Member
from .check import check_base
from .create import describe, task_file
from .encode import Coded, encode_cores
from .factors import Factors, Opened, open_factors
from .forms import ALONE, BOTH, LEFT, RIGHT, Form, Part, counts_of
from .notes import few, notes
from .packed import Packer
from .report import library_report
from .stock import Stock, merged_with, square, stock_of, write_stock
from .vectors import LibraryVectors, carry

# Weights by which the clusters are compared.
COMPARED_WEIGHTS = 8
# A cluster is an adapter's own where its directions hold so many times what they hold of any.
ABOVE_CHANCE = 2.0


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
    _check_only_ours(path)
    if dry_run:
        return preview(path, None, None) | {"warnings": opened.warnings}
    source = LibraryVectors.open(path, info, str(directory))
    kept, stock = _without(info, source, known, stock_of(source))
    source = source.of(kept)

    def write(work: Path) -> BasisInfo:
        return _added(kept, source, opened, stock, work)

    found, info = _rewritten(path, source, kept, write)
    return found | {"added": list(tasks), "warnings": few([*opened.warnings, *notes(info, set(tasks))])}


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
    _check_only_ours(path)
    if dry_run:
        return preview(path, None, None)
    source = LibraryVectors.open(path, info, str(directory))
    kept, stock = _without(info, source, names, stock_of(source))
    source = source.of(kept)

    def write(work: Path) -> BasisInfo:
        write_stock(work, kept, source, stock)
        return kept

    found, _ = _rewritten(path, source, kept, write)
    return found | {"removed": list(dict.fromkeys(names)), "warnings": []}


def _rewritten(
    path: Path, source: LibraryVectors, kept: BasisInfo, write: Callable[[Path], BasisInfo]
) -> tuple[dict[str, Any], BasisInfo]:
    """The report of the new library, and its lists."""
    source.check_files()
    with transaction(path, is_basis_directory) as work:
        carry(source.path, work, source.files)
        info = write(work)
        describe(work, info)
    return library_report(info, path), info


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
        stock, kept = merged_with(kept, stock, {name: source.change(name, place) for name in source.names}, -1.0)
    return kept, stock


def _added(kept: BasisInfo, source: LibraryVectors, opened: Opened, stock: Stock, work: Path) -> BasisInfo:
    """Write the files of the new tasks, and the merged adapter with them."""
    for number, one in zip(_free_numbers(kept), opened.factors, strict=False):
        kept, changes = _add_one(kept, source, opened, one, work / task_file(number))
        stock, kept = merged_with(kept, stock, changes, 1.0)
    write_stock(work, kept, source, stock)
    return kept


def _add_one(
    kept: BasisInfo, source: LibraryVectors, opened: Opened, one: Factors, file: Path
) -> tuple[BasisInfo, Stock]:
    assert kept.library is not None and kept.adapters is not None
    library, allowed = kept.library, tuple(kept.library.bits)
    changes = {name: change for name in source.names if (change := one.change(name)) is not None}
    squares = {name: square(change) for name, change in changes.items()}
    for name, found in squares.items():
        if not math.isfinite(found):
            one.refuse(name)
    norm = sum(squares.values())
    weight = 1 / norm if library.normalize and norm else 1.0
    cluster = _best_cluster(source, changes)
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


def _best_cluster(source: LibraryVectors, changes: Mapping[str, LowRank]) -> int:
    """The cluster whose directions hold most of the changes of some weights; -1 where none holds more than chance."""
    step = max(1, len(source.names) // COMPARED_WEIGHTS)
    sample = [(place, name) for place, name in enumerate(source.names) if name in changes][::step]
    best, most = -1, 0.0
    for cluster in range(len(source.library.clusters)):
        held = by_chance = 0.0
        shared = source.open_cluster(cluster)
        for place, name in sample:
            left, right, inside, chance = shared.stack(place, 0), shared.stack(place, 1), changes[name], 1.0
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
                held, by_chance = held + square(inside), by_chance + chance * square(changes[name])
        if held > ABOVE_CHANCE * by_chance and held > most:
            best, most = cluster, held
    return best


def _check_same(info: BasisInfo, opened: Opened, label: str) -> None:
    """ParameterError for another base, and for weights that the library's adapters do not change."""
    assert info.adapters is not None
    check_base(info, opened, label)
    if others := [name for name in opened.names if name not in info.adapters.modules]:
        task = next(one.task for one in opened.factors if others[0] in one.modules)
        raise ParameterError(
            f'"{task}": {len(others)} weights that it changes have no place in "{label}" (first: {others[0]}), whose '
            "adapters leave them alone; compress all of them again"
        )


def _check_only_ours(path: Path) -> None:
    """OutputError for a directory that we may not write anew, with the file that is not ours where that is why."""
    odd = sorted(entry.name for entry in path.iterdir() if not any(entry.match(pattern) for pattern in OUR_FILES))
    if odd:
        raise OutputError(
            f'"{path}" holds {len(odd)} entries that are not of a library (first: {odd[0]}), which is written again '
            "as a whole; move them away"
        )
    check_output(path, is_basis_directory)


def _free_numbers(info: BasisInfo) -> Iterator[int]:
    """Numbers for the files of new tasks: higher than any there is, so that no name comes back as another task."""
    assert info.library is not None
    found = [int(match[1]) for member in info.library.members if (match := re.search(r"(\d+)\.", member.file))]
    number = max(found, default=-1) + 1
    while True:
        yield number
        number += 1
