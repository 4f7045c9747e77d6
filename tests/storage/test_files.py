"""Which files are read of a folder that holds more than one model, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.vectors import open_model
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.files import locate
from zoo.models import State, random_state, save_checkpoint


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path)
    return str(error.value)


def holds(path: Path, state: State) -> bool:
    opened = Checkpoint.open(path)
    return opened.tensors.keys() == state.keys() and all(torch.equal(opened.read(n), state[n]) for n in state)


def test_of_two_savings_the_one_that_the_loader_takes_is_read(tmp_path: Path) -> None:
    """transformers takes model.safetensors before an index, and any safetensors before PyTorch files."""
    older, newer = random_state(0), random_state(1)
    save_checkpoint(tmp_path, older, shards=2)
    save_checkpoint(tmp_path, newer)
    assert holds(tmp_path, newer)
    (tmp_path / "model.safetensors").unlink()
    save_checkpoint(tmp_path, newer, kind="bin")
    assert holds(tmp_path, older)


def test_diffusers_takes_the_shards_first(tmp_path: Path) -> None:
    older, newer = random_state(0), random_state(1)
    save_checkpoint(tmp_path, newer, shards=2)
    for file in tmp_path.glob("model*"):
        text = file.read_bytes()
        file.rename(tmp_path / f"diffusion_pytorch_{file.name}")
        if file.suffix == ".json":
            (tmp_path / f"diffusion_pytorch_{file.name}").write_bytes(
                text.replace(b'"model-0000', b'"diffusion_pytorch_model-0000')
            )
    save_file(older, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert holds(tmp_path, newer)


def test_an_index_can_be_named_itself(tmp_path: Path) -> None:
    state = random_state(0)
    save_checkpoint(tmp_path, state, shards=2)
    assert holds(tmp_path / "model.safetensors.index.json", state)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_and_an_adapter_in_one_folder_are_refused(shards: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_state(0), shards=shards)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "holds a model (model.safetensors" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match=r"and an adapter \(adapter_model.safetensors\), .* folder of their own"):
        open_model(tmp_path, Checkpoint.from_state_dict(random_state(0)))
    if shards == 1:
        assert holds(tmp_path / "model.safetensors", random_state(0))


WRAPPED = {
    "compiled": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "a part compiled": lambda s: {n.replace("layers.0.", "layers.0._orig_mod."): t for n, t in s.items()},
    "parallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "parallel, compiled": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "in a dictionary": lambda s: {"model": s, "optimizer": {"step": torch.ones(1)}, "epoch": 3},
    "in another": lambda s: {"model_state_dict": {f"module.{n}": t for n, t in s.items()}, "loss": 0.5},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_training_wraps_around_a_model_is_taken_off(wrapping: str, tmp_path: Path) -> None:
    state = random_state(0)
    wrapped = WRAPPED[wrapping](state)
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    assert holds(tmp_path, state)
    if "dictionary" not in wrapping and "another" not in wrapping:
        assert holds(save_checkpoint(tmp_path / "shards", wrapped, shards=2), state)


def test_a_model_with_a_module_of_that_name_keeps_it(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert holds(tmp_path, state)


def test_a_run_says_which_of_its_folders_holds_what(tmp_path: Path) -> None:
    for step in (500, 1000):
        save_checkpoint(tmp_path / f"checkpoint-{step}", random_state(step))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    message = refusal(tmp_path)
    assert "in 3 of its folders: adapter (an adapter), checkpoint-500 (a model), checkpoint-1000 (a model)" in message
    assert "give one of them" in message


def test_shards_of_fsdp_are_named_with_the_command_that_merges_them(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = random_state(0)
    dcp.save({"model": state}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "shards of FSDP (__0_0.distcp)" in message
    command = message.partition("make one model of them: python ")[2]
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    assert holds(tmp_path, state)


def test_shards_of_deepspeed_are_named_with_its_script(tmp_path: Path) -> None:
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert "shards of DeepSpeed" in refusal(tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert f"python {tmp_path}/zero_to_fp32.py {tmp_path} {tmp_path}" in refusal(tmp_path)


def test_a_folder_of_a_hub_model_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo: str, allow_patterns: list[str], **options: object) -> str:
        asked[repo] = allow_patterns
        save_checkpoint(tmp_path / "sub" / "folder", random_state(0))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("hf://owner/name/sub/folder") == tmp_path / "sub" / "folder"
    assert "sub/folder/*.safetensors" in asked["owner/name"]
    with pytest.raises(CheckpointError, match="owner/name is on the Hub, but has no folder other"):
        locate("hf://owner/name/other")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        locate("hf://owner/name/../secret")
    assert load_file(tmp_path / "sub" / "folder" / "model.safetensors")


REPOSITORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "source.spm",
    "qwen.tiktoken",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "modeling_x.py",
    "1_Pooling/config.json",
    "2_Dense/pytorch_model.bin",
    "LICENSE",
)
LEFT = (
    "onnx/config.json",
    "onnx/model.onnx",
    "text_encoder/onnx/config.json",
    "openvino/openvino_config.json",
    "model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "fp16/model.safetensors",
    "tf_model.h5",
    "model.gguf",
    "id_rsa",
    "original/params.pth",
)


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("folder", ["", "sub/folder"])
def test_of_a_hub_repository_is_fetched_what_travels_and_no_copies(
    safetensors: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickled weights only where there are no others. huggingface_hub itself decides what a pattern matches."""
    from huggingface_hub.utils import filter_repo_objects

    files = [*REPOSITORY[0 if safetensors else 2 :], "pytorch_model.bin", *LEFT]
    fetched: list[str] = []

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: object) -> str:
        stored = [f"{folder}/{name}" if folder else name for name in files]
        chosen = filter_repo_objects(stored, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in map(str, chosen):
            fetched.append(name.removeprefix(f"{folder}/"))
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate(f"hf://owner/name/{folder}" if folder else "owner/name")
    assert set(fetched) == {*REPOSITORY[0 if safetensors else 2 :], *([] if safetensors else ["pytorch_model.bin"])}
