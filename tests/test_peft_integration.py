"""Adapters loaded in a PEFT model: read as what PEFT computes, and added up exactly, where PEFT itself is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Case, load_base, make_adapter, make_base, outputs, peft_model, perturb, relative
from torch import Tensor, nn

from tvbases_hf.delta import LowRank, dense
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError
from tvbases_hf.gram import gram_matrix
from tvbases_hf.taskvector import TaskVectors
from tvbases_peft import add_weighted_adapter, task_vectors
from tvbases_peft.combine import _closest
from tvbases_peft.loaded import ADDITIVE

TOLERANCE = 1e-5
Q = {"target_modules": ["q_proj", "k_proj"]}
LORA = Q | {"r": 3, "lora_alpha": 5}
RSLORA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True, "alpha_pattern": {"down_proj": 9}}
DORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "use_dora": True}
BIAS = {"target_modules": ["query", "dense"], "r": 2, "lora_bias": True}


def loaded(root: Path, case: Case, configs: Sequence[dict[str, Any]], names: str = "abcdefgh") -> Any:
    """A model with one random adapter per configuration, loaded by PEFT from files."""
    base = make_base(root / "base", case)
    paths = [
        make_adapter(root / name, base, Case(case.model, config, case.options), seed=i)
        for i, (name, config) in enumerate(zip(names, configs, strict=False))
    ]
    origin: Any = load_base(base, case)
    model: Any = PeftModel.from_pretrained(origin, str(paths[0]), adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=False):
        model.load_adapter(str(path), adapter_name=name)
    return model


def active(model: Any, name: str) -> Tensor:
    model.set_adapter(name)
    found = outputs(model)
    model.float()
    return found


def plain_sum(model: Any, case: Case, weights: dict[str, float], base: Path) -> Tensor:
    """Logits of the plain model with base + sum_i w_i delta_i, each delta by PEFT: merged minus unmerged weights."""
    expected: Any = load_base(base, case).double()
    origin = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in origin.items()}
    for name, weight in weights.items():
        # a fresh load of the adapter alone, merged in float64
        lone: Any = PeftModel.from_pretrained(load_base(base, case), str(base.parent / name)).double()
        for own, tensor in lone.merge_and_unload().state_dict().items():
            total[own] += weight * (tensor - origin[own])
    expected.load_state_dict(total)
    return outputs(expected)


# Reading

READ = {
    "lora, rslora and patterns": (Case("llama", {}), [LORA, RSLORA]),
    "dora": (Case("llama", {}), [DORA, LORA]),
    "modules_to_save": (Case("llama", {}), [LORA | {"modules_to_save": ["lm_head"]}, RSLORA]),
    "lora_bias": (Case("bert", {}), [BIAS, {"target_modules": ["query"]}]),
    "conv1d": (Case("gpt2", {}), [{"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj"]}]),
    "tied matrices, one use each": (Case("gpt2", {}), [{"target_modules": ["wte"]}, {"target_modules": ["lm_head"]}]),
    "convolutions": (
        Case("vision", {}),
        [{"target_modules": ["wide", "point", "table"]}, {"target_modules": ["line", "wide"], "use_dora": True}],
    ),
}


@pytest.mark.parametrize("name", sorted(READ))
def test_loaded_adapters_are_read_as_what_peft_computes(name: str, tmp_path: Path) -> None:
    case, configs = READ[name]
    model = loaded(tmp_path, case, configs)
    vectors = task_vectors(model)
    assert vectors.tasks == ("a", "b")
    for task, source in vectors.models.items():
        plain: Any = load_base(tmp_path / "base", case).double()
        for own in source.names:  # type: ignore[union-attr]
            delta = source.delta(own)  # type: ignore[union-attr]
            assert delta is not None
            parameter = untied(plain, own)
            parameter.data = parameter.data + dense(delta).reshape(parameter.shape)
        assert relative(outputs(plain), active(model, task)) <= TOLERANCE


def untied(model: Any, name: str) -> nn.Parameter:
    """The parameter, with numbers of its own."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).detach().clone()))
    return getattr(owner, leaf)


def test_the_base_is_borrowed_from_the_model(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, DORA])
    base = task_vectors(model).base
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert base.read("model.layers.0.self_attn.q_proj.weight").data_ptr() == weight.data_ptr()
    assert set(base.tensors) == set(load_base(tmp_path / "base", Case("llama", {})).state_dict())


def test_the_scaling_is_that_of_the_layers_now(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    before = gram_matrix(task_vectors(model)).matrix
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 0.5)
    assert relative(gram_matrix(task_vectors(model)).matrix, before / 4) <= 1e-6


