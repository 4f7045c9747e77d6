"""Singular task interference of whole spectra and of merged changes, overlaps, and the order of similar tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from commands.command_line import inputs, root, tvbases
from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.algebra.interference import interference, overlaps, own_interference
from tvbases_hf.algebra.svd import svd
from tvbases_hf.models.layers import examine_layers
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.theory.order import by_similarity
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]


def matrices(count: int, shape: tuple[int, int] = (20, 24), rank: int = 20, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, m: torch.randn(n, m, dtype=torch.float64, generator=generator)  # noqa: E731
    return [draw(shape[0], rank) @ draw(rank, shape[1]) for _ in range(count)]


def blocks(tasks: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    """The T x T blocks of equation 7's matrix, written with whole float64 SVDs."""
    parts = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    ranks = [int((1e-9 * part.S[0] < part.S).sum()) for part in parts]
    left = torch.cat([part.U[:, :rank] for part, rank in zip(parts, ranks, strict=True)], dim=1)
    right = torch.cat([part.Vh[:rank].T for part, rank in zip(parts, ranks, strict=True)], dim=1)
    values = torch.cat([part.S[:rank] for part, rank in zip(parts, ranks, strict=True)])
    identity = torch.eye(len(values), dtype=torch.float64)
    whole = (left.T @ left - identity) @ values.diag() @ (right.T @ right - identity)
    rows = [row.split(ranks, dim=1) for row in whole.split(ranks)]
    return {(i, j): block for i, row in enumerate(rows) for j, block in enumerate(row)}


@pytest.mark.parametrize("rank", [3, 20])
def test_interference_of_whole_spectra_is_equation_7(rank: int) -> None:
    tasks = matrices(3, rank=rank)
    wanted = sum(float(block.abs().sum()) for block in blocks(tasks).values())
    assert interference([svd(task) for task in tasks]) == pytest.approx(wanted, rel=1e-9)
    assert interference([svd(task, 2) for task in tasks]) < 0.9 * wanted, "the truncated one is another number"


@pytest.mark.parametrize("factored", [False, True])
def test_what_a_sum_does_in_each_tasks_directions_is_equation_7_on_the_diagonal(factored: bool) -> None:
    tasks = [task - task.mean() for task in matrices(3, rank=3)]
    merged: Delta = Dense(sum(tasks, torch.zeros(())))
    if factored:
        merged = LowRank(torch.cat(tasks, dim=1), torch.cat([torch.eye(24, dtype=torch.float64)] * 3))
    parts, diagonal = [svd(task) for task in tasks], blocks(tasks)
    # at the scale that least squares finds; at scale 1 the block itself
    seen = [diagonal[i, i] + part.S.diag() for i, part in enumerate(parts)]
    signs = [part.U.T @ dense(merged) @ part.V for part in parts]
    assert all(torch.allclose(a.abs(), b.abs(), atol=1e-8) for a, b in zip(seen, signs, strict=True))
    square = sum(float(block.square().sum()) for block in signs)
    scale = sum(float((block.diagonal() * part.S).sum()) for block, part in zip(signs, parts, strict=True)) / square
    wanted = sum(float((scale * b - p.S.diag()).abs().sum()) for b, p in zip(signs, parts, strict=True))
    assert own_interference(merged, parts) == pytest.approx(wanted, rel=1e-9)
    assert wanted > 1


def test_own_interference_ignores_the_scale_and_is_zero_where_every_task_is_intact() -> None:
    tasks = matrices(3, rank=3)
    parts = [svd(task) for task in tasks]
    merged = sum(tasks, torch.zeros(()))
    assert own_interference(Dense(0.3 * merged), parts) == pytest.approx(own_interference(Dense(merged), parts))
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(24, 6, dtype=torch.float64, generator=generator)).Q
    apart = [left[:, i : i + 3] @ right[:, i : i + 3].T for i in (0, 3)]
    assert own_interference(Dense(apart[0] + apart[1]), [svd(task) for task in apart]) < 1e-12
    assert own_interference(Dense(torch.zeros(20, 24)), [svd(task) for task in apart]) == pytest.approx(6)


