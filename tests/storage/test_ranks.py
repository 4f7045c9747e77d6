"""Several processes do what one does, to the byte; a killed one stops the rest, and the same command then goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commands.ranks import free_port, launch
from tvbases_hf.cli.options import parse_size
from tvbases_hf.errors import OutputError, ParameterError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.journal import Journal, read_entries
from tvbases_hf.storage.model import stream_model
from tvbases_hf.storage.output import transaction
from tvbases_hf.storage.parallel import each, rows
from tvbases_hf.storage.run import Alone, Run, shares, using
from tvbases_hf.storage.tensor_files import TensorFiles
from zoo.models import SHAPES, random_state, save_checkpoint, tune

YAML = """merge_method: ae_bases
base_model: {root}/base
models: [{{model: {root}/a}}, {{model: {root}/b}}, {{model: {root}/c}}]
parameters: {{num_bases: 2, lambda: 0.4}}
dtype: float32
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zoo.hf_models import make_family, make_llama

    root = tmp_path_factory.mktemp("ranks")
    family = make_family(root, make_llama(root / "base"), ("a", "b", "c"), seed=1)
    assert family.base == root / "base" and list(family.tasks.values()) == [root / name for name in "abc"]
    (root / "merge.yml").write_text(YAML.format(root=root), encoding="utf-8")
    return root


def arguments(job: str, root: Path, out: Path) -> list[str]:
    if job == "merge":
        return ["merge", str(root / "merge.yml"), str(out), "--quiet"]
    tasks = [part for name in "abc" for part in ("--task", f"{name}={root / name}")]
    return ["compress", "--base", str(root / "base"), *tasks, "-m", "2", "--out", str(out), "--quiet"]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in sorted(directory.iterdir())
        if not file.name.startswith("tvbases_merge")
    }


