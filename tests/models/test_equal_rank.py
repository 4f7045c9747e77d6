"""Adapters of one rank: the same change without the patterns that some loaders ignore; what each loader refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from commands.command_line import tvbases
from tvbases_hf import Basis, LoraBasis, Vectors, mix_style_files
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.equal_rank import equal_rank
from tvbases_hf.models.hosts import HOSTS, VLLM_RANKS, check_host, host_notes
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.lora_files import write
from zoo.peft_models import IDS, IMAGES, Case, load_base, make_adapter, make_base
from zoo.pipelines import FLUX_MODULES, style

# Ranks of their own, scales of their own, and every kind of layer: linear, [in, out], embedding, convolution.
PATTERNS: dict[str, Any] = {"r": 2, "lora_alpha": 6}


def case(model: str, targets: list[str], ranks: dict[str, int], **words: Any) -> Case:
    return Case(model, {**PATTERNS, "target_modules": targets, "rank_pattern": ranks, **words})


CASES = {
    "dora": case("llama", ["q_proj", "v_proj"], {"v_proj": 4}, use_dora=True),
    "gpt2": case("gpt2", ["c_attn", "c_fc"], {"c_fc": 3}),
    "rslora": case("llama", ["q_proj", "o_proj"], {"q_proj": 5}, use_rslora=True),
    "vision": case("vision", ["wide", "table", "out"], {"wide": 3}, alpha_pattern={"out": 1}),
}


def numbers(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())


def changes(tensors: dict[str, Tensor], config: dict[str, Any], base: Checkpoint) -> dict[str, Tensor]:
    adapter = Adapter("it", config, Checkpoint.from_state_dict(tensors), base)
    return {name: dense(delta) for name in adapter.names if (delta := adapter.delta(name)) is not None}


def logits(base: Path, of: Case, adapter: Path) -> Tensor:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load_base(base, of), str(adapter)).eval()
    with torch.no_grad():
        found = model(IMAGES.float(), IDS) if of.model == "vision" else model(IDS)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_no_number_of_the_change(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", CASES[name])
    tensors, config = numbers(make_adapter(tmp_path / "lora", base, CASES[name]))
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key or "embedding_A" in key}
    even, words = equal_rank(tensors, config)
    assert len(ranks) > 1 and words["r"] == max(ranks)
    assert (words["rank_pattern"], words["alpha_pattern"], words["use_rslora"]) == ({}, {}, False)
    opened = Checkpoint.open(base)
    before, after = changes(tensors, config, opened), changes(even, words, opened)
    for key, wanted in before.items():
        torch.testing.assert_close(after[key], wanted, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Two adapters of other ranks and targets over one base."""
    root = tmp_path_factory.mktemp("adapters")
    narrow = case("llama", ["q_proj", "v_proj"], {})
    base = make_base(root / "base", narrow)
    wider = Case("llama", {"r": 3, "lora_alpha": 3, "target_modules": ["v_proj", "gate_proj"]})
    return base, {"a": make_adapter(root / "a", base, narrow), "b": make_adapter(root / "b", base, wider, seed=2)}


def inputs(pair: tuple[Path, dict[str, Path]]) -> list[object]:
    return ["--base", pair[0], *(word for name, path in pair[1].items() for word in ("--task", f"{name}={path}"))]


def config_file(pair: tuple[Path, dict[str, Path]], file: Path) -> Path:
    models = [{"model": f"{pair[0]}+{path}", "parameters": {"weight": 0.5}} for path in pair[1].values()]
    file.write_text(json.dumps({"merge_method": "task_arithmetic", "base_model": str(pair[0]), "models": models}))
    return file