def test_a_gram_matrix_of_loaded_adapters_is_that_of_their_files(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA, DORA])
    files = TaskVectors.open(tmp_path / "base", {name: tmp_path / name for name in "abc"})
    assert relative(gram_matrix(task_vectors(model)).matrix, gram_matrix(files).matrix) <= 1e-6


def additive(method: str) -> Any:
    import peft

    where: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "ADALORA": ("AdaLoraConfig", {"total_step": 10, "init_r": 3}),
        "C3A": ("C3AConfig", {"block_size": 8}),
        "DELORA": ("DeloraConfig", {"r": 2}),
        "FOURIERFT": ("FourierFTConfig", {"n_frequency": 9}),
        "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
        "LOHA": ("LoHaConfig", {"r": 2}),
        "LOKR": ("LoKrConfig", {"r": 2}),
        "RANDLORA": ("RandLoraConfig", {"r": 2}),
        "SHIRA": ("ShiraConfig", {"r": 2}),
        "VBLORA": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 8, "topk": 2}),
        "VERA": ("VeraConfig", {"r": 2}),
        "WAVEFT": ("WaveFTConfig", {"n_frequency": 16}),
        "HIRA": ("HiraConfig", {"r": 2}),
        "OFT": ("OFTConfig", {"oft_block_size": 4}),
        "HRA": ("HRAConfig", {"r": 2}),
        "IA3": ("IA3Config", {"feedforward_modules": []}),
    }
    name, words = options[method]
    return getattr(peft, name)(**where, **words)


@pytest.mark.parametrize("method", sorted(ADDITIVE))
def test_other_additive_methods_are_read_as_what_peft_computes(method: str, tmp_path: Path) -> None:
    case = Case("llama", {})
    base = make_base(tmp_path / "base", case)
    config = additive(method)
    if method in ("LOHA", "LOKR"):
        config.modules_to_save = ["lm_head"]
    origin: Any = load_base(base, case)
    model: Any = get_peft_model(origin, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    vectors = task_vectors(model)
    plain: Any = load_base(base, case).double()
    for name in vectors.names:
        plain.state_dict()[name].add_(dense(vectors.deltas(name)[0]))
    expected = outputs(model)
    assert relative(outputs(load_base(base, case)), expected) > 1e-3
    assert relative(outputs(plain), expected) <= TOLERANCE


@pytest.mark.parametrize("method", ["HIRA", "OFT", "HRA", "IA3"])
def test_methods_that_multiply_the_weight_are_refused_by_name(method: str, tmp_path: Path) -> None:
    origin: Any = load_base(make_base(tmp_path / "base", Case("llama", {})), Case("llama", {}))
    with pytest.raises(CheckpointError, match=f"{method} adapter"):
        task_vectors(get_peft_model(origin, additive(method)))


def test_what_files_do_not_show_is_refused_in_a_loaded_model(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, **options)
            self.table = nn.Embedding(5, 3, max_norm=1.0)

    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"dilation": 2}, ["conv"], "dilation"),
        ({"padding_mode": "circular"}, ["conv"], "pads with zeros"),
        ({}, ["table"], "limits the norm"),
    ]
    for options, targets, word in cases:
        plain: Any = Model(**options)
        with pytest.raises(CheckpointError, match=word):
            task_vectors(get_peft_model(plain, LoraConfig(target_modules=targets)))


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    model.merge_adapter()
    with pytest.raises(CheckpointError, match="is merged"):
        task_vectors(model)


def test_an_adapter_with_trained_biases_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("bert", {}), [{"target_modules": ["query"], "bias": "all"}])
    with pytest.raises(CheckpointError, match='bias="all"'):
        task_vectors(model)


