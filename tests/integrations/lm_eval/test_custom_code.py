"""Python code that comes with a model travels with it, and runs nowhere unless the user says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config
from zoo.hf_models import Family, make_llama, save_tokenizer

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def custom(tmp_path: Path) -> Family:
    """A base and a fine-tune of a class that is in modeling_my.py beside them, which leaves ``ran`` when it is run."""
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "my_llama", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_my.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    save_tokenizer(base)
    return Family(base, {"math": Path(shutil.copytree(base, tmp_path / "math"))})


def test_code_is_copied_and_not_run(custom: Family, tmp_path: Path) -> None:
    models = [{"model": str(custom.tasks["math"]), "parameters": {"weight": 1.0}}]
    whole = {"merge_method": "task_arithmetic", "base_model": str(custom.base), "models": models}
    file = write_config(tmp_path / "merge.yml", whole)
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0
    assert (tmp_path / "out" / "modeling_my.py").read_text() == (custom.base / "modeling_my.py").read_text()
    assert not (tmp_path / "ran").exists()


def test_code_is_run_where_the_user_trusts_it_and_else_refused(
    custom: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path.parent / "modules"))
    text = tmp_path / "text.txt"
    text.write_text("word1 word2 word3\n")
    words = ["evaluate", custom.base, "--target", f"text:{text}"]
    message = refused(tmp_path, *words)
    assert "contains custom code" in message and "--trust-remote-code runs it" in message
    assert not (tmp_path / "ran").exists()
    outcome = tvbases(*words, "--trust-remote-code")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "ran").exists()
