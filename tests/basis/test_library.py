"""A library of adapters: what it keeps, what it costs, and that a task that comes or goes leaves the others alone."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from read_basis import changes as read_changes
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands.command_line import snapshot
from tvbases_hf import Basis, LoraBasis
from tvbases_hf.algebra.delta import LowRank, dense
from tvbases_hf.basis import libraries
from tvbases_hf.basis.compress import compress
from tvbases_hf.basis.library.bits import BITS, GROUP, dequantise, quantise, row_bytes
from tvbases_hf.basis.library.factors import open_factors
from tvbases_hf.basis.library.plan import least
from tvbases_hf.basis.library.sketch import cut, linkage, sketch
from tvbases_hf.basis.library.stock import cut_sum
from tvbases_hf.basis.library.vectors import LibraryVectors
from tvbases_hf.errors import CheckpointError, OutputError, ParameterError, TvbasesError
from zoo.adapter_families import Adapters, random_adapters
from zoo.planted_adapters import FAMILIES, LONERS, WIDTH, planted_adapters

WEIGHTS = "adapter_model.safetensors"
COUNT = 15
LEFT_OUT = 3  # of the planted ones, for later
# float32 numbers, summed: what two ways to the same sum differ by.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return planted_adapters(tmp_path_factory.mktemp("planted"), COUNT)


@pytest.fixture(scope="module")
def made(planted: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "library"
    compress(planted.base, first(planted), out, method="library", budget=0.2)
    return out


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "library"))


def first(planted: Adapters) -> dict[str, Path]:
    return dict(list(planted.tasks.items())[: COUNT - LEFT_OUT])


def exact(planted: Adapters, task: str) -> dict[str, Tensor]:
    """An adapter's changes, computed from its file: alpha / r = 2."""
    stored = load_file(planted.tasks[task] / "adapter_model.safetensors")
    prefixes = {name.rpartition(".lora_")[0] for name in stored}
    return {
        f"{prefix.removeprefix('base_model.model.')}.weight": 2
        * stored[f"{prefix}.lora_B.weight"].double()
        @ stored[f"{prefix}.lora_A.weight"].double()
        for prefix in prefixes
    }


def kept(basis: Basis, task: str) -> dict[str, Tensor]:
    return {name: dense(basis.terms(task, name)[0][1]) for name in basis.names}


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    lost = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (lost / sum(float(change.square().sum()) for change in wanted.values())) ** 0.5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_a_row_comes_back_within_half_a_step_and_takes_the_bytes_that_were_said(bits: int, size: int) -> None:
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    rows[2] = 0
    codes, scales = quantise(rows, bits)
    assert codes.shape[1] + 2 * scales.shape[1] == row_bytes(size, bits)
    back = dequantise(codes, scales, size, bits)
    # Of 4 bits the largest numbers of a group may be cut off, by a fifth of it.
    step = scales.float().repeat_interleave(GROUP, dim=1)[:, :size]
    near = (back - rows).abs() <= 0.5 * step * (1 + 1e-5)
    assert bool((near | (rows.abs() > 7 * step)).all() if bits == 4 else near.all())
    assert torch.equal(back[2], rows[2])


def test_sketches_estimate_how_much_of_their_directions_adapters_share(planted: Adapters) -> None:
    opened = open_factors(planted.base, planted.tasks)
    found, error = sketch(opened).similarity()
    sides: list[Tensor] = []
    for change in zip(*(exact(planted, task).values() for task in planted.tasks), strict=True):
        for side in (lambda d: d.T @ d, lambda d: d @ d.T):
            squares = torch.stack([side(delta).flatten() for delta in change])
            sides.append(squares / squares.norm(dim=1, keepdim=True))
    wanted = torch.stack([part @ part.T for part in sides]).mean(0)
    away = (found.double() - wanted).fill_diagonal_(0).abs()
    assert float(away.max()) < 6 * error and float(away.square().mean().sqrt()) < 2 * error