def test_every_command_that_writes_an_adapter_writes_equal_ranks(
    pair: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    merge = ["merge", config_file(pair, tmp_path / "merge.yml")]
    jobs: dict[str, tuple[list[object], list[object]]] = {
        "merge": ([*merge, tmp_path / "merge", "--adapter"], [*merge, tmp_path / "merge-even", "--adapter"]),
        "compress": tuple(
            ["compress", *inputs(pair), "--budget", 0.6, "--method", "tsv", "--alpha", 0.5, "--out", tmp_path / out]
            for out in ("compress", "compress-even")
        ),  # type: ignore[dict-item]
    }
    plain = Case("llama", {})
    for name, (own, even) in jobs.items():
        told = tvbases(*own)
        assert told.code == 0 and "--equal-rank" in told.out, told
        refused = tvbases(*even, "--for", "llama.cpp")
        assert refused.code == 2 and "add --equal-rank" in refused.err and not (tmp_path / f"{name}-even").exists()
        quiet = tvbases(*even, "--equal-rank", "--for", "llama.cpp")
        assert quiet.code == 0 and "--equal-rank" not in quiet.out, quiet
        assert numbers(tmp_path / name)[1]["rank_pattern"]
        tensors, config = numbers(tmp_path / f"{name}-even")
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert {tensor.shape["lora_B" in key] for key, tensor in tensors.items()} == {config["r"]}
        same = logits(pair[0], plain, tmp_path / name)
        torch.testing.assert_close(logits(pair[0], plain, tmp_path / f"{name}-even"), same, rtol=0, atol=1e-6)


def test_tasks_come_back_from_a_basis_of_equal_ranks(pair: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    vectors = Vectors.open(pair[0], pair[1])
    Basis.build(vectors, method="tsv", budget=0.6).save_pretrained(tmp_path / "own")
    Basis.build(vectors, method="tsv", budget=0.6, equal_rank=True).save_pretrained(tmp_path / "even")
    own, even = (Basis.from_pretrained(tmp_path / name) for name in ("own", "even"))
    assert isinstance(own, LoraBasis) and isinstance(even, LoraBasis)
    assert even.info.task_error == own.info.task_error
    base = Checkpoint.open(pair[0])
    for task in vectors.tasks:
        plain, restored = own.adapter(task), even.adapter(task, equal_rank=True, host="llama.cpp")
        assert plain.config["rank_pattern"] and not restored.config["rank_pattern"]
        wanted = changes(dict(plain.tensors), dict(plain.config), base)
        found = changes(dict(restored.tensors), dict(restored.config), base)
        for name, change in wanted.items():
            torch.testing.assert_close(found[name], change, rtol=1e-6, atol=1e-7)
        with pytest.raises(ParameterError, match="equal-rank"):
            own.negate(task, 0.5, host="llama.cpp")


def test_a_negated_task_has_equal_ranks_if_wanted(pair: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    asked = ["negate", *inputs(pair), "--forget", "b", "--alpha", 1, "--out", tmp_path / "out"]
    assert tvbases(*asked, "--adapter", "--equal-rank", "--for", "vllm").code == 0
    assert numbers(tmp_path / "out")[1]["rank_pattern"] == {}
    assert "add --adapter" in tvbases(*asked, "--equal-rank").err
    merge = tvbases("merge", config_file(pair, tmp_path / "merge.yml"), tmp_path / "merged", "--for", "vllm")
    assert merge.code == 2 and "add --adapter" in merge.err


# What is wrong with a configuration for each host, in words of the complaint; nothing for what it loads.
WRONG: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "biases": ({"bias": "all"}, {"vllm": "biases", "llama.cpp": "biases", "diffusers": "biases"}),
    "dora": ({"use_dora": True}, {"vllm": "DoRA", "llama.cpp": "DoRA"}),
    "embeddings": (
        {"modules_to_save": ["model.embed_tokens"]},
        {"vllm": "embed_tokens", "llama.cpp": "embed_tokens", "diffusers": "embed_tokens"},
    ),
    "heads": ({"modules_to_save": ["score"]}, {"llama.cpp": "score", "diffusers": "score"}),
    "lora_bias": ({"lora_bias": True}, {"vllm": "biases", "llama.cpp": "biases"}),
    "plain": ({}, {}),
    "ranks": ({"rank_pattern": {"x": 4}}, {"llama.cpp": "--equal-rank", "diffusers": "--equal-rank"}),
    "parameters": (
        {"target_parameters": ["mlp.experts.down_proj"]},
        dict.fromkeys(("vllm", "llama.cpp", "diffusers"), "target_parameters: train the layers"),
    ),
    "tokens": (
        {"trainable_token_indices": {"embed_tokens": [3]}},
        dict.fromkeys(("vllm", "llama.cpp", "diffusers"), "trainable_token_indices: leave those adapters out"),
    ),
    "wide": ({"r": 513}, {"vllm": "above 512"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_host_refuses_what_it_cannot_load(name: str) -> None:
    words, complaints = WRONG[name]
    for host in HOSTS:
        config = {"r": 8, **words}
        if host in complaints:
            with pytest.raises(ParameterError, match=f"--for {host}: .*{complaints[host]}"):
                check_host(host, config)  # type: ignore[arg-type]
        else:
            check_host(host, config)  # type: ignore[arg-type]


def test_vllm_is_told_how_to_start() -> None:
    assert VLLM_RANKS[-1] == HOSTS["vllm"].max_rank
    assert "--max-lora-rank 32" in host_notes("vllm", {"r": 8, "rank_pattern": {"x": 17}})[0]


def test_what_a_host_cannot_load_is_refused_before_the_numbers_are_read(tmp_path: Path) -> None:
    dora = case("llama", ["q_proj"], {}, modules_to_save=["lm_head"], use_dora=True)
    base = make_base(tmp_path / "base", dora)
    pair = base, {"a": make_adapter(tmp_path / "a", base, dora), "b": make_adapter(tmp_path / "b", base, dora, 2)}
    merge = ["merge", config_file(pair, tmp_path / "merge.yml"), tmp_path / "out", "--adapter"]
    for job in (merge, ["compress", *inputs(pair), "--rank", 2, "--out", tmp_path / "out"]):
        refused = tvbases(*job, "--for", "vllm", "--dry-run")
        assert refused.code == 2 and "DoRA" in refused.err and "lm_head" in refused.err, refused
    assert tvbases(*merge, "--for", "peft").code == 0


def test_mixed_styles_have_one_rank_if_wanted(tmp_path: Path) -> None:
    files = {}
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        modules = FLUX_MODULES if name == "a" else dict(list(FLUX_MODULES.items())[:2])
        write(tmp_path / name, style(seed, modules))
        files[name] = str(tmp_path / name / "style.safetensors")
    own, even = tmp_path / "own.safetensors", tmp_path / "even.safetensors"
    mix_style_files(files, own)
    mix_style_files(files, even, equal_rank=True)
    plain, padded = load_file(own), load_file(even)
    ranks = [{t.shape[0] for key, t in found.items() if "lora_A" in key} for found in (plain, padded)]
    assert len(ranks[0]) > 1 and ranks[1] == {max(ranks[0])}
    for key in (key for key in plain if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        products = [found[other].flatten(1) @ found[key].flatten(1) for found in (plain, padded)]
        torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-6)
