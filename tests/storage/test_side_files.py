"""What travels with weights is chosen by list, and never comes from outside of the model's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tvbases_hf.errors import CheckpointError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.model import side_files_of
from tvbases_hf.storage.side_files import side_files

TRAVELS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
STAYS = (
    "README.md",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "model.ckpt",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "id_rsa",
    ".env",
    ".git/config",
    "notes.txt",
    "wandb/run.json",
    "quantize_config.json",
    "train.py",
    "model.onnx",
)


def write(directory: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_what_is_listed_travels_and_nothing_else(tmp_path: Path) -> None:
    assert set(side_files(write(tmp_path, *TRAVELS, *STAYS))) == set(TRAVELS)


def test_code_is_what_auto_map_names_and_what_that_imports(tmp_path: Path) -> None:
    write(
        tmp_path, "configuration_x.py", "tokenization_x.py", "layers.py", "parts/rope.py", "train.py", "modeling_y.py"
    )
    (tmp_path / "modeling_x.py").write_text(
        "import os\nfrom .layers import A\nfrom .parts.rope import B\nfrom .gone import C\n"
    )
    auto_map = {
        "AutoConfig": "configuration_x.C",
        "AutoModel": "modeling_x.M",
        "AutoModelForMaskedLM": "o/n--modeling_y.M",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code = {name for name in side_files(tmp_path) if name.endswith(".py")}
    assert code == {"configuration_x.py", "tokenization_x.py", "modeling_x.py", "layers.py", "parts/rope.py"}


def test_a_module_that_code_is_named_by_does_not_leave_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "evil.py")
    for name in ("..evil.C", "../evil.C", "/tmp/evil.C", "a/../../evil.C"):
        model = write(tmp_path / "model", "config.json", text=json.dumps({"auto_map": {"AutoModel": name}}))
        assert set(side_files(model)) == {"config.json"}


def test_folders_that_modules_json_names_travel_with_their_weights(tmp_path: Path) -> None:
    write(
        tmp_path,
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/notes",
        "3_Other/config.json",
    )
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Absent"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert set(side_files(tmp_path)) == {
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../other"])
def test_a_folder_of_modules_json_outside_of_the_model_is_refused(path: str, tmp_path: Path) -> None:
    write(tmp_path / "model", "modules.json", text=json.dumps([{"path": path}]))
    with pytest.raises(CheckpointError, match=r"modules\.json names a folder outside of the model"):
        side_files(tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/a.jinja", "LICENSE"])
def test_a_link_out_of_the_model_is_refused(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", "config.json", text="{}")
    secret = write(tmp_path, "secret") / "secret"
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*secret, outside of the model") as caught:
        side_files(model)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_a_link_out_of_the_model_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "modules.json", text='[{"path": "1_Pooling"}]')
    write(tmp_path, "elsewhere/config.json")
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the model"):
        side_files(model)


def test_links_within_the_model_and_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--llama"
    blob = write(repository, "blobs/abc") / "blobs" / "abc"
    snapshot = write(repository / "snapshots" / "0123", "vocab.txt")
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "merges.txt").symlink_to("vocab.txt")
    (snapshot / "folder").mkdir()
    (snapshot / "folder" / "config.json").symlink_to(blob)
    assert set(side_files(snapshot)) == {"tokenizer.json", "merges.txt", "vocab.txt"}
    assert set(side_files(snapshot / "folder")) == {"config.json"}
    other = write(tmp_path / "models--other--model", "blobs/def") / "blobs" / "def"
    (snapshot / "added_tokens.json").symlink_to(other)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        side_files(snapshot)


def test_a_link_to_nothing_is_as_if_there_were_none(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).symlink_to("gone")
    assert not side_files(tmp_path)


def test_a_file_of_weights_brings_what_lies_beside_it_where_that_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    assert side_files_of(Checkpoint.open(file)) == {}  # a folder of anything
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert set(side_files_of(Checkpoint.open(file))) == {"config.json", "tokenizer.json"}
    assert side_files_of(Checkpoint.open(file)) == side_files_of(Checkpoint.open(tmp_path))
