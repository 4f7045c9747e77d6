"""``--device``: changes are moved there, all arithmetic happens there, and the result is that of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.command_line import refused, snapshot, tvbases
from tvbases_hf import Basis, Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.storage.run import Alone, Run, find_device, using
from zoo.adapter_zoo import Zoo, config_of, make_zoo, run_native
from zoo.fake_device import ELSEWHERE, fake_device
from zoo.hf_models import read_state

WEIGHTS = [0.7, -0.4, 1.1]
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {"normalize": False, "weight": 0.5}),
    "task_arithmetic": ("task_arithmetic", {"lambda_": 0.6}),
    "ties": ("ties", {"density": 0.4}),
    "dare_ties": ("dare_ties", {"density": 0.5, "rescale": True}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
    "tsv": ("tsv", {"lambda_": 0.8}),
    "tsv_compress": ("tsv_compress", {"rank": "gavish-donoho"}),
    "devec_unique": ("devec_unique", {"rank": 0.25, "threshold": 0.3, "shared_weight": 0.5}),
    "ae_bases": ("ae_bases", {"num_bases": 2}),
    "ae_bases-tsv": ("ae_bases", {"num_bases": 2, "over": "reconstructions", "merge": "tsv"}),
}
# What merges are made of, and the most numbers that one may make on the CPU: tables of tasks, but no weight matrix.
ARITHMETIC = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "mm", "abs", "sign", "_linalg_eigh", "_linalg_svd")
FEW = 500


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def on_fake_device(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command with ``--device cuda``, where that is the fake device; whatever it computes, it computes there."""
    monkeypatch.setattr("tvbases_hf.storage.run.find_device", lambda name: ELSEWHERE if name == "cuda" else 1 / 0)
    with using(Run(workers=1)), fake_device() as seen:  # the device is this thread's
        outcome = tvbases(*arguments, "--device", "cuda", "--quiet")
    assert outcome.code == 0, outcome.err
    large = {name: seen.here[name] for name in ARITHMETIC if seen.here[name] > FEW}
    assert not large, f"numbers made on the CPU: {large}"
    assert max(seen.there[name] for name in ARITHMETIC) >= 32 * 32


def weights_of(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in snapshot(directory).items() if name.endswith(".safetensors")}


def numbers(report: Any) -> list[float]:
    """All numbers of a report, in their order."""
    if isinstance(report, dict | list):
        return [n for part in (report.values() if isinstance(report, dict) else report) for n in numbers(part)]
    return [float(report)] if isinstance(report, int | float) else []