def test_average_linkage_joins_what_is_most_similar_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(12, 3, generator=generator)
    similarity = points @ points.T
    groups = [[index] for index in range(12)]
    wanted = []
    for _ in range(11):
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = max(pairs, key=lambda p: float(similarity[groups[p[0]]][:, groups[p[1]]].mean()))
        groups[b] = sorted(groups[b] + groups[a])
        del groups[a]
        wanted.append(sorted(groups))
    joins = linkage(similarity)
    assert [cut(joins, 12, 11 - step, 12) for step in range(11)] == wanted


def test_no_group_is_larger_than_it_may_be() -> None:
    joins = linkage(torch.ones(9, 9))
    assert max(map(len, cut(joins, 9, 1, 4))) <= 4


@pytest.mark.parametrize("families", [1, 3, 17, 40])
def test_the_number_of_groups_is_found_also_where_a_few_are_no_better_than_one(families: int) -> None:
    asked: list[int] = []

    def loss(number: int) -> float:  # flat up to a few groups, a valley at as many as there are families
        asked.append(number)
        return min(1.0, abs(math.log(number / families)))

    assert abs(math.log(least(loss, 1000) / families)) < 0.2
    assert max(asked) <= 16 * families


def test_planted_families_are_found_and_adapters_of_none_share_nothing(made: Path) -> None:
    info = LoraBasis.from_pretrained(made).info
    assert info.library is not None
    clusters = [member.cluster for member in info.library.members]
    alone = [index % LONERS == LONERS - 1 for index in range(len(clusters))]
    assert [cluster < 0 for cluster in clusters] == alone
    families = {(index % FAMILIES, cluster) for index, cluster in enumerate(clusters) if not alone[index]}
    assert len(families) == len({cluster for _, cluster in families}) == FAMILIES