@pytest.fixture(scope="module", params=["compress", "merge"])
def job(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(job: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    (outcome,) = launch(arguments(job, root, out), 1)
    assert outcome.code == 0, outcome.said
    return contents(out)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    size: int, job: str, root: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    outcomes = launch(arguments(job, root, tmp_path / "out"), size)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
    assert contents(tmp_path / "out") == alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_stops_the_others_and_the_same_command_goes_on(
    rank: int, job: str, root: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    command = arguments(job, root, tmp_path / "out")
    outcomes = launch(command, 2, killed=(rank, 5))
    assert outcomes[rank].code < 0
    other = outcomes[1 - rank]
    assert other.code == 2 and "has lost another one, which failed or was killed" in other.said
    assert "Traceback" not in other.said
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    finished = sum(len(file.read_text().splitlines()) - 1 for file in left.glob("journal-*"))
    assert finished >= 4
    (again,) = launch(command, 1, killed=(0, 10**6))
    assert again.code == 0, again.said
    assert contents(tmp_path / "out") == alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_input_is_told_by_each_process_under_its_number(root: Path, tmp_path: Path) -> None:
    command = arguments("compress", root, tmp_path / "out")
    command[command.index("--base") + 1] = str(tmp_path / "nowhere")
    for rank, outcome in enumerate(launch(command, 2)):
        assert outcome.code == 2
        assert f"error: [process {rank} of 2]" in outcome.said and "no such file or directory" in outcome.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("job", ["compress"], indirect=True)
def test_accelerate_launches_them_on_one_machine_or_on_each_of_several(
    machines: int, job: str, root: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Every "machine" is a launcher of its own, as the machines of a cluster with a shared file system have them."""
    options, env = ["--cpu", "--num_processes", "2"], os.environ | {"OMP_NUM_THREADS": "1"}
    if machines > 1:
        options += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
        options += ["--main_process_port", str(free_port())]
    launchers = []
    for machine in range(machines):
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", *options]
        command += ["--machine_rank", str(machine)] if machines > 1 else []
        command += ["-m", "tvbases_hf", *arguments(job, root, tmp_path / "out")]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        launchers.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        for launcher in launchers:
            said, _ = launcher.communicate(timeout=120)
            assert launcher.returncode == 0, said
    finally:
        for launcher in launchers:
            launcher.kill()
    assert contents(tmp_path / "out") == alone


class Blind:
    """Two processes, the second of which has another file system."""

    rank, size, local_rank = 0, 2, 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def same(self, value: object) -> object:
        return value

    def gather(self, value: object) -> list[object]:
        return [value, False]


def test_a_process_that_sees_another_file_system_is_told(tmp_path: Path) -> None:
    told = pytest.raises(OutputError, match=r"process 1 of 2 does not see .* all of them share")
    with using(Run(Blind())), told, transaction(tmp_path / "out", lambda _: False):
        pass
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_consecutive_whole_and_balanced_to_one_item(sizes: list[int], count: int) -> None:
    items = list(enumerate(sizes))
    parts = shares(items, lambda item: item[1], count)
    assert [item for part in parts for item in part] == items
    assert len(parts) == count
    if sizes:
        loads = [sum(size for _, size in part) for part in parts]
        assert max(loads) <= sum(sizes) / count + max(sizes)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_order_and_sums_do_not_depend_on_the_threads(workers: int) -> None:
    items = list(range(50))
    with using(Run(workers=workers)):
        found = list(each(items, lambda item: item * item, "x", lambda _: 1))
        table = rows(items, lambda item: [1 / (item + 1), item], 2, "x", lambda _: 1)
    assert found == [(item, item * item) for item in items]
    assert torch.equal(table[:, 0], torch.tensor([1 / (item + 1) for item in items], dtype=torch.float64))


def test_work_waits_until_its_memory_is_free_and_what_never_fits_is_told_before() -> None:
    lock, used, most = threading.Lock(), 0, 0

    def work(item: int) -> None:
        nonlocal used, most
        with lock:
            used += item
            most = max(most, used)
        time.sleep(0.002)
        with lock:
            used -= item

    items = [30, 60, 40, 10, 90, 20, 5, 70] * 5
    with using(Run(workers=4, memory=100)):
        assert len(list(each(items, work, "x", lambda _: 1, lambda item: item))) == len(items)
    assert most <= 100
    with using(Run(workers=4)):
        list(each(items, work, "x", lambda _: 1, lambda item: item))
    assert most > 100
    begun: list[int] = []
    with using(Run(memory=80)), pytest.raises(ParameterError, match=r"90 takes about 90 B .* 80 B are allowed.*94\.5B"):
        list(each(items, begun.append, "x", lambda _: 1, lambda item: item))
    assert not begun


@pytest.mark.parametrize(
    ("text", "size"), [("1.5GB", 1_500_000_000), ("800 MB", 800_000_000), ("7", 7), ("2k", 2000), ("3KB", 3000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "1..5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="for example 800MB"):
        parse_size(text)


def test_a_failure_ends_the_rest(tmp_path: Path) -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ZeroDivisionError
        return item

    with using(Run(workers=2)), pytest.raises(ZeroDivisionError):
        for _ in each(range(10_000), work, "x", lambda _: 1):
            pass
    assert len(begun) < 10_000


def interrupted(out: Path, job: dict[str, int], done: int) -> None:
    """A run that is stopped by Ctrl-C after some of its tensors."""
    state = random_state(0)
    with pytest.raises(KeyboardInterrupt), transaction(out, lambda _: False, job=job) as work:
        files = TensorFiles(work, "model", infos(state))
        for name in list(state)[:done]:
            files.write(name, state[name])
            files.finish(name, [1.5, done])
        raise KeyboardInterrupt


def infos(state: dict[str, Tensor]) -> dict:
    from tvbases_hf.storage.checkpoint import TensorInfo

    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has left looks as if it had been killed."""
    monkeypatch.setattr("tvbases_hf.storage.output._is_alive", lambda pid: False)


def test_only_the_same_job_goes_on_and_only_with_what_is_intact(tmp_path: Path, dead: None) -> None:
    out, state = tmp_path / "out", random_state(0)
    names = list(state)
    interrupted(out, {"alpha": 1}, 3)
    (left,) = tmp_path.iterdir()
    damaged = left / "out" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    at = data.find(state[names[1]].numpy().tobytes())
    data[at] ^= 1
    damaged.write_bytes(data)
    with transaction(out, lambda _: False, job={"alpha": 1}) as work:
        files = TensorFiles(work, "model", infos(state))
        assert [files.finished(name) for name in names[:4]] == [(1.5, 3.0), None, (1.5, 3.0), None]
    assert len(SHAPES) > 4 and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [True, False])
def test_another_job_or_one_that_does_not_want_it_begins_anew(resume: bool, tmp_path: Path, dead: None) -> None:
    interrupted(tmp_path / "out", {"alpha": 1}, 3)
    job = {"alpha": 2 if resume else 1}
    with using(Run(resume=resume)), transaction(tmp_path / "out", lambda _: False, job=job) as work:
        files = TensorFiles(work, "model", infos(random_state(0)))
        assert all(files.finished(name) is None for name in SHAPES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_line_that_is_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "key", 0)
    journal.add("a", 1, [0.1])
    journal.add("b", 2, [0.2])
    file = tmp_path / "journal-0.jsonl"
    file.write_text(file.read_text()[:-9])
    assert read_entries(tmp_path, "key").keys() == {"a"}
    assert read_entries(tmp_path, "key")["a"].row == (0.1,)
    assert read_entries(tmp_path, "other") == {}


def test_a_fine_tune_that_changed_in_between_begins_anew(tmp_path: Path, dead: None) -> None:
    from tvbases_hf import Basis, Vectors

    base = random_state(0)
    save_checkpoint(tmp_path / "base", base)
    for seed in (1, 2):
        save_checkpoint(tmp_path / f"t{seed}", tune(base, seed))

    def build() -> Basis:
        vectors = Vectors.open(tmp_path / "base", {"x": tmp_path / "t1", "y": tmp_path / "t2"})
        return Basis.build(vectors, 1)

    finished: list[str] = []
    finish = TensorFiles.finish

    def stop(self: TensorFiles, name: str, *given: Any) -> None:
        finish(self, name, *given)
        finished.append(name)
        if len(finished) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, using(Run(workers=1)):
        patch.setattr(TensorFiles, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            build().save_pretrained(tmp_path / "basis")
    save_checkpoint(tmp_path / "t2", tune(base, 3))
    written: list[str] = []
    write = TensorFiles.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFiles, "write", lambda s, name, *rest: (written.append(name), write(s, name, *rest))[1])
        build().save_pretrained(tmp_path / "basis")
    assert set(written) == set(SHAPES)


class Second(Alone):
    """The second of two processes; what the first one did is done."""

    def same(self, value: object) -> object:
        return None, None


def test_only_the_first_process_writes_what_describes_a_model(tmp_path: Path) -> None:
    """Another one read a configuration while it was being written, and ended in a traceback."""
    state = random_state(0)
    base = Checkpoint.open(save_checkpoint(tmp_path / "base", state))
    out = tmp_path / "out"
    out.mkdir()
    for team, described in ((Alone(), True), (Second(rank=1, size=2), False)):
        (out / "config.json").unlink(missing_ok=True)
        with using(Run(team=team, workers=1, quiet=True)):
            stream_model(base, out, lambda _: None)
        assert (out / "config.json").is_file() is described