@pytest.mark.parametrize("adapters", [False, True], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("case", MERGES)
def test_a_merge_computes_on_the_device_what_the_cpu_computes(
    case: str, adapters: bool, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, parameters = MERGES[case]
    weights = None if method == "ae_bases" else WEIGHTS
    config = config_of(zoo, method, weights, models=zoo.adapters if adapters else zoo.full, **parameters)
    run_native(config, tmp_path / "cpu")
    on_fake_device(monkeypatch, "merge", tmp_path / "cpu.yml", tmp_path / "there")
    assert weights_of(tmp_path / "there") == weights_of(tmp_path / "cpu") != {}


BASES = [[], ["--method", "tsv"], ["--method", "cluster", "--inner", "tsv", "-m", "2"], ["--method", "pca"]]


@pytest.mark.parametrize("options", BASES, ids=" ".join)
def test_bases_are_computed_on_the_device(
    options: list[str], zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [part for name, path in zoo.full.items() for part in ("--task", f"{name}={path}")]
    command = ["compress", "--base", zoo.base, *tasks, *options, "--out"]
    assert tvbases(*command, tmp_path / "cpu", "--quiet").code == 0
    on_fake_device(monkeypatch, *command, tmp_path / "there")
    assert weights_of(tmp_path / "there") == weights_of(tmp_path / "cpu") != {}
    found, expected = (Basis.from_pretrained(tmp_path / place).info for place in ("there", "cpu"))
    assert numbers(found.to_json()) == pytest.approx(numbers(expected.to_json()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("command", ["inspect", "decompose"])
def test_layers_and_components_are_computed_on_the_device(
    command: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [part for name, path in zoo.full.items() for part in ("--task", f"{name}={path}")]
    more = ["--layers"] if command == "inspect" else ["--rank", "0.25", "--out", tmp_path / "parts"]
    given = [command, "--base", zoo.base, *tasks, *more, "--json"]
    assert tvbases(*given, tmp_path / "cpu.json", "--quiet").code == 0
    on_cpu = weights_of(tmp_path)
    on_fake_device(monkeypatch, *given, tmp_path / "there.json")
    found, expected = (json.loads((tmp_path / f"{place}.json").read_text()) for place in ("there", "cpu"))
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-12)
    assert weights_of(tmp_path) == on_cpu


@pytest.mark.parametrize("method", METHODS)
def test_methods_in_python_compute_where_the_vectors_are(method: str, zoo: Zoo) -> None:
    changes = {}
    with fake_device():
        for device in (torch.device("cpu"), ELSEWHERE):
            vectors = Vectors.open(zoo.base, zoo.full, device=device)
            change = merged(vectors, method)
            changes[device.type] = {name: dense(change(name)) for name in vectors.names}
            assert all(tensor.device == device for tensor in changes[device.type].values())
        found, expected = changes.values()
        assert all(torch.equal(found[name], expected[name].cpu()) for name in found)


def test_the_fake_device_is_as_strict_as_a_gpu() -> None:
    with fake_device() as seen:
        here = torch.ones(3, 3)
        there = here.to(ELSEWHERE)
        with pytest.raises(RuntimeError, match="and on the CPU"):
            _ = there + here
        with pytest.raises(RuntimeError, match="and on the CPU"):
            _ = torch.zeros(3, device=ELSEWHERE) @ here
        assert torch.equal((there + there).cpu(), here + here)
        assert seen.there["add"] == seen.here["add"] == 9


def test_without_a_gpu_nothing_is_written_and_the_message_says_what_to_do(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "done")
    tasks = [part for name, path in zoo.full.items() for part in ("--task", f"{name}={path}")]
    for command in (
        ["merge", tmp_path / "done.yml", tmp_path / "out"],
        ["compress", "--base", zoo.base, *tasks, "--out", tmp_path / "out"],
        ["inspect", "--base", zoo.base, *tasks],
    ):
        message = refused(tmp_path, *command, "--device", "cuda")
        assert "torch sees no CUDA device" in message and "leave --device out" in message
        assert "choose cpu, cuda" in refused(tmp_path, *command, "--device", "gpu")


def test_adapters_stay_on_the_cpu(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvbases_hf.storage.run.find_device", torch.device)
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "done")
    tasks = [part for name, path in zoo.adapters.items() for part in ("--task", f"{name}={path}")]
    for command in (
        ["merge", tmp_path / "done.yml", tmp_path / "out", "--adapter"],
        ["compress", "--base", zoo.base, *tasks, "--out", tmp_path / "out"],
    ):
        assert "factors of adapters are small" in refused(tmp_path, *command, "--device", "cuda")


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank, index in ((0, 0), (1, 1), (2, 0)):  # a third process shares the first GPU
        with using(Run(Alone(rank=local_rank + 4, size=8, local_rank=local_rank))):
            assert find_device("cuda") == torch.device("cuda", index)
            assert find_device("cuda:1") == torch.device("cuda", 1)
            assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ParameterError, match="there are 2 CUDA devices"):
        find_device("cuda:2")
    for name in ("cuda:x", "cpu:0", "meta", ""):
        with pytest.raises(ParameterError, match="choose cpu, cuda"):
            find_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", MERGES)
def test_a_gpu_gives_the_result_of_the_cpu(case: str, zoo: Zoo, tmp_path: Path) -> None:
    method, parameters = MERGES[case]
    config = config_of(zoo, method, None if method == "ae_bases" else WEIGHTS, models=zoo.full, **parameters)
    run_native(config, tmp_path / "cpu")
    run_native(config, tmp_path / "gpu", "--device", "cuda")
    found, expected = read_state(tmp_path / "gpu"), read_state(tmp_path / "cpu")
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm()
