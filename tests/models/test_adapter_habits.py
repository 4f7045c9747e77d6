"""Adapter files as other programs write them: other names, places and number formats, nothing trained, other bases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.identity import is_named, model_name
from tvbases_hf.models.vectors import Vectors, open_model
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.adapter_families import Adapters, random_adapters
from zoo.peft_models import Case, copy, edit_config, edit_tensors, make_adapter, make_base, peft_model, refusal

SAVED = Case("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True})
BIASED = Case("bert", {"target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"})
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("adapters"), tasks=("math", "code"))


def renamed(adapter: Path, change: Callable[[str], str]) -> Path:
    return edit_tensors(adapter, lambda tensors: {change(name): tensor for name, tensor in tensors.items()})


def in_memory(name: str) -> str:
    """As the parameters of a PeftModel are called whose adapter is ``default``."""
    if "lora_embedding" in name:
        return f"{name}.default"
    if "lora_magnitude_vector" in name and not name.endswith(".weight"):
        return f"{name}.default.weight"
    module, _, leaf = name.rpartition(".")
    return f"{module}.default.{leaf}" if "lora_" in name else f"{module}.modules_to_save.default.{leaf}"


@pytest.mark.parametrize("case", [SAVED, BIASED], ids=["dora and saved modules", "biases and a classifier"])
def test_the_adapters_name_in_the_stored_names_is_no_part_of_them(case: Case, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", case)
    plain = make_adapter(tmp_path / "plain", base, case)
    edit_tensors(plain, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("embed_tokens.weight")})
    named = renamed(copy(plain, tmp_path / "named"), in_memory)
    assert not set(load_file(named / WEIGHTS)) & set(load_file(plain / WEIGHTS))
    found, expected = (Adapter.open(path, Checkpoint.open(base)) for path in (named, plain))
    assert found.names == expected.names and found.naming == expected.naming
    for name in expected.names:
        a, b = found.delta(name), expected.delta(name)
        assert a is not None and b is not None and torch.equal(dense(a), dense(b))


def test_two_adapters_in_one_file_are_refused_with_their_names(adapters: Adapters, tmp_path: Path) -> None:
    def both(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace(".weight", f".{a}.weight"): t.clone() for n, t in tensors.items() for a in ("default", "dpo")}

    message = refusal(edit_tensors(copy(adapters.tasks["math"], tmp_path / "a"), both), adapters.base)
    assert "2 adapters (default, dpo)" in message and "selected_adapters" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_factors_of_any_dtype_are_the_numbers_that_they_hold(
    dtype: torch.dtype, adapters: Adapters, tmp_path: Path
) -> None:
    stored = edit_tensors(
        copy(adapters.tasks["math"], tmp_path / "stored"), lambda ts: {n: t.to(dtype) for n, t in ts.items()}
    )
    widened = edit_tensors(copy(stored, tmp_path / "wide"), lambda ts: {n: t.double() for n, t in ts.items()})
    vectors = Vectors.open(adapters.base, {"stored": stored, "wide": widened})
    for name in vectors.names:
        found, expected = map(dense, vectors.deltas(name))
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("place", ["lora_A.weight", "lora_B.weight", "lm_head.weight"])
def test_what_a_sharded_run_saved_without_numbers_is_called_that(place: str, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    base = make_base(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "a", base, case)
    edit_tensors(adapter, lambda ts: {n: torch.empty(0) if n.endswith(place) else t for n, t in ts.items()})
    message = refusal(adapter, base)
    assert "saved nothing" in message and "ZeRO-3" in message and place in message and "resize" not in message


@pytest.mark.parametrize("folder", ["checkpoint-500", "adapter"])
def test_an_adapter_in_the_one_folder_that_has_one_is_read(folder: str, adapters: Adapters, tmp_path: Path) -> None:
    shutil.copytree(adapters.tasks["math"], tmp_path / "run" / folder)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "README.md").touch()
    base = Checkpoint.open(adapters.base)
    for source in (tmp_path / "run", f"{adapters.base}+{tmp_path / 'run'}"):
        found, expected = open_model(source, base), Adapter.open(adapters.tasks["math"], base)
        assert isinstance(found, Adapter) and found.fingerprint() == expected.fingerprint()


def test_of_several_folders_with_adapters_the_user_chooses(adapters: Adapters, tmp_path: Path) -> None:
    for step in (500, 1000):
        shutil.copytree(adapters.tasks["math"], tmp_path / "run" / f"checkpoint-{step}")
    base = Checkpoint.open(adapters.base)
    for source in (tmp_path / "run", f"{adapters.base}+{tmp_path / 'run'}"):
        with pytest.raises(CheckpointError, match=r"2 of its folders.*checkpoint-(500|1000).*give one of them"):
            open_model(source, base)


# Nothing trained


@pytest.fixture(scope="module")
def untrained(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy(adapters.tasks["math"], tmp_path_factory.mktemp("untrained") / "zero")
    return edit_tensors(path, lambda ts: {n: t * (0 if "lora_B" in n else 1) for n, t in ts.items()})


@pytest.mark.parametrize("command", ["compress", "decompose", "inspect", "merge", "online"])
def test_an_adapter_that_changes_nothing_is_said(
    command: str, adapters: Adapters, untrained: Path, tmp_path: Path
) -> None:
    tasks = ["--base", adapters.base, "--task", f"zero={untrained}", "--task", f"math={adapters.tasks['math']}"]
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (untrained, adapters.tasks["math"])]
    config = {"merge_method": "task_arithmetic", "base_model": str(adapters.base), "models": models}
    out = ["--out", tmp_path / "out"]
    outcome = tvbases(
        *{
            "compress": ["compress", *tasks, *out],
            "decompose": ["decompose", *tasks, *out],
            "inspect": ["inspect", *tasks],
            "merge": ["merge", write_config(tmp_path / "merge.yml", config), tmp_path / "out"],
            "online": ["online", *tasks, "--num-bases", "2", *out],
        }[command]
    )
    assert outcome.code == 0, outcome
    assert "equals the base: its task vector is zero" in " ".join((outcome.out + outcome.err).split()), outcome


def test_adapters_that_all_change_nothing_are_not_compressed(
    adapters: Adapters, untrained: Path, tmp_path: Path
) -> None:
    message = refused(
        tmp_path, "compress", "--base", adapters.base, "--task", f"a={untrained}", "--out", tmp_path / "out"
    )
    assert "nothing to compress" in message and "its task vector is zero" in message


def test_dora_that_was_not_trained_changes_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", SAVED)
    case = Case("llama", {"target_modules": ["q_proj"], "use_dora": True})
    model = peft_model(base, case)
    model.save_pretrained(str(tmp_path / "a"))
    assert Adapter.open(tmp_path / "a", Checkpoint.open(base)).changes_nothing
    assert not Adapter.open(make_adapter(tmp_path / "b", base, SAVED), Checkpoint.open(base)).changes_nothing


# Which base

ONE_MODEL = [
    "meta-llama/Llama-3.1-8B-Instruct",
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
    "unsloth/llama-3.1-8b-instruct-unsloth-bnb-4bit",
    "meta-llama/Llama-3.1-8B-Instruct@main",
    "/home/someone/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f249a16976918f6564b8830bc8",
    "models/Llama-3.1-8B-Instruct/",
    "someone/Llama-3.1-8B-Instruct-AWQ",
    "someone/Llama-3.1-8B-Instruct-GPTQ-Int4",
    r"D:\models\Llama-3.1-8B-Instruct",
]


def test_one_model_has_one_name_wherever_it_is_kept() -> None:
    assert {model_name(source) for source in ONE_MODEL} == {"llama-3.1-8b-instruct"}
    others = [
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-7B-v0.1",
        "unsloth/Llama-3.2-1B-bnb-4bit",
        "a/phi-4",
        "b/4bit",
    ]
    assert len({model_name(source) for source in [ONE_MODEL[0], *others]}) == 1 + len(others)
    assert is_named("org/model@v2") and is_named(ONE_MODEL[4]) and not is_named("/models/llama")


def test_adapters_of_one_base_under_several_names_are_added(adapters: Adapters, tmp_path: Path) -> None:
    tasks = {name: copy(path, tmp_path / name) for name, path in adapters.tasks.items()}
    for path, name in zip(tasks.values(), ONE_MODEL[1::3], strict=False):
        edit_config(path, base_model_name_or_path=name)
    assert len(Vectors.open(adapters.base, tasks)) == 2


@pytest.mark.parametrize("named", ["org/other", "folder"])
def test_another_base_than_the_one_given_is_said(named: str, adapters: Adapters, tmp_path: Path) -> None:
    """By name where both have one, and by the weights where the adapter's base is there."""
    cache = tmp_path / "models--org--given" / "snapshots" / "0123456789abcdef"
    base = copy(adapters.base, cache if named == "org/other" else tmp_path / "base")
    other = make_base(tmp_path / "other", adapters.case, seed=5)
    trained_on = str(other) if named == "folder" else named
    adapter = edit_config(copy(adapters.tasks["math"], tmp_path / "a"), base_model_name_or_path=trained_on)
    (note,) = [n for n in Vectors.open(base, {"math": adapter}).coverage.notes() if "trained on" in n]
    assert trained_on in note and '"math"' in note
    right = str(adapters.base) if named == "folder" else "org/given-bnb-4bit"
    edit_config(adapter, base_model_name_or_path=right)
    assert not [n for n in Vectors.open(base, {"math": adapter}).coverage.notes() if "trained on" in n]
