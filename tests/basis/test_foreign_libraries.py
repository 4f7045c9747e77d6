"""Directories of other programs, as their published layouts say: every task comes out with the numbers it has there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands.command_line import tvbases
from tvbases_hf.basis import libraries
from tvbases_hf.errors import CheckpointError, TvbasesError

MODULES, TASKS, RANK = ("model.layers.0.q_proj", "model.layers.0.v_proj"), ("math", "code"), 2
OUT, IN, COUNT = 5, 6, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def vlora(root: Path, **words: object) -> dict[str, dict[str, Tensor]]:
    root.mkdir()
    shared, wanted = {}, {task: dict[str, Tensor]() for task in TASKS}
    sizes = {"a": (RANK, IN), "b": (OUT, RANK)}
    for module in MODULES:
        for side, (n, m) in sizes.items():
            shared |= {f"{module}.components_{side}": numbers(COUNT, n * m), f"{module}.mean_{side}": numbers(n * m)}
    for place, task in enumerate(TASKS):
        own = {f"{module}.loadings_{side}": numbers(COUNT) + place for module in MODULES for side in "ab"}
        save_file(own, root / f"task_{place}.safetensors")
        for module in MODULES:
            for side, shape in sizes.items():
                flat = own[f"{module}.loadings_{side}"] @ shared[f"{module}.components_{side}"]
                key = f"base_model.model.{module}.lora_{side.upper()}.weight"
                wanted[task][key] = (flat + shared[f"{module}.mean_{side}"]).reshape(shape)
    save_file(shared, root / "subspace.safetensors")
    shapes = {f"shapes_{side}": {module: list(shape) for module in MODULES} for side, shape in sizes.items()}
    meta = {"layer_names": MODULES, "task_ids": TASKS, "task_filenames": {task: str(i) for i, task in enumerate(TASKS)}}
    (root / "subspace_meta.json").write_text(json.dumps({**meta, "rank": RANK, **shapes, **words}))
    return wanted


def lorashare(root: Path) -> dict[str, dict[str, Tensor]]:
    shared = {f"{module}:{side}": numbers(n, COUNT) for module in MODULES for side, n in (("A", IN), ("B", OUT))}
    wanted = {}
    for place, task in enumerate(TASKS):
        (root / "adapters" / task).mkdir(parents=True)
        own = {name: numbers(COUNT, RANK) + place for name in shared}
        save_file(own, root / "adapters" / task / "loadings.safetensors")
        words = {"adapter_name": task, "original_config": {"peft_type": "LORA", "r": RANK, "lora_alpha": 7}}
        (root / "adapters" / task / "adapter_meta.json").write_text(json.dumps(words))
        wanted[task] = {
            f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight": (part @ own[name]).T
            if name[-1] == "A"
            else part @ own[name]
            for name, part in shared.items()
        }
    save_file(shared, root / "shared_components.safetensors")
    (root / "share_config.json").write_text(json.dumps({"adapter_names": TASKS}))
    return wanted


@pytest.mark.parametrize(("write", "alpha"), [(vlora, RANK), (lorashare, 7)], ids=["vlora-dev", "lorashare"])
def test_every_task_comes_out_as_a_lora_with_its_numbers(write: object, alpha: int, tmp_path: Path) -> None:
    wanted = write(tmp_path / "there")  # type: ignore[operator]
    done = tvbases("library", "import", tmp_path / "there", "--out", tmp_path / "loras")
    assert done.code == 0, done.err
    assert ("no alpha" in done.err) == (alpha == RANK)
    for task, tensors in wanted.items():
        found = load_file(tmp_path / "loras" / task / "adapter_model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in found)
        config = json.loads((tmp_path / "loras" / task / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["target_modules"]) == (RANK, alpha, sorted(MODULES))


def test_task_vector_bases_come_out_as_checkpoints(tmp_path: Path) -> None:
    root, base = tmp_path / "run", tmp_path / "base"
    for folder in (root, base):
        folder.mkdir()
    weights = {"w": numbers(4, 3), "b": numbers(4)}
    save_file(weights, base / "model.safetensors")
    vectors = [{name: numbers(*tensor.shape) * (m + 1) for name, tensor in weights.items()} for m in range(2)]
    decoder = numbers(2, 3)
    torch.save(
        {"basis_vectors": vectors, "num_basis": 2, "method": "AutoencoderBasisMethod"}, root / "basis_vectors.pt"
    )
    metadata = {"datasets": ["cars", "dtd", "mnist"], "M": 2, "softmax_w": False}
    torch.save({"A": decoder, "B": decoder, "W": decoder, "metadata": metadata}, root / "AWB.pt")
    with pytest.raises(TvbasesError, match="give its base"):
        libraries.convert(root, tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    save_file(weights | {"w": numbers(4, 2)}, other / "model.safetensors")
    with pytest.raises(TvbasesError, match=r"1 of 2 weights are not in .* with the shape"):
        libraries.convert(root, tmp_path / "out", other)
    libraries.convert(root, tmp_path / "out", base)
    for place, task in enumerate(metadata["datasets"]):  # type: ignore[arg-type]
        found = load_file(tmp_path / "out" / task / "model.safetensors")
        for name, tensor in weights.items():
            change = sum(decoder[m, place].double() * vectors[m][name].double() for m in range(2))
            assert torch.allclose(found[name].double(), tensor.double() + change, atol=1e-6)


def damaged_vlora(root: Path, **changes: Tensor | None) -> None:
    """With some tensors of the second task others, or gone."""
    vlora(root)
    stored = load_file(root / "task_1.safetensors") | changes
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, root / "task_1.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{MODULES[1]}.loadings_a": None}, {}),
        ({f"{MODULES[1]}.loadings_a": numbers(COUNT + 1)}, {}),
        ({f"{MODULES[1]}.loadings_a": torch.full((COUNT,), torch.nan)}, {}),
        ({}, {"task_ids": [1, 2]}),
        ({}, {"task_ids": []}),
        ({}, {"rank": "two", "shapes_a": {module: [1, RANK * IN] for module in MODULES}}),
        ({}, {"task_filenames": {"code": "../../x"}}),
    ],
)
def test_no_task_is_written_where_one_is_damaged(
    changes: dict[str, Tensor | None], words: dict[str, object], tmp_path: Path
) -> None:
    damaged_vlora(tmp_path / "there", **changes)
    meta = tmp_path / "there" / "subspace_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | words))
    done = tvbases("library", "import", tmp_path / "there", "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    vlora(tmp_path / "nf4", format="nf4_packed")
    lorashare(tmp_path / "damaged")
    (tmp_path / "damaged" / "share_config.json").write_text("{}")
    for name, said in (
        ("nothing", "has none of"),
        ("nf4", "SharedSubspace.save"),
        ("damaged", "not what share_config"),
    ):
        with pytest.raises(CheckpointError, match=said) as raised:
            libraries.convert(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
