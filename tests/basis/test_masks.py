"""EMR and TALL masks as compression: what is restored is the published formula, at one bit an entry and task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands.command_line import refused, tvbases
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import Basis
from tvbases_hf.basis.masks import packed, unpacked
from tvbases_hf.errors import CheckpointError, ParameterError
from zoo.models import Models, dense_task_matrix, random_models, read_directory

KINDS = ("emr", "tall")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return random_models(tmp_path_factory.mktemp("models"), dtype=torch.float32)


def published(matrix: Tensor, kind: str, needed: float) -> Tensor:
    """[d, T] the tasks as the papers restore them, from task vectors [d, T]."""
    total = matrix.sum(dim=1, keepdim=True)
    if kind == "tall":
        return total * (matrix.abs() >= needed * (total - matrix).abs())
    sign = total.sign()
    longest = torch.where(matrix.sign() == sign, matrix.abs(), 0.0).max(dim=1, keepdim=True).values
    unified = sign * longest
    masks = (matrix * unified > 0).double()
    scales = matrix.abs().sum(dim=0) / (masks * unified).abs().sum(dim=0)
    return scales * masks * unified


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_restored_as_published(kind: str, models: Models, tmp_path: Path) -> None:
    needed = 0.7
    options: dict[str, Any] = {"unified": kind} | ({"needed": needed} if kind == "tall" else {})
    vectors = models.vectors()
    built = Basis.build(vectors, method="masks", **options)
    built.save_pretrained(tmp_path / "basis")
    matrix = dense_task_matrix(models.base_state, models.states)
    wanted = published(matrix, kind, needed)
    for basis in (built, Basis.from_pretrained(tmp_path / "basis")):
        columns = [
            torch.cat([basis.reconstruct(t)[n].double().reshape(-1) for n in vectors.names]) for t in basis.tasks
        ]
        found = torch.stack(columns, dim=1)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(matrix.abs().max()))
        errors = (found - matrix).norm(dim=0) / matrix.norm(dim=0)
        assert torch.allclose(torch.tensor(basis.info.task_error, dtype=torch.float64), errors, atol=1e-5)
    again = Basis.from_pretrained(tmp_path / "basis")
    again.save_pretrained(tmp_path / "again")
    stored = {name: (tmp_path / "again" / name).read_bytes() for name in ("basis.safetensors", "basis_config.json")}
    assert all((tmp_path / "basis" / name).read_bytes() == text for name, text in stored.items())
    entries = sum(vectors.base.tensors[name].numel for name in vectors.names)
    size = sum(info.nbytes for info in again.tensors.values())
    assert (
        4 * entries + len(vectors) * entries / 8
        <= size
        <= 4 * entries + len(vectors) * (entries / 8 + len(vectors.names))
    )


def test_a_task_alone_is_restored_exactly_and_the_masks_decide_between_opposites(tmp_path: Path) -> None:
    models = random_models(tmp_path, dtype=torch.float32)
    task = next(iter(models.tasks))
    basis = Basis.build(models.vectors().selected([0]), method="masks")
    for name in basis.names:
        own = models.states[task][name].double() - models.base_state[name].double()
        assert torch.allclose(dense(basis.deltas(name)[0]), own.reshape(basis.deltas(name)[0].shape), atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_packing_loses_no_bit_and_fills_the_last_byte(count: int) -> None:
    masks = torch.rand(3, count, generator=torch.Generator().manual_seed(count)) < 0.5
    stored = packed(masks)
    assert stored.shape == (3, math.ceil(count / 8)) and stored.dtype == torch.uint8
    assert torch.equal(unpacked(stored, count), masks)
    first = packed(torch.tensor([[True] + [False] * 7 + [False, True]]))
    assert first.tolist() == [[128, 64]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_compresses_and_restores(kind: str, models: Models, tmp_path: Path) -> None:
    tasks = [part for name, path in models.tasks.items() for part in ("--task", f"{name}={path}")]
    out, given = tmp_path / "basis", ["--base", models.base, *tasks]
    done = tvbases("compress", *given, "--method", "masks", "--unified", kind, "--out", out, "--quiet")
    assert done.code == 0, done.err
    basis, task = Basis.from_pretrained(out), next(iter(models.tasks))
    basis.restore(task, models.base, tmp_path / "task")
    restored = read_directory(tmp_path / "task")
    for name in basis.names:
        change = restored[name].double() - models.base_state[name].double()
        assert torch.allclose(change, basis.reconstruct(task)[name].double().reshape(change.shape), atol=1e-6)
    assert "leave them out" in refused(tmp_path, "compress", *given, "--method", "masks", "-m", "2", "--out", out / "x")


def test_damaged_masks_are_refused(models: Models, tmp_path: Path) -> None:
    Basis.build(models.vectors(), method="masks").save_pretrained(tmp_path / "basis")
    config = tmp_path / "basis" / "basis_config.json"
    good = config.read_text()
    content = json.loads(good)
    content["options"]["scales"] = content["options"]["scales"][:-1]
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"options\.scales does not hold a number for each"):
        Basis.from_pretrained(tmp_path / "basis")
    content = json.loads(good)
    content["method"] = "tsv"
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not hold the"):
        Basis.from_pretrained(tmp_path / "basis")
    for options, message in (({"needed": 0.0}, "needed"), ({"unified": "max"}, "emr or tall"), ({"rank": 2}, "leave")):
        with pytest.raises(ParameterError, match=message):
            Basis.build(models.vectors(), method="masks", **options)  # type: ignore[arg-type]
