"""Full fine-tunes as LoRAs: loaded by PEFT alone they give the fine-tune's logits back, and what they lose is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from commands.command_line import tvbases
from oracles.merge_oracle import write_config
from tvbases_hf import Basis, Vectors, extract
from tvbases_hf.errors import MismatchError, OutputError, ParameterError
from tvbases_hf.merging.extract import is_extraction
from tvbases_hf.storage import run
from zoo.peft_models import IDS, IMAGES, MODELS, edit_tensors

RANK = 3
OUTPUT = "base_model.model.lm_head.weight"


def qwen2(**options: Any) -> nn.Module:
    """Some of its layers have biases, and its output is its embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def gpt_oss(**options: Any) -> nn.Module:
    """Its experts are parameters without a layer of their own, and its attention has a vector beside its layers."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2))


def mixtral(**options: Any) -> nn.Module:
    """Its router has another name in memory, and its experts are in one parameter there."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes))


MAKERS: dict[str, Callable[..., nn.Module]] = {**MODELS, "qwen2": qwen2, "gpt_oss": gpt_oss, "mixtral": mixtral}
# By name: what is made, and its options.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "vit": ("vit", {}),
}


class Pair:
    """A base and a fine-tune of it whose matrices change by rank 3, and all else anyhow."""

    def __init__(self, root: Path, family: str, change: Callable[[str, Tensor], Tensor] | None = None) -> None:
        self.kind, self.options = FAMILIES.get(family, (family, {}))
        self.base, self.tuned = root / "base", root / "tuned"
        torch.manual_seed(0)
        model: Any = MAKERS[self.kind](**self.options)
        model.save_pretrained(self.base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_((change or random_change)(name, parameter))
        model.save_pretrained(self.tuned)

    def load(self, path: Path) -> Any:
        kind: Any = type(MAKERS[self.kind](**self.options))
        return kind.from_pretrained(path).eval()

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(IMAGES.float() if self.kind == "vit" else IDS).logits

    def wanted(self) -> Tensor:
        return self.logits(self.load(self.tuned))

    def adapted(self, adapter: Path) -> Any:
        return PeftModel.from_pretrained(self.load(self.base), str(adapter)).eval()


def random_change(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or any(word in name for word in ("embed", "wte", "wpe")):
        return 0.02 * torch.randn(tensor.shape)
    rows, columns = len(tensor), tensor[0].numel()
    return (0.03 * torch.randn(rows, RANK) @ torch.randn(RANK, columns)).reshape(tensor.shape)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in made:
            made[family] = Pair(tmp_path_factory.mktemp(family), family)
        return made[family]

    return pair


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_rank_three_comes_back_in_peft_and_merged(
    family: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs(family)
    found = extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=RANK)["tasks"]["t"]
    wanted, adapted = pair.wanted(), pair.adapted(tmp_path / "out" / "t")
    assert (pair.logits(pair.load(pair.base)) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(pair.logits(adapted), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair.logits(adapted.merge_and_unload()), wanted, rtol=0, atol=1e-5)
    assert found["error"] < 1e-6 and found["left"] == [] and list(found["ranks"]) == [RANK]
    assert config_of(tmp_path / "out" / "t")["rank_pattern"] == {}


def merged(pair: Pair, adapter: Path, out: Path, *more: str, weight: float = 1.0) -> Path:
    """What ``tvbases merge`` makes of an extracted adapter."""
    model = {"model": str(adapter), "parameters": {"weight": weight}}
    config = {"merge_method": "task_arithmetic", "base_model": str(pair.base), "models": [model]}
    told = tvbases("merge", write_config(out.with_suffix(".yml"), config), out, "--quiet", *more)
    assert told.code == 0, told.err
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "mixtral"])
def test_what_is_extracted_is_merged_again(family: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Tied matrices too, which are stored as both of their uses, and what is called otherwise in memory (a router)."""
    pair, adapter = pairs(family), tmp_path / "out" / "t"
    left = extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=RANK)["tasks"]["t"]["left"]
    wanted = pair.wanted() if not left else pair.logits(pair.adapted(adapter))
    whole = merged(pair, adapter, tmp_path / "whole")
    torch.testing.assert_close(pair.logits(pair.load(whole)), wanted, rtol=0, atol=1e-5)
    again = merged(pair, adapter, tmp_path / "again", "--adapter")
    torch.testing.assert_close(pair.logits(pair.adapted(again)), wanted, rtol=0, atol=1e-5)
    half = merged(pair, adapter, tmp_path / "half", "--adapter", weight=0.5)
    base, tuned = (load_file(path / "model.safetensors") for path in (pair.base, whole))
    found = load_file(merged(pair, half, tmp_path / "half-whole") / "model.safetensors")
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], (tensor + tuned[name]) / 2, rtol=0, atol=1e-6)


def test_a_tied_matrix_that_was_saved_as_two_is_refused(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """And so is a basis of them, which would keep one of the two."""
    pair, adapter = pairs("llama_tied"), tmp_path / "out" / "t"
    extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=RANK)
    with pytest.raises(ParameterError, match="of the embedding and the output as one of 1 tensors"):
        Basis.build(Vectors.open(pair.base, {"t": adapter}), method="tsv", rank=RANK)
    edit_tensors(adapter, lambda own: {**own, OUTPUT: own[OUTPUT] * 1.01})
    with pytest.raises(MismatchError, match="lm_head, whose matrix the model uses twice"):
        Vectors.open(pair.base, {"t": adapter})


@pytest.mark.parametrize("rows", [37, 43])
def test_rows_that_not_all_vocabularies_have_are_dropped(
    rows: int, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs("llama")
    other, short = pair.load(pair.tuned), min(rows, 40)
    other.resize_token_embeddings(rows, mean_resizing=False)
    other.save_pretrained(tmp_path / "other")
    extract(pair.base, {"t": tmp_path / "other"}, tmp_path / "out", rank=16, extra_rows="drop")
    base, tuned = (load_file(path / "model.safetensors") for path in (pair.base, pair.tuned))
    found = load_file(merged(pair, tmp_path / "out" / "t", tmp_path / "whole") / "model.safetensors")
    for name, tensor in base.items():
        wanted = torch.cat([tuned[name][:short], tensor[short:]]) if len(tensor) == 40 else tuned[name]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5)
    if rows < 40:
        with pytest.raises(MismatchError, match="--extra-rows drop"):
            extract(pair.base, {"t": tmp_path / "other"}, tmp_path / "kept", rank=16, extra_rows="keep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_dense_change(dtype: torch.dtype, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    report = extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=2, save="norms", dtype=dtype)
    found = report["tasks"]["t"]
    base, tuned = (load_file(path / "model.safetensors") for path in (pair.base, pair.tuned))
    merged = pair.adapted(tmp_path / "out" / "t").merge_and_unload().state_dict()
    lost = sum(float((merged[name].double() - tuned[name].double()).square().sum()) for name in tuned)
    total = sum(float((tuned[name].double() - base[name].double()).square().sum()) for name in tuned)
    assert found["left"] == ["model.embed_tokens.weight"] and any("1 tensors" in note for note in report["warnings"])
    assert found["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    # By Eckart and Young, before any rounding.
    cut = sum(
        float(torch.linalg.svdvals(tuned[name].double() - base[name].double())[2:].square().sum())
        for name in tuned
        if tuned[name].dim() == 2 and "embed" not in name
    )
    cut += float((tuned["model.embed_tokens.weight"].double() - base["model.embed_tokens.weight"]).square().sum())
    assert found["error_before_rounding"] == pytest.approx((cut / total) ** 0.5, rel=1e-5)
    assert found["dtypes"] == [str(dtype).removeprefix("torch.")]


def test_ranks_that_a_rule_or_a_budget_chooses(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("llama")

    def run_with(name: str, **how: Any) -> dict[str, Any]:
        return extract(pair.base, {"t": pair.tuned}, tmp_path / name, **how)["tasks"]["t"]

    energy = run_with("energy", rank="energy:0.9", save="none")
    assert set(energy["ranks"]) <= {1, 2, 3} and len(energy["ranks"]) > 1
    pattern = config_of(tmp_path / "energy" / "t")["rank_pattern"]
    assert pattern and any("--equal-rank" in note for note in energy["loading"])
    small, large = run_with("small", budget=0.3), run_with("large", budget=0.5)
    whole = sum(tensor.nbytes for tensor in load_file(pair.tuned / "model.safetensors").values())
    assert small["bytes"] <= 0.3 * whole and large["bytes"] <= 0.5 * whole
    assert large["error"] < small["error"] < 1
    for name, how in (("both", {"rank": 2, "budget": 0.5}), ("neither", {}), ("tiny", {"budget": 0.01})):
        with pytest.raises(ParameterError, match="budget"):
            run_with(name, **how)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("how", [{"rank": "energy:0.9"}, {"budget": 0.4}], ids=["energy", "budget"])
def test_equal_ranks_need_no_pattern_and_make_the_same_change(
    how: dict[str, Any], pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pairs("gpt2"), tmp_path / "even" / "t"
    found = extract(pair.base, {"t": pair.tuned}, tmp_path / "even", **how, equal_rank=True)["tasks"]["t"]
    config, (rank,) = config_of(adapter), found["ranks"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    assert not found["loading"]
    if "rank" in how:
        extract(pair.base, {"t": pair.tuned}, tmp_path / "own", **how)
        same = pair.logits(pair.adapted(tmp_path / "own" / "t"))
        assert (
            found["error"] <= json.loads((tmp_path / "own" / "tvbases_extract.json").read_text())["tasks"]["t"]["error"]
        )
        assert (pair.logits(pair.adapted(adapter)) - pair.wanted()).abs().max() <= (same - pair.wanted()).abs().max()


def test_what_has_no_factors_is_saved_or_left_and_said(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "gpt_oss")
    report = extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=RANK)
    found = report["tasks"]["t"]
    assert "model.layers.0.mlp.experts" in found["modules_to_save"]
    assert found["left"] == ["model.layers.0.self_attn.sinks"] and "sinks" in report["warnings"][-1]
    adapted = pair.adapted(tmp_path / "out" / "t")
    adapted.base_model.model.model.layers[0].self_attn.sinks.data = (
        pair.load(pair.tuned).model.layers[0].self_attn.sinks
    )
    torch.testing.assert_close(pair.logits(adapted), pair.wanted(), rtol=0, atol=1e-5)


def test_layers_that_do_not_change_get_no_factors(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "llama", lambda name, t: random_change(name, t) * ("q_proj" in name))
    extract(pair.base, {"t": pair.tuned}, tmp_path / "out", rank=RANK)
    assert config_of(tmp_path / "out" / "t")["target_modules"] == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    ]
    norms = Pair(tmp_path / "norms", "llama", lambda name, t: random_change(name, t) * ("model.norm" in name))
    extract(norms.base, {"t": norms.tuned}, tmp_path / "norms-out", rank=RANK)
    adapted = norms.adapted(tmp_path / "norms-out" / "t")  # with one layer of zeros, as PEFT wants one
    torch.testing.assert_close(norms.logits(adapted), norms.wanted(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_tokens_that_were_added_are_saved(family: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs(family)
    grown = pair.load(pair.tuned)
    torch.manual_seed(1)
    grown.resize_token_embeddings(43, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    report = extract(pair.base, {"t": tmp_path / "grown"}, tmp_path / "out", rank=RANK)
    assert "resize_token_embeddings(43)" in report["warnings"][0]
    base = pair.load(pair.base)
    base.resize_token_embeddings(43, mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "t")).eval()
    torch.testing.assert_close(pair.logits(adapted), pair.logits(grown), rtol=0, atol=1e-5)
    left = extract(pair.base, {"t": tmp_path / "grown"}, tmp_path / "left", rank=RANK, save="none")
    assert "left out" in left["warnings"][0]
    assert "model.embed_tokens.weight" in left["tasks"]["t"]["left"]
    pair.adapted(tmp_path / "left" / "t")


def test_several_tasks_are_directories_and_are_replaced_until_something_is_added(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, out = pairs("llama"), tmp_path / "out"
    for _ in range(2):
        report = extract(pair.base, {"a": pair.tuned, "b": pair.tuned}, out, rank=1)
    assert set(report["tasks"]) == {"a", "b"} and is_extraction(out)
    assert (out / "a" / "adapter_model.safetensors").read_bytes() == (
        out / "b" / "adapter_model.safetensors"
    ).read_bytes()
    (out / "a" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        extract(pair.base, {"a": pair.tuned}, out, rank=1)


def test_what_cannot_be_extracted_is_refused_and_nothing_is_written(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs("llama")
    extract(pair.base, {"t": pair.tuned}, tmp_path / "lora", rank=1)
    (tmp_path / "plain").mkdir()
    for source in (pair.base, pair.tuned):
        (tmp_path / source.name).mkdir()
        (tmp_path / source.name / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    out = tmp_path / "out"
    for base, task, name, said in (
        (pair.base, pair.base, "t", "equal to the base"),
        (pair.base, tmp_path / "lora" / "t", "t", "adapter already"),
        (pair.base, pair.tuned, "../t", "cannot be the name of a file"),
        (tmp_path / "base", tmp_path / "tuned", "t", "names no architecture"),
    ):
        with pytest.raises(ParameterError, match=said):
            extract(base, {name: task}, out, rank=1)
    with pytest.raises(MismatchError):
        extract(pair.base, {"t": pairs("bert").tuned}, out, rank=1)
    with pytest.raises(ParameterError, match="float16"):
        far = Pair(tmp_path / "far", "llama", lambda name, t: 1e12 * torch.ones_like(t) * ("q_proj" in name))
        extract(far.base, {"t": far.tuned}, out, rank=1, dtype=torch.float16)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_killed_run_goes_on_where_it_was(
    pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvbases_hf.merging import extraction

    pair, how = pairs("llama"), {"rank": "energy:0.9", "save": "all"}
    extract(pair.base, {"a": pair.tuned, "b": pair.tuned}, tmp_path / "whole", **how)  # type: ignore[arg-type]
    counts = {"seen": 0, "cut": 0}
    values, cut = extraction.singular_values, extraction.svd

    def counted(*given: Any) -> Any:
        counts["seen"] += 1
        return values(*given)

    def stopping(*given: Any) -> Any:
        counts["cut"] += 1
        if counts["cut"] == 20:  # in the second task
            raise KeyboardInterrupt
        return cut(*given)

    monkeypatch.setattr(extraction, "singular_values", counted)
    monkeypatch.setattr(extraction, "svd", stopping)
    with run.using(run.Run(workers=1, quiet=True)):
        with pytest.raises(KeyboardInterrupt):
            extract(pair.base, {"a": pair.tuned, "b": pair.tuned}, tmp_path / "out", **how)  # type: ignore[arg-type]
        assert counts["seen"] == 30 and not (tmp_path / "out").exists()
        _give_up(tmp_path)
        extract(pair.base, {"a": pair.tuned, "b": pair.tuned}, tmp_path / "out", **how)  # type: ignore[arg-type]
    assert counts == {"seen": 30, "cut": 20 + 30 - 19}
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()


def _give_up(directory: Path) -> None:
    """What a process left looks as if it had died."""
    (scratch,) = directory.glob(".out.tvbases-*")
    host, rest = scratch.name.rsplit("-", 2)[0], scratch.name.rsplit("-", 1)[1]
    scratch.rename(scratch.with_name(f"{host}-999999999-{rest}"))


def test_the_number_of_threads_does_not_change_the_bytes(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("bert")
    for workers in (1, 4):
        with run.using(run.Run(workers=workers, quiet=True)):
            extract(pair.base, {"t": pair.tuned}, tmp_path / str(workers), rank=2)
    assert len({(tmp_path / n / "t" / "adapter_model.safetensors").read_bytes() for n in ("1", "4")}) == 1


def test_the_command_prints_the_errors_and_reports_them(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, file = pairs("llama"), tmp_path / "report.json"
    asked = ["extract", "--base", pair.base, "--task", f"t={pair.tuned}", "--out", tmp_path / "out", "--json", file]
    tried = tvbases(*asked, "--rank", 2, "--dry-run")
    assert tried.code == 0 and "nothing is written" in tried.out and not (tmp_path / "out").exists()
    promised = json.loads(file.read_text())
    outcome = tvbases(*asked, "--rank", 2)
    report = json.loads(file.read_text())
    assert outcome.code == 0 and f"{report['tasks']['t']['error']:.3%}" in outcome.out
    assert promised["bytes"] == report["tasks"]["t"]["bytes"]
    refused = tvbases(*asked, "--rank", 2, "--for", "vllm")
    assert refused.code == 2 and "--for vllm" in refused.err and "--save none" in refused.err
    small = tvbases(*asked, "--rank", 2, "--memory", "1kB")
    assert small.code == 2 and "give --memory" in small.err
    assert Vectors.open(pair.base, {"t": tmp_path / "out" / "t"}).names