def test_a_name_that_is_not_loaded_is_refused_with_the_nearest(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    model.load_adapter(str(tmp_path / "a"), adapter_name="maths")
    with pytest.raises(ParameterError, match=r"did you mean maths\?"):
        task_vectors(model, ["math"])
    with pytest.raises(ParameterError, match="PeftModel is needed"):
        task_vectors(load_base(tmp_path / "base", Case("llama", {})))  # type: ignore[arg-type]


def test_a_missing_peft_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[peft\]"):
        task_vectors(None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[peft\]"):
        add_weighted_adapter(None, ["a"], [1.0], "b")  # type: ignore[arg-type]


# Adding

SUMS = {
    "lora, negative weights": (Case("llama", {}), [LORA, LORA | {"r": 1}]),
    "rslora, patterns, other targets": (Case("llama", {}), [LORA, RSLORA, RSLORA | {"r": 2}]),
    "dora": (Case("llama", {}), [DORA, DORA | {"r": 5}]),
    "dora, lora and an embedding": (Case("llama", {}), [DORA, LORA, {"target_modules": ["embed_tokens"]}]),
    "regular expressions beside lists": (Case("llama", {}), [LORA, {"target_modules": r".*\.0\..*up_proj"}]),
    "modules_to_save": (
        Case("llama", {}),
        [LORA | {"modules_to_save": ["lm_head"]}, RSLORA | {"modules_to_save": ["lm_head"]}],
    ),
    "lora_bias": (Case("bert", {}), [BIAS, BIAS | {"r": 3, "use_rslora": True}, {"target_modules": ["value"]}]),
    "classifiers": (
        Case("bert", {}),
        [{"target_modules": ["query"], "task_type": "SEQ_CLS"}, {"target_modules": ["value"], "task_type": "SEQ_CLS"}],
    ),
    "conv1d and linear": (
        Case("gpt2", {}, {"tie_word_embeddings": False}),
        [{"target_modules": ["c_attn", "lm_head"]}, {"target_modules": ["c_proj", "lm_head"]}],
    ),
    "convolutions and dora": (
        Case("vision", {}),
        [{"target_modules": ["wide", "cube"]}, {"target_modules": ["line", "wide", "out"], "use_dora": True}],
    ),
}
WEIGHTS = [0.8, -1.2, 0.5]


@pytest.mark.parametrize("name", sorted(SUMS))
def test_a_weighted_adapter_is_exactly_the_weighted_sum(name: str, tmp_path: Path) -> None:
    case, configs = SUMS[name]
    model = loaded(tmp_path, case, configs)
    before = {other: active(model, other) for other in model.peft_config}
    weights = dict(zip("abc", WEIGHTS[: len(configs)], strict=False))
    assert add_weighted_adapter(model, list(weights), list(weights.values()), "sum") == 0.0
    assert model.active_adapter != "sum"
    assert relative(active(model, "sum"), plain_sum(model, case, weights, tmp_path / "base")) <= TOLERANCE
    for other, expected in before.items():
        assert torch.equal(active(model, other), expected)


def test_a_tied_matrix_is_added_per_use_as_peft_uses_it(tmp_path: Path) -> None:
    """The merged model cannot say this: its two uses are one matrix. The sum of one adapter is that adapter."""
    model = loaded(tmp_path, Case("gpt2", {}), [{"target_modules": ["wte", "c_attn"]}, {"target_modules": ["lm_head"]}])
    for name in "ab":
        add_weighted_adapter(model, [name], [1.0], f"{name}{name}")
        assert relative(active(model, f"{name}{name}"), active(model, name)) <= TOLERANCE


@pytest.mark.parametrize("shape", [(9, 6, 20), (20, 5, 7), (8, 12, 30), (6, 4, 6)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_closest_change_of_a_rank_is_that_of_the_dense_svd(shape: tuple[int, int, int], rank: int) -> None:
    """Also where the factors have more columns than a side has rows."""
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(rank)
    low = LowRank(torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator))
    found, lost, whole = _closest(low, rank)
    left, values, right = torch.linalg.svd(dense(low), full_matrices=False)
    assert relative(dense(found), (left[:, :rank] * values[:rank]) @ right[:rank]) <= 1e-6
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-6)
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_truncated_sum_is_the_best_of_its_rank_and_its_error_is_told(rank: int, tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA])
    error = add_weighted_adapter(model, ["a", "b"], [0.7, -1.1], "sum")
    assert error == 0.0
    error = add_weighted_adapter(model, ["a", "b"], [0.7, -1.1], "short", rank=rank)
    vectors = task_vectors(model, ["sum", "short"])
    lost = best = whole = 0.0
    for name in vectors.names:
        exact, short = vectors.deltas(name)
        assert isinstance(short, LowRank) and short.rank <= rank
        lost += float((dense(exact) - dense(short)).square().sum())
        best += float(torch.linalg.svdvals(dense(exact))[rank:].square().sum())
        whole += float(dense(exact).square().sum())
    assert lost == pytest.approx(best, rel=1e-5)
    assert error == pytest.approx((best / whole) ** 0.5, rel=1e-5)


def test_a_rank_that_holds_the_sum_loses_nothing(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, DORA])
    assert add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum", rank=5) == 0.0


def test_an_adapter_that_is_given_twice_counts_twice(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    add_weighted_adapter(model, ["a", "a"], [2.0, -1.0], "same")
    assert relative(active(model, "same"), active(model, "a")) <= TOLERANCE


def test_half_precision_models_get_adapters_as_precise_as_their_sources(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA])
    exact = task_vectors(model).deltas("model.layers.0.self_attn.q_proj.weight")
    expected = sum(dense(delta) for delta in exact)
    base: Any = load_base(tmp_path / "base", Case("llama", {})).to(torch.bfloat16)
    half: Any = PeftModel.from_pretrained(base, str(tmp_path / "a"), adapter_name="a")
    half.load_adapter(str(tmp_path / "b"), adapter_name="b")
    add_weighted_adapter(half, ["a", "b"], [1.0, 1.0], "sum")
    found = task_vectors(half, ["sum"]).deltas("model.layers.0.self_attn.q_proj.weight")[0]
    assert relative(dense(found), torch.as_tensor(expected)) <= 1e-6


