"""The plan of a job against what the job then does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands.command_line import misused, tvbases
from tvbases_hf import Basis, Vectors, gram_matrix
from tvbases_hf.cli.planning import PASSES, headers, plan
from tvbases_hf.cli.tables import readable_time
from tvbases_hf.defaults import Job
from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_hf.merging.merge import Merge
from tvbases_hf.merging.write import write
from tvbases_hf.storage.checkpoint import Checkpoint, TensorInfo
from zoo.models import SHAPES, random_state, save_checkpoint, tune

TASKS = ("a", "b", "c")


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def vectors(request: pytest.FixtureRequest, tmp_path: Path) -> Vectors:
    base = random_state(0, request.param)
    save_checkpoint(tmp_path / "base", base, shards=2)
    for seed, task in enumerate(TASKS):
        save_checkpoint(tmp_path / task, tune(base, seed + 1), shards=1)
    return Vectors.open(tmp_path / "base", {task: tmp_path / task for task in TASKS})


def stored_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bytes_of_a_merge_are_exact(dtype: torch.dtype | None, vectors: Vectors, tmp_path: Path) -> None:
    merge = Merge(vectors, lambda name, deltas: deltas[0], vectors.names, "task_arithmetic", "")
    write(merge, tmp_path / "out", dtype=dtype)
    assert plan(vectors.base.tensors, 3, "task_arithmetic", dtype=dtype).written == stored_bytes(tmp_path / "out")


@pytest.mark.parametrize("num_bases", [1, 2])
def test_the_bytes_of_a_basis_are_exact(num_bases: int, vectors: Vectors, tmp_path: Path) -> None:
    Basis.build(vectors, num_bases).save_pretrained(tmp_path / "out")
    assert plan(vectors.base.tensors, 3, "compress", num_bases=num_bases).written == stored_bytes(tmp_path / "out")


def test_a_gram_matrix_reads_every_weight_of_every_model_once(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, str], int] = {}
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        seen[self.label, name] = tensor.nbytes
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    gram_matrix(vectors)
    assert plan(vectors.base.tensors, 3, "gram").read == sum(seen.values())


@pytest.mark.parametrize("job", PASSES)
def test_processes_share_all_that_is_read_of_the_weights(job: Job, vectors: Vectors) -> None:
    whole = plan(vectors.base.tensors, 3, job)
    shared = plan(vectors.base.tensors, 3, job, processes=3)
    assert len(shared.ranks) == 3 and sum(shared.ranks) == whole.ranks[0]
    assert shared.read == whole.read and shared.written == whole.written


def test_time_is_the_traffic_over_the_bandwidth_and_work_grows_with_the_models() -> None:
    infos = {"w": TensorInfo((1000, 1000), torch.float32)}
    found = plan(infos, 2, "task_arithmetic", bandwidth=1e6)
    assert found.seconds == (found.read + found.written) / 1e6
    assert plan(infos, 2, "task_arithmetic").seconds is None
    assert plan(infos, 4, "gram").operations > plan(infos, 2, "gram").operations


def test_headers_of_a_directory_and_of_a_configuration(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", random_state(0))
    assert headers(str(tmp_path / "model")).keys() == random_state(0).keys()
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 60,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = headers(str(tmp_path / "config.json"))
    assert found["model.embed_tokens.weight"] == TensorInfo((60, 32), torch.bfloat16)
    assert "lm_head.weight" not in found  # tied


def test_the_command_prints_the_plan(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", random_state(0))
    command = ["plan", "--base", str(tmp_path / "model"), "--models", "3", "--job", "ties", "--bandwidth", "1MB"]
    done = tvbases(*command, "--processes", "2", "--json", str(tmp_path / "plan.json"))
    assert done.code == 0
    assert "ties of 3 models" in done.out and "read by each of 2 processes" in done.out and "at 1 MB/s" in done.out
    report = json.loads((tmp_path / "plan.json").read_text())
    floating = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert readable_time(report["seconds"]) in done.out, "of the disk, which the processes share"
    assert report["seconds"] == (report["read"] + report["written"]) / 1e6
    assert report["numbers"] == floating and report["models"] == 3
    assert report["read"] == 3 * 4 * 4 * floating + 8 * 20  # three passes, float32, and the base's integers


# Numbers as Meta publishes them: 3.21 B, 8.03 B and 405.85 B.
LLAMAS = {
    "3.2-3B": ((3072, 8192, 28, 24), True, 3_212_749_824),
    "3.1-8B": ((4096, 14336, 32, 32), False, 8_030_261_248),
    "3.1-405B": ((16384, 53248, 126, 128), False, 405_853_388_800),
}


@pytest.mark.parametrize(("name", "models"), [("3.2-3B", 5), ("3.1-8B", 8), ("3.1-8B", 72), ("3.1-405B", 8)])
def test_plans_of_large_models_from_their_configuration(name: str, models: int, tmp_path: Path) -> None:
    (hidden, intermediate, layers, heads), tied, numbers = LLAMAS[name]
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "head_dim": 128}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    config |= {"vocab_size": 128_256, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    infos = headers(str(tmp_path / "config.json"))
    found = plan(infos, models, "ae_bases", num_bases=2, processes=4)
    assert found.numbers == numbers
    assert found.read == 2 * (models + 1) * 2 * numbers and sum(found.ranks) == found.read
    assert 2 * numbers < found.written < 2 * numbers + 1_000_000, "the headers of the shards"
    assert found.memory < 1_500_000_000
    assert max(found.ranks) < 1.03 * min(found.ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-bases", "7"], "num_bases is 7 but there are only 3 tasks"),
        (["--bandwidth", "fast"], "--bandwidth: 'fast' is no size"),
    ],
)
def test_bad_requests_are_told(arguments: list[str], message: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", random_state(0))
    done = tvbases("plan", "--base", tmp_path / "model", "--models", 3, *arguments)
    assert done.code == 2 and message in done.err


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        headers(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no configuration of a causal language model"):
        headers(str(tmp_path / "config.json"))
    with pytest.raises(ParameterError, match="no plan for 'frob'; known: gram"):
        plan({}, 1, "frob")  # type: ignore[arg-type]
    assert "'frob'" in misused(tmp_path, "plan", "--base", tmp_path, "--models", 3, "--job", "frob")
    with pytest.raises(ParameterError, match="at least one model"):
        plan({}, 0, "gram")