@pytest.mark.parametrize(("rows", "columns", "factors"), [(40, 24, 200), (24, 40, 200), (30, 30, 8), (40, 24, 30)])
def test_a_sum_cut_to_a_rank_knows_what_it_lost(rows: int, columns: int, factors: int) -> None:
    """The squared norms to float32's rounding; the cut as good as the best one, to what subspace iteration leaves."""
    generator = torch.Generator().manual_seed(0)
    halves = [(torch.randn(rows, factors // 2, generator=generator), factors // 2) for _ in range(2)]
    parts = [LowRank(left, torch.randn(count, columns, generator=generator)) for left, count in halves]
    found, whole = cut_sum(parts, 6, torch.float32), sum((dense(part).double() for part in parts), torch.zeros(()))
    left_out = whole - dense(found.change).double()
    assert found.whole == pytest.approx(float(whole.square().sum()), rel=1e-5)
    assert found.lost == pytest.approx(float(left_out.square().sum()), rel=1e-5)
    best = float(torch.linalg.svdvals(whole)[6:].square().sum())
    assert found.lost <= best * 1.001 + 1e-6 * found.whole


def test_every_task_is_as_far_from_its_adapter_as_the_library_says(planted: Adapters, made: Path) -> None:
    basis = Basis.from_pretrained(made)
    for task, said in zip(basis.tasks, basis.info.task_error, strict=True):
        assert relative_error(kept(basis, task), exact(planted, task)) == pytest.approx(said, abs=2e-3)


@pytest.mark.parametrize("budget", [0.25, 0.9])
def test_the_budget_is_kept_and_more_bytes_lose_less(planted: Adapters, tmp_path: Path, budget: float) -> None:
    found = compress(planted.base, planted.tasks, tmp_path / "out", method="library", budget=budget)
    assert found["bytes"] <= budget * found["bytes_of_task_vectors"]
    library = Basis.from_pretrained(tmp_path / "out").info.library
    curve = library.curve if library else []
    assert len(curve) > 5
    assert all(b[0] >= a[0] and b[1] <= a[1] for a, b in itertools.pairwise(curve))
    least = {0.25: 0.3, 0.9: 0.03}[budget]
    assert found["mean_square_error"] < least**2


def test_a_library_loses_less_than_truncation_at_the_same_bytes(planted: Adapters, made: Path, tmp_path: Path) -> None:
    tasks = first(planted)
    found = compress(planted.base, tasks, tmp_path / "tsv", method="tsv", budget=0.2)
    truncated = sum(error**2 for error in found["task_error"]) / len(tasks)
    info = Basis.from_pretrained(made).info
    assert sum(error**2 for error in info.task_error) / len(tasks) < 0.1 * truncated


@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_only_the_bits_that_were_asked_for_are_used(planted: Adapters, tmp_path: Path, bits: str) -> None:
    compress(planted.base, first(planted), tmp_path / "out", method="library", budget=0.3, bits=bits, clusters=4)
    basis = LoraBasis.from_pretrained(tmp_path / "out")
    source = basis._source
    assert isinstance(source, LibraryVectors)
    used = torch.stack([source.task(place).counts.sum((0, 1)) for place in range(len(basis.tasks))]).sum(0)
    assert [width for width, count in zip(BITS, used.tolist(), strict=True) if count] == [int(bits)]


def test_an_adapter_that_comes_or_goes_leaves_the_others_files_as_they_are(planted: Adapters, library: Path) -> None:
    before, old = snapshot(library), LoraBasis.from_pretrained(library)
    numbers = {task: kept(old, task) for task in old.tasks}
    new = dict(list(planted.tasks.items())[COUNT - LEFT_OUT :])
    found = libraries.add(library, planted.base, new)
    after = snapshot(library)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"basis_config.json", "adapter_model.safetensors", "README.md"}
    assert len(after) == len(before) + LEFT_OUT and found["tasks"] == list(planted.tasks)
    now = LoraBasis.from_pretrained(library)
    for task, wanted in numbers.items():
        assert all(torch.equal(kept(now, task)[name], wanted[name]) for name in wanted)
    for task in new:
        said = now.info.task_error[now.info.index(task)]
        assert relative_error(kept(now, task), exact(planted, task)) == pytest.approx(said, abs=2e-3)
        assert said < 2.5 * max(old.info.task_error)
    libraries.remove(library, list(new))
    final = snapshot(library)
    assert {name for name in before if final.get(name) != before[name]} <= changed
    assert final.keys() == before.keys()


def test_an_adapter_of_a_family_is_kept_in_the_familys_directions(planted: Adapters, library: Path) -> None:
    found = libraries.add(library, planted.base, {"new": planted.tasks["t12"]})  # 12 is even
    clusters = dict(zip(found["tasks"], found["task_cluster"], strict=True))
    sizes = dict(zip(found["tasks"], found["task_bytes"], strict=True))
    assert clusters["new"] == clusters["t0"] >= 0
    foreign = libraries.add(library, planted.base, {"other": planted.tasks["t14"]})  # of no family
    assert dict(zip(foreign["tasks"], foreign["task_cluster"], strict=True))["other"] == -1
    assert sizes["new"] < 0.75 * foreign["task_bytes"][-1]


def test_one_adapter_takes_the_place_of_another(planted: Adapters, library: Path) -> None:
    with pytest.raises(ParameterError, match=r"1 of the tasks are in .* already .*first: t0.*--replace"):
        libraries.add(library, planted.base, {"t0": planted.tasks["t12"]})
    libraries.add(library, planted.base, {"t0": planted.tasks["t12"]}, replace=True)
    basis = LoraBasis.from_pretrained(library)
    assert sorted(basis.tasks) == sorted(first(planted))
    assert relative_error(kept(basis, "t0"), exact(planted, "t12")) < 0.2
    assert relative_error(kept(basis, "t0"), exact(planted, "t0")) > 0.9
    libraries.verify(library, planted.base, {"t0": planted.tasks["t12"]})


def test_the_merged_adapter_is_the_sum_of_the_tasks_up_to_what_was_cut_off(planted: Adapters, library: Path) -> None:
    for _ in range(2):
        basis = LoraBasis.from_pretrained(library)
        merged = open_factors(planted.base, {"all": library}).factors[0]
        total = {name: torch.stack([kept(basis, task)[name] for task in basis.tasks]).sum(0) for name in basis.names}
        found = {name: dense(change) for name in basis.names if (change := merged.change(name)) is not None}
        assert basis.info.adapters is not None
        assert relative_error(found, total) <= basis.info.adapters.stock_error * (1 + 0.05)
        libraries.add(library, planted.base, {f"new{len(basis.tasks)}": planted.tasks["t13"]})


def test_the_smallest_reader_restores_every_task_to_the_same_numbers(
    planted: Adapters, library: Path, tmp_path: Path
) -> None:
    libraries.add(library, planted.base, {"t14": planted.tasks["t14"]})
    directories = [library]
    for method in ("tsv", "joint", "ae"):
        how: dict[str, Any] = {"num_bases": 2} if method == "ae" else {"budget": 0.5}
        compress(planted.base, dict(list(planted.tasks.items())[:4]), tmp_path / method, method=method, **how)
        directories.append(tmp_path / method)
    for directory in directories:
        basis = Basis.from_pretrained(directory)
        for task in basis.tasks:
            found, ours = read_changes(directory, task), basis.reconstruct(task)
            largest = max(float(ours[name].abs().max()) for name in ours)
            assert set(found) == set(ours)
            for name in ours:
                assert float((torch.from_numpy(found[name]).double() - ours[name]).abs().max()) <= ROUNDING * largest


def test_a_flipped_bit_an_absent_file_and_another_adapter_are_named(planted: Adapters, library: Path) -> None:
    assert libraries.verify(library)["files"] == len(list(library.glob("basis-*.safetensors")))
    with pytest.raises(CheckpointError, match=r'"t1" in the library is .* from that adapter'):
        libraries.verify(library, planted.base, {"t1": planted.tasks["t2"]})
    file = library / "basis-task-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"basis-task-00003.safetensors is not the file that was written"):
        libraries.verify(library)
    file.write_bytes(data[:-40])
    with pytest.raises(CheckpointError, match=r"basis-task-00003.safetensors"):
        LoraBasis.from_pretrained(library).adapter("t3")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"1 of the .* files of the library are absent"):
        LoraBasis.from_pretrained(library)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["library"]["members"].pop(), "library.members has 11 entries, and 12 are needed"),
        (lambda c: c["library"]["members"][0].update(cluster=9), "a cluster that there is not"),
        (lambda c: c["library"]["members"][0].update(file="../x"), "library.members.0.file"),
        (lambda c: c["library"]["members"][0].update(file=c["library"]["members"][1]["file"]), "a file twice"),
        (lambda c: c.update(encoder=[[1.0]]), "are not empty"),
        (lambda c: c.pop("library"), "encoder and decoder are empty"),
        (lambda c: c.update(format_version=3), "newer than this library knows"),
    ],
)
def test_lists_that_do_not_fit_each_other_are_refused(library: Path, change: object, said: str) -> None:
    config = json.loads((library / "basis_config.json").read_text())
    change(config)  # type: ignore[operator]
    (library / "basis_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        Basis.from_pretrained(library)


def test_what_has_no_place_in_a_library_is_refused_in_one_line(
    planted: Adapters, library: Path, tmp_path: Path
) -> None:
    before = snapshot(library)
    other = planted_adapters(tmp_path / "other", 1)
    torch.manual_seed(0)
    stored = load_file(other.base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, other.base / "model.safetensors")
    cases = [
        (lambda: libraries.add(library, other.base, {"x": other.tasks["t0"]}), "not the base of"),
        (lambda: libraries.add(library, planted.base, {"x": planted.base}), "full checkpoint"),
        (lambda: libraries.add(library, planted.base, {"x": planted.tasks["t0"]}, budget=0.5), "leave the budget"),
        (lambda: libraries.verify(library, other.base, {"t0": other.tasks["t0"]}), "not the base of"),
        (lambda: libraries.remove(library, ["nobody"]), 'no task "nobody"'),
        (lambda: libraries.remove(library, list(first(planted))), "has at least one"),
        (lambda: libraries.listed(tmp_path / "absent"), "no such directory"),
        (lambda: LoraBasis.from_pretrained(library).source, r"goes onto a model in parts: basis.only\(\['t0'"),
        (lambda: Basis.build(planted.vectors(), method="library"), "never in memory as a whole"),
        (
            lambda: compress(planted.base, first(planted), tmp_path / "x", method="library", budget=0.001),
            "takes before",
        ),
        (lambda: compress(planted.base, first(planted), tmp_path / "x", method="library", device="cuda"), "device"),
        (lambda: compress(planted.base, first(planted), tmp_path / "x", method="library", num_bases=2), "keeps every"),
        (lambda: compress(planted.base, first(planted), tmp_path / "x", method="library", clusters=99), "more than"),
    ]
    for run, said in cases:
        with pytest.raises(TvbasesError, match=said) as raised:
            run()
        assert "\n" not in str(raised.value)
    assert snapshot(library) == before and not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite_or_too_large_are_named(planted: Adapters, library: Path, tmp_path: Path) -> None:
    before = snapshot(library)
    bad, huge = changed(planted, "t3", tmp_path / "bad"), changed(planted, "t3", tmp_path / "huge", 1e25)
    name, stored = sorted(load_file(bad / WEIGHTS))[3], load_file(bad / WEIGHTS)
    stored[name][0, 0] = torch.nan
    save_file(stored, bad / WEIGHTS)
    for path, said in ((bad, rf'"x": {name} holds 1 NaN or infinite'), (huge, '"x": its change of .* is larger than')):
        with pytest.raises(CheckpointError, match=said):
            compress(planted.base, {**first(planted), "x": path}, tmp_path / "out", method="library")
        with pytest.raises(CheckpointError, match=said):
            libraries.add(library, planted.base, {"x": path})
    assert snapshot(library) == before and not (tmp_path / "out").exists()


def changed(planted: Adapters, task: str, place: Path, scale: float = 1.0) -> Path:
    """A copy of an adapter, its factors times ``scale``."""
    shutil.copytree(planted.tasks[task], place)
    save_file({name: scale * tensor for name, tensor in load_file(place / WEIGHTS).items()}, place / WEIGHTS)
    return place


def test_adapters_that_are_nothing_or_there_already_are_told(planted: Adapters, library: Path, tmp_path: Path) -> None:
    copy, tiny = changed(planted, "t3", tmp_path / "copy"), changed(planted, "t3", tmp_path / "tiny", 1e-30)
    found = libraries.add(library, planted.base, {"copy": copy, "tiny": tiny, "new": planted.tasks["t12"]})
    assert found["warnings"] == [
        "1 of the adapters change nothing (first: tiny)",
        '"copy" seems to be the same adapter as "t3"; leave one of them out',
    ]


def test_a_task_takes_the_place_of_the_last_one_of_a_cluster(planted: Adapters, library: Path) -> None:
    """Clusters then have other numbers: the new task is kept in directions of one that stays."""
    found = libraries.listed(library)
    owner = dict(zip(found["tasks"], found["task_cluster"], strict=True))
    gone = [task for task in owner if owner[task] == 0]
    (other,) = {owner[task] for task in ("t0", "t1")} - {0}
    like = next(task for task in ("t12", "t13") if owner[f"t{int(task[1:]) % FAMILIES}"] == other)
    libraries.remove(library, gone[1:])
    new = {gone[0]: planted.tasks[like]}
    found = libraries.add(library, planted.base, new, replace=True)
    assert found["clusters"] == 1 and found["task_cluster"][-1] == 0
    assert libraries.verify(library, planted.base, new)["measured"][gone[0]] < 0.2


def test_a_file_that_is_not_of_a_library_is_left_where_it_is(planted: Adapters, library: Path) -> None:
    (library / "notes.txt").write_text("mine")
    before = snapshot(library)
    for run in (
        lambda: libraries.add(library, planted.base, {"x": planted.tasks["t12"]}),
        lambda: libraries.remove(library, ["t0"]),
    ):
        with pytest.raises(OutputError, match=r"holds 1 entries that are not of a library \(first: notes.txt\)"):
            run()
    with pytest.raises(OutputError, match="written again as a whole"):
        libraries.export(library, "t0", library / "t0")
    assert snapshot(library) == before


@pytest.mark.parametrize("damage", ["cut off", "flipped"])
def test_nothing_is_written_from_a_damaged_file(planted: Adapters, library: Path, tmp_path: Path, damage: str) -> None:
    file = library / "basis-task-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data[:-40] if damage == "cut off" else data)
    before = snapshot(library)
    runs = [lambda: libraries.export(library, "t3", tmp_path / "t3"), lambda: libraries.remove(library, ["t3"])]
    if damage == "cut off":  # a file that is not read is known by its length alone
        runs.append(lambda: libraries.add(library, planted.base, {"x": planted.tasks["t12"]}))
    for run in runs:
        with pytest.raises(CheckpointError, match=r"basis-task-00003\.safetensors is not"):
            run()
    assert snapshot(library) == before and not (tmp_path / "t3").exists()


def test_export_says_what_a_smaller_rank_leaves_out(library: Path, planted: Adapters, tmp_path: Path) -> None:
    assert libraries.export(library, "t0", tmp_path / "all")["cut"] < 0.01
    said = libraries.export(library, "t0", tmp_path / "t0", rank=2)["cut"]
    exported = open_factors(planted.base, {"t0": tmp_path / "t0"}).factors[0]
    found = {name: dense(change) for name in exported.modules if (change := exported.change(name)) is not None}
    assert relative_error(found, kept(LoraBasis.from_pretrained(library), "t0")) == pytest.approx(said, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), 1e300])
