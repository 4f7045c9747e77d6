"""Online bases: a fixed number of vectors for any number of tasks, and what is known of every task in them."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf import Basis, Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.bases.buffer import METHODS
from tvbases_hf.basis.online import ONLINE, OnlineBasis
from tvbases_hf.errors import CheckpointError, MismatchError, OutputError, ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS as MERGING
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import Alone, Run, using
from zoo.adapter_families import LLAMA, random_adapter
from zoo.models import SHAPES, State, random_state, save_checkpoint, tune
from zoo.peft_models import make_base

EPS = torch.finfo(torch.float32).eps
FLOATING = list(SHAPES)
COUNT = 50


@pytest.fixture(scope="module")
def base_state() -> State:
    return random_state(0)


@pytest.fixture
def base(base_state: State) -> Checkpoint:
    return Checkpoint.from_state_dict(base_state)


def tuned(base_state: State, seed: int) -> Checkpoint:
    """Fine-tunes of different lengths, which have a direction in common."""
    state = tune(base_state, seed, 0.01 * (1 + seed % 3))
    shared = tune(base_state, 999)
    mixed = {n: t + (shared[n] - base_state[n]) if t.is_floating_point() else t for n, t in state.items()}
    return Checkpoint.from_state_dict(mixed)


def task_matrix(base_state: State, count: int) -> Tensor:
    """[d, T] float64."""
    return torch.stack([flat(base_state, tuned(base_state, seed)) for seed in range(count)], dim=1)


def flat(base_state: State, model: Checkpoint) -> Tensor:
    return torch.cat([(model.read(n).double() - base_state[n].double()).reshape(-1) for n in FLOATING])


def buffer_matrix(online: OnlineBasis) -> Tensor:
    """[d, K] float64 of the vectors as stored."""
    return torch.cat([torch.stack([dense(p).reshape(-1) for p in online.basis.deltas(n)], 1) for n in FLOATING])


def grown(
    directory: Path, base_state: State, count: int, num_bases: int | None, method: str = "ae", **options: Any
) -> OnlineBasis:
    options = {"dtype": torch.float32} | options
    online = OnlineBasis.create(directory, Checkpoint.from_state_dict(base_state), num_bases, method=method, **options)
    for seed in range(count):
        online.add(f"task{seed}", tuned(base_state, seed))
    return online


def merged_vector(online: OnlineBasis, method: str = "task_arithmetic", **options: Any) -> Tensor:
    change = online.merged(method, **options)
    return torch.cat([dense(change(name)).reshape(-1) for name in FLOATING])


@pytest.fixture(scope="module")
def fifty(base_state: State, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnlineBasis, list[dict[str, int]]]:
    """Fifty tasks through five vectors, and the sizes of the files after each."""
    directory = tmp_path_factory.mktemp("online") / "basis"
    online = OnlineBasis.create(directory, Checkpoint.from_state_dict(base_state), 5, dtype=torch.float32)
    sizes = []
    for seed in range(COUNT):
        online.add(f"task{seed}", tuned(base_state, seed))
        sizes.append({file.name: file.stat().st_size for file in directory.iterdir()})
    return online, sizes


# Fifty tasks in five vectors


def test_the_vectors_take_the_same_space_for_fifty_tasks_as_for_five(
    fifty: tuple[OnlineBasis, list[dict[str, int]]],
) -> None:
    _, sizes = fifty
    vectors = [size["basis.safetensors"] for size in sizes]
    assert len(set(vectors[4:])) == 1
    assert vectors[0] < vectors[3] < vectors[4]  # it grew while there was room
    assert {frozenset(size) for size in sizes} == {frozenset({"basis.safetensors", "basis_config.json", "README.md"})}
    growth = [after["basis_config.json"] - before["basis_config.json"] for before, after in pairwise(sizes)]
    assert max(growth[5:]) < 40 * (2 * 5 + 5)  # the numbers of one task: its encoder row, decoder column and errors


def test_the_tracked_weights_reproduce_the_buffer(fifty: tuple[OnlineBasis, Any], base_state: State) -> None:
    online, _ = fifty
    tasks = task_matrix(base_state, COUNT)
    expected = tasks @ online.basis.encoder
    tolerance = 2 * COUNT * EPS * float(tasks.abs().max())  # one rounding of convex combinations per addition
    assert torch.allclose(buffer_matrix(online), expected, rtol=0, atol=tolerance)
    without_memory = tasks @ online.basis.encoder.roll(1, 0)
    assert float((buffer_matrix(online) - without_memory).abs().max()) > 100 * tolerance
    assert torch.allclose(online.basis.encoder.sum(0), torch.ones(5).double())


def test_every_task_ever_added_weighs_the_same_in_the_merged_vector(
    fifty: tuple[OnlineBasis, Any], base_state: State
) -> None:
    online, _ = fifty
    shares = online.basis.encoder @ torch.tensor(online.weights).double()
    assert torch.allclose(shares, torch.ones(COUNT).double(), rtol=1e-9)
    tasks = task_matrix(base_state, COUNT)
    expected = tasks.sum(1)
    tolerance = 4 * COUNT * COUNT * EPS * float(tasks.abs().max())
    assert torch.allclose(merged_vector(online), expected, rtol=0, atol=tolerance)
    assert torch.allclose(merged_vector(online, alpha=0.3), 0.3 * expected, rtol=0, atol=tolerance)


def test_no_reconstruction_is_further_off_than_the_bound_says(
    fifty: tuple[OnlineBasis, Any], base_state: State
) -> None:
    online, _ = fifty
    tasks = task_matrix(base_state, COUNT)
    reconstructed = buffer_matrix(online) @ online.basis.decoder
    found = (tasks - reconstructed).norm(dim=0) / tasks.norm(dim=0)
    bounds = torch.tensor(online.basis.info.task_error)
    assert (found <= bounds + 1e-5).all()
    estimates = torch.tensor(online.estimated_errors).double()
    assert torch.allclose(found, estimates, rtol=0.2, atol=1e-5)  # their losses are nearly orthogonal
    assert float(bounds[-1]) < 1e-5 and float(found[0]) > 0.1  # the newest is kept as it is, the first is not
    back = online.basis.reconstruct("task7")
    assert torch.allclose(
        torch.cat([back[name].reshape(-1) for name in FLOATING]).double(), reconstructed[:, 7], atol=1e-6
    )


def test_a_basis_directory_is_what_other_parts_read(fifty: tuple[OnlineBasis, Any], base: Checkpoint) -> None:
    online, _ = fifty
    vectors = Basis.from_pretrained(online.directory).vectors(base)
    assert (len(vectors), len(vectors.tasks)) == (5, COUNT)
    assert torch.allclose(vectors.data_weights().sum(0), torch.ones(5).double())
    assert "upper bounds" in (online.directory / "README.md").read_text()


# While there is room, and the step after


@pytest.mark.parametrize("method", ["ae", "rand_select"])
def test_while_there_is_room_every_task_is_kept_as_it_is(method: str, base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 3, 4, method)
    tasks = task_matrix(base_state, 3)
    assert torch.equal(buffer_matrix(online), tasks.float().double())
    assert torch.equal(online.basis.encoder, torch.eye(3).double())
    assert max(online.basis.info.task_error) < 1e-6
    every = Vectors.of_models(online.base, {f"task{seed}": tuned(base_state, seed) for seed in range(3)})
    for merging in MERGING:
        change = merged(every, merging)
        expected = torch.cat([dense(change(name)).reshape(-1) for name in FLOATING])
        assert torch.allclose(merged_vector(online, merging), expected, rtol=0, atol=1e3 * EPS * 0.1), merging


def test_a_full_buffer_is_compressed_and_the_new_task_appended(base_state: State, tmp_path: Path) -> None:
    from tvbases_hf import ae_bases

    online = grown(tmp_path / "basis", base_state, 4, 3, balance=False, seed=3)
    tasks = task_matrix(base_state, 4)
    old = tasks[:, :3]
    encoder = ae_bases(old.T @ old, 2, balance=False, seed=3).encoder
    expected = torch.cat([old @ encoder, tasks[:, 3:]], dim=1)
    assert torch.allclose(buffer_matrix(online), expected, rtol=0, atol=100 * EPS * float(tasks.abs().max()))
    assert online.weights == [1.0, 1.0, 1.0]  # the paper's sum, in which the newest task weighs more than the others
    shares = online.basis.encoder.sum(1)
    assert float(shares[3]) == 1.0 and float(shares[:3].sum()) == pytest.approx(2.0)


def test_the_papers_recipe_is_available(base_state: State, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"solver": "adam", "balance": False, "temperature": 5.0, "anneal": 0.8, "steps": 50}
    online = grown(tmp_path / "basis", base_state, 5, 3, **recipe)
    tasks = task_matrix(base_state, 5)
    assert torch.allclose(buffer_matrix(online), tasks @ online.basis.encoder, rtol=0, atol=20 * EPS * 0.2)


def test_rand_select_keeps_that_many_of_the_tasks_and_always_the_newest(base_state: State, tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 1):
        online = grown(tmp_path / str(seed), base_state, 12, 4, "rand_select", seed=seed)
        encoder = online.basis.encoder
        kept = encoder.argmax(0).tolist()
        assert torch.equal(encoder, torch.eye(12).double()[:, kept]) and kept[-1] == 11 and len(set(kept)) == 4
        assert torch.equal(buffer_matrix(online), task_matrix(base_state, 12)[:, kept].float().double())
        chosen.append(kept)
    assert chosen[0] != chosen[1]


# Running merges


def test_a_running_sum_is_the_sum(base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 9, None, "ta")
    expected = task_matrix(base_state, 9).sum(1)
    assert torch.allclose(merged_vector(online), expected, rtol=0, atol=20 * EPS * float(expected.abs().max()))
    assert torch.equal(online.basis.encoder, torch.ones(9, 1).double()) and online.is_linear


def test_running_magmax_is_magmax_of_all(base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 9, None, "magmax")
    tasks = task_matrix(base_state, 9)
    expected = tasks.gather(1, tasks.abs().argmax(1, keepdim=True))[:, 0]
    assert torch.allclose(merged_vector(online), expected, rtol=EPS, atol=0)
    assert not online.is_linear


def test_continual_ties_is_the_published_recursion(base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 5, None, "ties", density=0.3, scaling=0.7)
    tasks = task_matrix(base_state, 5).float()
    state = (0.7 * tasks[:, 0].double()).float()
    for column in tasks.T[1:]:
        both = torch.stack([state, column]).double()
        keep = max(1, int(0.3 * both.shape[1]))
        limits = both.float().abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        trimmed = torch.where(both.float().abs() >= limits, both, 0 * both)
        elected = trimmed.sum(0).sign()
        state = (state.double() + 0.7 * (trimmed * (trimmed.sign() == elected)).sum(0)).float()
    assert torch.allclose(merged_vector(online), state.double(), rtol=0, atol=20 * EPS * float(state.abs().max()))


def test_opcm_is_the_published_recursion(base_state: State, tmp_path: Path) -> None:
    """Full singular bases, scaled at every step, as in the paper; here thin ones, and the scale kept apart."""
    online = grown(tmp_path / "basis", base_state, 5, None, "opcm")
    changes = [{n: tuned(base_state, s).read(n).double() - base_state[n].double() for n in FLOATING} for s in range(5)]
    norms = [torch.cat([t.reshape(-1) for t in change.values()]).norm() for change in changes]
    state, scale = changes[0], torch.tensor(1.0)
    for step, change in enumerate(changes[1:], 2):
        new = {}
        for name, tau in change.items():
            if tau.ndim == 2:
                left, values, right = torch.linalg.svd(state[name], full_matrices=True)
                split = int((values.cumsum(0) / values.sum() > 0.5).float().argmax())
                core = left.T @ tau @ right.T
                core.diagonal().fill_(0)
                core[:split, :split] = 0
                tau = left @ core @ right
            new[name] = scale * state[name] + tau
        length = torch.cat([t.reshape(-1) for t in new.values()]).norm()
        scale = length / torch.stack(norms[:step]).mean()
        state = {name: tensor / scale for name, tensor in new.items()}
    expected = torch.cat([state[name].reshape(-1) for name in FLOATING])
    found = merged_vector(online)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert float(found.norm()) == pytest.approx(float(torch.stack(norms).mean()), rel=1e-4)
    assert float((found - sum(task_matrix(base_state, 5).T) / float(scale)).norm()) > 1e-3 * float(found.norm())


# Persistence


@pytest.mark.parametrize("method", METHODS)
def test_opening_again_before_every_task_changes_nothing(method: str, base_state: State, tmp_path: Path) -> None:
    number = 3 if method in ("ae", "rand_select") else None
    at_once = grown(tmp_path / "once", base_state, 6, number, method)
    grown(tmp_path / "again", base_state, 1, number, method)
    for seed in range(1, 6):
        again = OnlineBasis.open(tmp_path / "again", Checkpoint.from_state_dict(base_state))
        assert again.tasks == tuple(f"task{i}" for i in range(seed))
        again.add(f"task{seed}", tuned(base_state, seed))
    files = [(tmp_path / name / "basis.safetensors").read_bytes() for name in ("once", "again")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "basis_config.json").read_text()) for name in ("once", "again")]
    for key in ("encoder", "decoder", "task_error"):
        assert torch.allclose(*(torch.tensor(config[key]) for config in configs), rtol=1e-9, atol=1e-12)
    assert at_once.tasks == again.tasks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_may_be_stored_short_and_the_errors_say_so(
    dtype: torch.dtype, base_state: State, tmp_path: Path
) -> None:
    online = grown(tmp_path / "basis", base_state, 8, 4, dtype=dtype)
    tasks = task_matrix(base_state, 8)
    tolerance = 8 * torch.finfo(dtype).eps * float(tasks.abs().max())
    assert torch.allclose(buffer_matrix(online), tasks @ online.basis.encoder, rtol=0, atol=tolerance)
    lost = (tasks - buffer_matrix(online) @ online.basis.decoder).norm(dim=0) / tasks.norm(dim=0)
    assert (lost <= torch.tensor(online.basis.info.task_error) + 1e-6).all()


def test_checkpoints_adapters_and_task_vectors_can_be_added(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base", LLAMA)
    adapter = random_adapter(tmp_path / "adapter", path, LLAMA, 0)
    online = OnlineBasis.create(tmp_path / "basis", path, 3, dtype=torch.float32)
    online.add("adapter", adapter)
    tensors = online.base.tensors
    name = next(n for n, info in tensors.items() if len(info.shape) == 2)
    online.add("vector", {name: torch.ones(tensors[name].shape)})
    online.add("checkpoint", path)
    changes = Vectors.open(path, {"adapter": adapter})
    for weight in changes.names:
        expected = dense(changes.deltas(weight)[0])
        assert torch.allclose(dense(online.basis.deltas(weight)[0]), expected, atol=8 * EPS)
    assert dense(online.basis.deltas(name)[1]).eq(1).all() and not dense(online.basis.deltas(name)[2]).any()
    assert OnlineBasis.open(tmp_path / "basis").tasks == ("adapter", "vector", "checkpoint")  # the base is remembered


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pca"}, "unknown online method 'pca'; choose one of ae, rand_select, ta"),
        ({"num_bases": 0}, "whole number; got 0"),
        ({"num_bases": 2.5}, "whole number; got 2.5"),
        ({"num_bases": None}, "whole number; got None"),
        ({"num_bases": 1}, "at least 2: one for the past"),
        ({"num_bases": 3, "method": "ta"}, "keeps one vector"),
        ({"target_weights": [1]}, "target_weights is no option of online ae"),
        ({"method": "ta", "num_bases": 1, "density": 0.1}, "density is no option of online ta; it has none"),
        ({"method": "ties", "num_bases": 1, "density": 2.0}, "above 0 and at most 1"),
        ({"method": "opcm", "num_bases": 1, "share": 1.0}, "below 1; got 1.0"),
        ({"dtype": torch.int8}, "vectors are stored in float32"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str, base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=message):
        given: dict[str, Any] = {"num_bases": 3} | arguments
        OnlineBasis.create(tmp_path / "basis", base, **given)
    assert not list(tmp_path.iterdir())
    assert set(ONLINE) == set(METHODS)


def test_a_bad_task_leaves_the_directory_as_it_was(base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 3, 2)
    before = {file.name: file.read_bytes() for file in online.directory.iterdir()}
    spoilt = tune(base_state, 5)
    spoilt["lm_head.weight"][3, 4] = float("nan")
    vector = {"lm_head.weight": torch.full((50, 16), float("inf"))}
    other = {name: tensor for name, tensor in random_state(1, shapes={"x.weight": (3, 3)}).items()}
    cases: list[tuple[str, Any, type[Exception], str]] = [
        ("task1", tuned(base_state, 1), ParameterError, 'named "task1" is there already'),
        ("", tuned(base_state, 1), ParameterError, "its own name"),
        ("nan", Checkpoint.from_state_dict(spoilt), CheckpointError, "lm_head.weight holds 1 NaN"),
        ("inf", vector, CheckpointError, "lm_head.weight of the task vector holds NaN or infinity"),
        ("shape", {"lm_head.weight": torch.ones(2, 2)}, MismatchError, r"1 of 1 changes .*first: lm_head.weight"),
        ("none", {}, MismatchError, "no change at all"),
        ("other", Checkpoint.from_state_dict(other), MismatchError, "another architecture"),
        ("gone", tmp_path / "gone", CheckpointError, "no such"),
    ]
    for name, model, error, message in cases:
        with pytest.raises(error, match=message):
            online.add(name, model)
        assert {file.name: file.read_bytes() for file in online.directory.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["basis"]
    online.add("good", tuned(base_state, 7))


def test_a_dtype_that_is_too_small_is_refused(base_state: State, tmp_path: Path) -> None:
    online = OnlineBasis.create(tmp_path / "basis", Checkpoint.from_state_dict(base_state), 2, dtype=torch.float16)
    with pytest.raises(ParameterError, match=r"lm_head.weight overflows torch.float16"):
        online.add("large", {"lm_head.weight": torch.full((50, 16), 1e6)})
    assert not list(tmp_path.iterdir())


def test_what_is_no_online_basis_of_this_base_is_refused(base_state: State, base: Checkpoint, tmp_path: Path) -> None:
    Basis.build(Vectors.of_models(base, {f"t{i}": tuned(base_state, i) for i in range(3)}), 2).save_pretrained(
        tmp_path / "offline"
    )
    with pytest.raises(CheckpointError, match="a basis, but not an online one"):
        OnlineBasis.open(tmp_path / "offline", base)
    with pytest.raises(OutputError, match="holds something"):
        OnlineBasis.create(tmp_path / "offline", base, 3)
    with pytest.raises(CheckpointError, match="not a basis directory"):
        OnlineBasis.open(save_checkpoint(tmp_path / "model", base_state), base)
    online = grown(tmp_path / "basis", base_state, 1, 3)
    with pytest.raises(MismatchError, match="not the model this basis was built on"):
        OnlineBasis.open(online.directory, Checkpoint.from_state_dict(random_state(5)))
    with pytest.raises(ParameterError, match="holds no task yet"):
        _ = OnlineBasis.create(tmp_path / "new", base, 3).basis
    config = json.loads((online.directory / "basis_config.json").read_text())
    del config["options"]["online"]["seed"]
    (online.directory / "basis_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"damaged: options\.online\.seed: field required"):
        OnlineBasis.open(online.directory, base)


def test_several_processes_at_once_are_refused(base_state: State, tmp_path: Path) -> None:
    online = grown(tmp_path / "basis", base_state, 1, 3)
    with using(Run(team=Alone(size=2))), pytest.raises(ParameterError, match="by one process"):
        online.add("more", tuned(base_state, 1))


def test_two_who_add_at_once_do_not_undo_each_other(base_state: State, base: Checkpoint, tmp_path: Path) -> None:
    grown(tmp_path / "basis", base_state, 2, 3)
    first, second = (OnlineBasis.open(tmp_path / "basis", base) for _ in range(2))
    first.add("a", tuned(base_state, 5))
    with pytest.raises(OutputError, match="another process has added 1 tasks"):
        second.add("b", tuned(base_state, 6))
    again = OnlineBasis.open(tmp_path / "basis", base)
    again.add("b", tuned(base_state, 6))
    assert again.tasks == ("task0", "task1", "a", "b")
    shutil.rmtree(tmp_path / "basis")