def test_overlap_is_the_share_of_the_smaller_space() -> None:
    basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    found = overlaps([basis[:, :4], basis[:, 2:4], basis[:, 3:7], basis[:, :0]])
    wanted = [[1, 1, 0.25, 0], [1, 1, 0.5, 0], [0.25, 0.5, 1, 0], [0, 0, 0, 0]]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64))


def test_the_report_adds_up_by_block_and_a_merge_without_interference_shows() -> None:
    names = ("layers.0.weight", "layers.1.weight")
    base = {name: torch.zeros(20, 24) for name in names}
    states = [dict(zip(names, matrices(2, rank=3, seed=seed), strict=True)) for seed in range(3)]
    held = Checkpoint.from_state_dict(base, "base")
    tasks = {
        f"t{i}": Checkpoint.from_state_dict({n: t.float() for n, t in s.items()}, "t") for i, s in enumerate(states)
    }
    plain = {name: sum((state[name] for state in states), torch.zeros(())).float() for name in names}
    vectors = Vectors.of_models(held, tasks)
    merged = Vectors.of_models(held, {"merged": Checkpoint.from_state_dict(plain, "merged")})
    report = examine_layers(vectors, merged=merged)
    found = report.singular
    assert list(found.matrices) == list(names) and list(found.groups) == ["block 0", "block 1"]
    for name, group in zip(names, found.groups.values(), strict=True):
        wanted = sum(float(block.abs().sum()) for block in blocks([state[name] for state in states]).values())
        assert found.matrices[name]["whole"] == pytest.approx(wanted, rel=1e-5)
        assert group == found.matrices[name] and group["sum"] == pytest.approx(group["merged"], rel=1e-5)
    assert report.interference == {group: values["leading"] for group, values in found.groups.items()}
    spaces = [[svd(state[name], 3).U for state in states] for name in names]
    wanted_overlap = torch.stack([overlaps(space) for space in spaces]).mean(0)
    assert torch.allclose(torch.tensor(found.overlap["left"], dtype=torch.float64), wanted_overlap, atol=1e-5)
    assert found.chance == {"left": pytest.approx(3 / 20), "right": pytest.approx(3 / 24)}
    assert not examine_layers(vectors).singular.matrices[names[0]].keys() & {"sum", "merged"}


def test_similar_tasks_stand_side_by_side_whatever_their_order() -> None:
    alike = torch.full((6, 6), 0.1, dtype=torch.float64).fill_diagonal_(1)
    for group in ((0, 3, 5), (1, 4)):
        for i in group:
            for j in group:
                alike[i, j] = 1.0 if i == j else 0.8
    alike[2, 1] = alike[1, 2] = 0.3
    order = by_similarity(alike)
    assert sorted(order) == list(range(6))
    runs = ["".join("a" if task in (0, 3, 5) else "b" if task in (1, 4) else "c" for task in order)]
    assert runs[0] in ("aaacbb", "aaabbc", "bbcaaa", "cbbaaa", "aaacbb")
    assert by_similarity(torch.eye(1)) == [0] and by_similarity(torch.eye(0)) == []


def test_inspect_shows_a_merge_before_and_after(pair: Family) -> None:
    file = root(pair) / "interference.json"
    shown = tvbases("inspect", *inputs(pair), "--merged", pair.tasks["math"], "--json", file)
    assert shown.code == 0 and re.search(r"merged,\s.*own", shown.out, re.DOTALL)
    found = json.loads(file.read_text())
    wanted = examine_layers(
        Vectors.open(pair.base, pair.tasks), merged=Vectors.open(pair.base, {"merged": pair.tasks["math"]})
    )
    assert found["layers"]["singular"]["groups"] == wanted.singular.groups
    assert all(group["merged"] != pytest.approx(group["sum"], rel=1e-2) for group in wanted.singular.groups.values())
    assert sorted(found["order"]) == list(range(len(found["tasks"])))
    refused = tvbases("inspect", *inputs(pair), "--merged", root(pair) / "nowhere")
    assert refused.code == 2 and "nowhere" in refused.err
