"""Opening checkpoints: every layout gives the same tensors, and whatever cannot be used is named with what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tvbases_hf.errors import CheckpointError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import locate
from zoo.models import CONFIG, SHAPES, random_checkpoint, random_state, save_checkpoint

LAYOUTS = [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)]


def assert_holds(opened: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert set(opened.tensors) == set(state)
    for name, tensor in state.items():
        info, read = opened.tensors[name], opened.read(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.nbytes)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


# --- what can be opened -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shards"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_gives_the_stored_tensors(tmp_path: Path, kind: str, shards: int, dtype: torch.dtype) -> None:
    state = random_state(0, dtype)
    opened = Checkpoint.open(save_checkpoint(tmp_path / "model", state, kind=kind, shards=shards))
    assert_holds(opened, state)
    assert opened.config == CONFIG
    assert opened.nbytes == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors", "weights.bin", "weights.pt"])
def test_a_single_weight_file_can_be_opened(tmp_path: Path, name: str) -> None:
    state = random_state(0)
    file = tmp_path / name
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    assert_holds(Checkpoint.open(file), state)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "unusual.safetensors"])
def test_a_directory_may_name_its_only_safetensors_file_otherwise(tmp_path: Path, name: str) -> None:
    state = random_state(0)
    save_file(state, tmp_path / name)
    assert_holds(Checkpoint.open(tmp_path), state)


def test_safetensors_are_preferred_to_pickles_beside_them(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_state(1), kind="bin")
    save_checkpoint(tmp_path, random_state(2))
    assert_holds(Checkpoint.open(tmp_path), random_state(2))


def test_pickles_from_before_the_zip_format_can_be_opened(tmp_path: Path) -> None:
    state = random_state(0)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_holds(Checkpoint.open(tmp_path), state)


def test_a_training_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": random_state(0), "epoch": 3}, tmp_path / "last.pt")
    assert_holds(Checkpoint.open(tmp_path / "last.pt"), random_state(0))


def test_a_state_in_memory_is_borrowed_and_not_copied() -> None:
    state = random_state(0)
    opened = Checkpoint.from_state_dict(state)
    assert_holds(opened, state)
    assert all(opened.read(name).data_ptr() == tensor.data_ptr() for name, tensor in state.items())


def test_tied_weights_in_a_pickle_are_one_tensor_under_their_first_name(tmp_path: Path) -> None:
    state = random_state(0)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    opened = Checkpoint.open(save_checkpoint(tmp_path, state, kind="bin"))
    assert set(opened.tensors) == set(state) - {"lm_head.weight"}


def test_tied_weights_in_a_shard_need_not_be_found_twice(tmp_path: Path) -> None:
    state = random_state(0, shapes={"shared.weight": (6, 4), "other.weight": (3, 3), "layer.weight": (4, 4)})
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # sorted into the same shard of two
    opened = Checkpoint.open(save_checkpoint(tmp_path, state, kind="bin", shards=2))
    assert set(opened.tensors) == set(state) - {"encoder.embed_tokens.weight"}


def test_a_matrix_and_its_transpose_in_one_storage_are_two_tensors(tmp_path: Path) -> None:
    matrix = torch.arange(9.0).reshape(3, 3)
    torch.save({"a": matrix, "b": matrix.T}, tmp_path / "pytorch_model.bin")
    assert_holds(Checkpoint.open(tmp_path), {"a": matrix, "b": matrix.T})


def test_an_output_matrix_that_the_configuration_ties_is_not_read(tmp_path: Path) -> None:
    state = random_state(0)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    tied = Checkpoint.open(save_checkpoint(tmp_path / "a", state, config={"tie_word_embeddings": True}))
    assert set(tied.tensors) == set(state) - {"lm_head.weight"}
    untied = Checkpoint.open(save_checkpoint(tmp_path / "b", state, config={"tie_word_embeddings": False}))
    assert set(untied.tensors) == set(state)
    lone = {name: tensor for name, tensor in state.items() if "embed" not in name}
    alone = Checkpoint.open(save_checkpoint(tmp_path / "c", lone, config={"tie_word_embeddings": True}))
    assert "lm_head.weight" in alone.tensors  # nothing to be tied to


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Loaders differ in which one they take."""
    state = random_state(0)
    save_checkpoint(tmp_path, state, shards=2)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(iter(weight_map))
    other = next(file for file in weight_map.values() if file != weight_map[name])
    stale = {n: state[n] for n in weight_map if weight_map[n] == other} | {name: torch.zeros_like(state[name])}
    save_file(stale, tmp_path / other)
    told = rf"1 tensors are in two shards \(first: {name}, in model-\S+ and model-\S+\), .* save the checkpoint"
    with pytest.raises(CheckpointError, match=told):
        Checkpoint.open(tmp_path)


def test_a_home_directory_may_be_spelt_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    random_checkpoint(tmp_path / "model", 0)
    assert locate("~/model") == tmp_path / "model"


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    state = random_state(0)
    found = {
        Checkpoint.open(save_checkpoint(tmp_path / f"{kind}{shards}", state, kind=kind, shards=shards)).fingerprint()
        for kind, shards in LAYOUTS
    }
    assert found == {Checkpoint.from_state_dict(state).fingerprint()}


