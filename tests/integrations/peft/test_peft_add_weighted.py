"""Adapters loaded in a PEFT model: added up exactly, where PEFT itself is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tvbases_hf.algebra.delta import LowRank, dense
from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_peft import add_weighted_adapter, task_vectors
from zoo.peft_models import Case, active, load_base, loaded, outputs, relative

TOLERANCE = 1e-5
Q = {"target_modules": ["q_proj", "k_proj"]}
LORA = Q | {"r": 3, "lora_alpha": 5}
RSLORA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True, "alpha_pattern": {"down_proj": 9}}
DORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "use_dora": True}
BIAS = {"target_modules": ["query", "dense"], "r": 2, "lora_bias": True}


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
    assert add_weighted_adapter(model, list(weights), list(weights.values()), "sum") <= 1e-7  # rounding of saved ones
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
    right = method != "svd" or tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)
    assert (identity(model, method, **({"svd_rank": 6} if method == "svd" else {})) <= TOLERANCE) == right


@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
@pytest.mark.parametrize("variant", sorted(WRONG))
def test_pefts_own_sum_is_wrong_where_ours_is_right(variant: str, method: str, tmp_path: Path) -> None:
    case, config = WRONG[variant]
    model = loaded(tmp_path, case, [config, config])
    assert identity(model, method, **({"svd_rank": 2 * config["r"]} if method == "svd" else {})) > 1e-2
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.0], "ours")
    assert relative(active(model, "ours"), active(model, "a")) <= TOLERANCE


# In the place of PEFT's own method


@pytest.mark.parametrize("method", ["svd", "linear", "cat"])
def test_it_takes_pefts_arguments_and_is_the_exact_sum(method: str, tmp_path: Path) -> None:
    case = Case("llama", {})
    model = loaded(tmp_path, case, [LORA, RSLORA])
    error = add_weighted_adapter(model, ["a", "b"], [0.7, -1.1], "sum", method)
    assert error == 0.0
    expected = plain_sum(model, case, {"a": 0.7, "b": -1.1}, tmp_path / "base")
    assert relative(active(model, "sum"), expected) <= TOLERANCE
    error = add_weighted_adapter(model, ["a", "b"], [0.7, -1.1], "short", "svd", 2, None, False, "gesvd")
    assert error > 0 and {layer.r["short"] for layer in layers_with(model, "short")} == {2}


def layers_with(model: Any, name: str) -> list[Any]:
    return [module for module in model.modules() if name in getattr(module, "lora_A", {})]


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "ties_svd", "magnitude_prune_svd"])
def test_pefts_methods_are_its_own_functions_of_the_changes(method: str, sign: str, tmp_path: Path) -> None:
    """At full rank nothing is truncated; of plain LoRA, whose scaling is 1, that is what PEFT's own method does."""
    plain = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 4}
    model = loaded(tmp_path, Case("llama", {}), [plain, plain])
    words: dict[str, Any] = {"svd_rank": 16, "density": 0.5, "majority_sign_method": sign}
    assert add_weighted_adapter(model, ["a", "b"], [1.0, 0.5], "ours", method, **words) <= 1e-6
    own = f"{method.removesuffix('_svd')}_svd"
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "theirs", combination_type=own, **words)
    assert relative(active(model, "ours"), active(model, "theirs")) <= TOLERANCE


def test_a_method_that_is_no_sum_takes_the_largest_rank_and_tells_what_it_loses(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA])
    assert add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum", "dare_ties", density=0.5) > 1e-3
    assert {layer.r["sum"] for layer in layers_with(model, "sum")} == {4}


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
        (["a", "b"], [1.0, 1.0], "c", {"combination_type": "tie"}, "did you mean ties"),
        (["a", "b"], [1.0, 1.0], "c", {"combination_type": "ties"}, "needs a density"),
        (
            ["a", "b"],
            [1.0, 1.0],
            "c",
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"},
            "total",
        ),
        (["a", "b"], [1.0, 1.0], "c", {"svd_clamp": 1}, "svd_clamp"),
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
        (Case("vision", {}), [{"target_modules": ["wide"], "lora_bias": True}, {"target_modules": ["table"]}], "both"),
    ]
    for number, (case, configs, message) in enumerate(cases):
        model = loaded(tmp_path / str(number), case, configs)
        keys = list(model.state_dict())
        with pytest.raises(ParameterError, match=message):
            add_weighted_adapter(model, list("ab")[: len(configs)], [1.0, 1.0][: len(configs)], "sum")
        assert list(model.state_dict()) == keys and "sum" not in model.peft_config