# PEFT's own method, where adding one adapter with weight 1 should give that adapter


def identity(model: Any, method: str, **words: Any) -> float:
    """How far adapter ``a`` is from 1 * a (+ 0 * b, which svd and cat need to be more than a copy)."""
    names, weights = (["a"], [1.0]) if method == "linear" else (["a", "b"], [1.0, 0.0])
    model.add_weighted_adapter(names, weights, "theirs", combination_type=method, **words)
    return relative(active(model, "theirs"), active(model, "a"))


WRONG = {
    "rslora": (Case("llama", {}), RSLORA),
    "lora_bias": (Case("bert", {}), BIAS),
    "dora": (Case("llama", {}), DORA),
}


@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
def test_pefts_own_sum_is_right_for_plain_lora(method: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, LORA])
    assert identity(model, method, **({"svd_rank": 6} if method == "svd" else {})) <= TOLERANCE


@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
@pytest.mark.parametrize("variant", sorted(WRONG))
def test_pefts_own_sum_is_wrong_where_ours_is_right(variant: str, method: str, tmp_path: Path) -> None:
    case, config = WRONG[variant]
    model = loaded(tmp_path, case, [config, config])
    assert identity(model, method, **({"svd_rank": 2 * config["r"]} if method == "svd" else {})) > 1e-2
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.0], "ours")
    assert relative(active(model, "ours"), active(model, "a")) <= TOLERANCE


def test_pefts_own_sum_is_wrong_for_kasa_which_ours_refuses_by_name(tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    base = make_base(tmp_path / "base", Case("llama", {}))
    model: Any = peft_model(base, Case("llama", Q | {"kasa_config": KasaConfig()}))
    perturb(model)
    model.add_weighted_adapter(["default"], [1.0], "theirs", combination_type="linear")
    assert relative(active(model, "theirs"), active(model, "default")) > 1e-2
    names = set(model.peft_config)
    with pytest.raises(CheckpointError, match="KasaLinearVariant"):
        add_weighted_adapter(model, ["default"], [1.0], "ours")
    assert set(model.peft_config) == names


# Refusals leave the model alone


def test_bad_arguments_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA])
    names, keys = set(model.peft_config), list(model.state_dict())
    bad: list[tuple[list[str], list[float], str, dict[str, Any], str]] = [
        ([], [], "c", {}, "0 adapters"),
        (["a", "b"], [1.0], "c", {}, "2 adapters but 1 weights"),
        (["a"], [float("nan")], "c", {}, "not a finite number"),
        (["a"], [1.0], "b", {}, '"b" already'),
        (["x"], [1.0], "c", {}, 'no adapter "x"'),
        (["a"], [1.0], "c", {"rank": 0}, "rank 0"),
    ]
    for adapters, weights, name, words, message in bad:
        with pytest.raises(ParameterError, match=message):
            add_weighted_adapter(model, adapters, weights, name, **words)
    assert set(model.peft_config) == names and list(model.state_dict()) == keys


def test_nan_in_an_adapter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA])
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["b"].weight.data[0, 0] = float("nan")
    keys = list(model.state_dict())
    with pytest.raises(CheckpointError, match=r'"b": .*layers.1.self_attn.q_proj.lora_A.weight holds 1 NaN'):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c")
    assert list(model.state_dict()) == keys


def test_sums_that_no_adapter_holds_are_refused_and_change_nothing(tmp_path: Path) -> None:
    cases = [
        (Case("bert", {}), [BIAS, {"target_modules": ["query"], "use_dora": True}], "LoRA biases cannot be added"),
        (Case("gpt2", {}), [{"target_modules": ["c_proj"], "use_dora": True}], "not low-rank"),
        (Case("vision", {}), [{"target_modules": ["wide"], "lora_bias": True}, {"target_modules": ["table"]}], "both"),
    ]
    for number, (case, configs, message) in enumerate(cases):
        model = loaded(tmp_path / str(number), case, configs)
        keys = list(model.state_dict())
        with pytest.raises(ParameterError, match=message):
            add_weighted_adapter(model, list("ab")[: len(configs)], [1.0, 1.0][: len(configs)], "sum")
        assert list(model.state_dict()) == keys and "sum" not in model.peft_config