@pytest.mark.parametrize("change", ["number", "dtype", "name", "shape"])
def test_fingerprint_tells_other_models_apart(change: str) -> None:
    state = random_state(0)
    other = dict(state)
    match change:
        case "number":
            other["model.layers.0.scale"] = other["model.layers.0.scale"] + 1
        case "dtype":
            other["model.norm.weight"] = other["model.norm.weight"].double()
        case "name":
            other["model.norm.bias"] = other.pop("model.norm.weight")
        case "shape":
            other["model.norm.weight"] = other["model.norm.weight"].reshape(4, 4)
    assert Checkpoint.from_state_dict(state).fingerprint() != Checkpoint.from_state_dict(other).fingerprint()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_fingerprint_takes_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        assert len(Checkpoint.from_state_dict({"w": torch.zeros(shape, dtype=dtype)}).fingerprint()) == 32


# --- what is refused --------------------------------------------------------------------------------------------------


class RunsCode:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.mark, "run")


def refusal(source: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(source)
    message = str(caught.value)
    assert f'"{source}"' in message, "the message names what was given"
    return message


@pytest.mark.parametrize(
    "source", ["no/such/directory", "/no/such/file.safetensors", "model with spaces", "../nowhere"]
)
def test_a_path_that_is_not_there_is_named(source: str) -> None:
    message = refusal(source)
    assert "no such file or directory" in message and "owner/name" in message


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "not a checkpoint" in message and "found: nothing" in message and "model.safetensors" in message


def test_a_directory_of_other_things_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("notes.txt", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert "found: notes.txt, tokenizer.json" in refusal(tmp_path)


def test_several_safetensors_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(random_state(0), tmp_path / name)
    assert "not a checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0, 1, 4, 8, 0.1, 0.5, 0.9, -1])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_truncated_safetensors_file_is_named(tmp_path: Path, share: float, shards: int) -> None:
    """Cut after so many bytes, after that share of them, or one byte before the end."""
    save_checkpoint(tmp_path, random_state(0), shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(int(share * size) if 0 < share < 1 else int(share) % size)
    message = refusal(tmp_path)
    assert file.name in message and "truncated or not a safetensors file" in message and "save it again" in message


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64]
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is truncated or not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0, 1, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_named(tmp_path: Path, share: float, zipped: bool) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(random_state(0), file, _use_new_zipfile_serialization=zipped)
    with open(file, "r+b") as stream:
        stream.truncate(int(share * file.stat().st_size) if share < 1 else 1)
    message = refusal(tmp_path)
    assert "pytorch_model.bin is damaged" in message and "safetensors" in message


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, writer: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    state = {"w": torch.ones(2), "x": RunsCode(mark)}
    torch.save(state, file) if writer == "torch" else file.write_bytes(pickle.dumps(state, protocol=2))
    message = refusal(tmp_path)
    assert "runs code, which is never loaded" in message and "save_pretrained" in message
    assert not mark.exists()
    if writer == "pickle":
        pickle.loads(file.read_bytes())
        assert mark.exists()  # it would have run


def test_a_pickle_without_tensors_holds_nothing(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    assert "holds no tensors" in refusal(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    assert "holds no tensors" in refusal(tmp_path)


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_state(0), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(tmp_path)
    assert "1 of 3 shards" in message and "first: model-00002-of-00003.safetensors" in message
    assert "download or copy" in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_names_absent_tensors_is_named(tmp_path: Path, kind: str) -> None:
    save_checkpoint(tmp_path, random_state(0), shards=3, kind=kind)
    (index,) = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    message = refusal(tmp_path)
    assert "1 of 11 tensors in the shard index are not in their shard (first: model.ghost.weight)" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff"])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, random_state(0), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "model.safetensors.index.json is not a shard index" in refusal(tmp_path)


def test_an_index_may_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", random_state(0), shards=2)
    index = tmp_path / "model" / "model.safetensors.index.json"
    shutil.move(tmp_path / "model" / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "../outside.safetensors"))
    assert "is not a shard index" in refusal(tmp_path / "model")


@pytest.mark.parametrize("absent", ["model-00001-of-00002.safetensors", None])
def test_shards_without_their_index_are_not_taken_for_all_of_them(absent: str | None, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_state(0), shards=2)
    for name in ("model.safetensors.index.json", absent):
        if name is not None:
            (tmp_path / name).unlink()
    assert f"{2 - bool(absent)} of its shards, and no index that tells whether these are all" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", "\udcff"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    random_checkpoint(tmp_path, 0)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refusal(tmp_path)
    assert "config.json" in message


def test_a_model_without_a_configuration_is_a_model(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, 0)
    (tmp_path / "config.json").unlink()
    assert Checkpoint.open(tmp_path).config == {}


def test_an_adapter_where_a_model_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    message = refusal(tmp_path)
    assert "a PEFT adapter where a full checkpoint is needed" in message and "give the base model" in message


def test_a_dtype_without_numbers_of_its_own_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    assert "tensor w has dtype" in refusal(tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_that_cannot_be_had_says_what_to_check(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand a second line")

    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("someone/certainly-not-there")
    assert "no such local directory" in message and "the Hub could not give it" in message
    assert "spelling" in message and "connection" in message and "hf auth login" in message
    assert "second line" not in message


def test_a_hub_id_is_opened_from_where_the_hub_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(random_checkpoint(tmp_path / "snapshot", 0))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = Checkpoint.open("owner/model", revision="v1")
    assert set(opened.tensors) == {*SHAPES, "model.position_ids"}
    assert (asked["repo_id"], asked["revision"]) == ("owner/model", "v1")
    assert opened.label == "owner/model"