def test_a_scale_that_makes_no_adapter_is_refused(library: Path, tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ParameterError, match=r"^alpha .* give "):
        libraries.export(library, "t0", tmp_path / "t0", alpha=alpha)
    assert not (tmp_path / "t0").exists()


def test_many_adapters_become_a_library_without_being_asked(
    planted: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvbases_hf.basis import compress as module
    from tvbases_hf.basis import request

    monkeypatch.setattr(request, "MANY", 10)
    monkeypatch.setattr(module, "MANY", 10)
    found = compress(planted.base, first(planted), tmp_path / "out", budget=0.3, clusters=3)
    assert found["method"] == "library"


def test_stock_peft_loads_the_merge_and_some_tasks_can_be_switched(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapters = random_adapters(tmp_path / "adapters", tasks=("math", "code", "chat"))
    compress(adapters.base, adapters.tasks, tmp_path / "library", method="library", budget=0.9)
    ids = torch.arange(12).reshape(2, 6)

    def logits(directory: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(adapters.base)
        return PeftModel.from_pretrained(model, str(directory))(ids).logits.detach()

    assert torch.isfinite(logits(tmp_path / "library")).all()
    library = LoraBasis.from_pretrained(tmp_path / "library")
    few = library.only(["code", "math"])
    model = few.attach(AutoModelForCausalLM.from_pretrained(adapters.base), "code")
    library.adapter("code").save_pretrained(tmp_path / "code")
    library.adapter("math", rank=2).save_pretrained(tmp_path / "math")
    assert json.loads((tmp_path / "math" / "adapter_config.json").read_text())["r"] <= 2
    assert torch.allclose(model(ids).logits, logits(tmp_path / "code"), atol=1e-4)
    few.select(model, "math")
    changed = model(ids).logits
    assert not torch.allclose(changed, logits(tmp_path / "code"), atol=1e-3)
    few.save_pretrained(tmp_path / "few")
    assert LoraBasis.from_pretrained(tmp_path / "few").tasks == ("code", "math")


def test_a_library_is_saved_as_the_same_files(library: Path, tmp_path: Path) -> None:
    basis = LoraBasis.from_pretrained(library)
    basis.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(library)
    assert replace(basis.info) == LoraBasis.from_pretrained(tmp_path / "again").info


def test_near_copies_and_what_clusters_share_are_told(planted: Adapters, library: Path) -> None:
    libraries.add(library, planted.base, {"again": planted.tasks["t3"]})
    found = libraries.inspect(library)
    assert [pair["tasks"] for pair in found["near_copies"]] == [["t3", "again"]]
    assert all(shared["outputs"] + shared["inputs"] >= WIDTH for shared in found["shared_directions"])
    assert all(4 <= shared["bits"] <= 16 for shared in found["shared_directions"])
    assert sum(map(len, found["cluster_members"])) == sum(cluster >= 0 for cluster in found["task_cluster"])
