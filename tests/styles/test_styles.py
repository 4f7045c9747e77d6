"""A mix of styles is what the dense decomposition makes of them, weight by weight, whatever format they come in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.devec import Options, Pool, Side
from tvbases_hf.styles.diffusers_files import read_lora_file
from tvbases_hf.styles.mixed_file import read_recipe, write_mix
from tvbases_hf.styles.mixing import Recipe, Styles
from tvbases_hf.styles.scales import parse_scales
from zoo.lora_files import FLUX_SHAPES, SIDE, factors, kohya, write
from zoo.peft_models import relative
from zoo.pipelines import CONV, FLUX_MODULES, dense_unique, products, style

# The unique part is a difference in float32, relative to changes of order one.
EXACT = 1e-5


def total(changes: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(changes)).sum(0)


def mix(
    tmp_path: Path, states: Mapping[str, Any], recipe: Recipe | None = None, **how: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mixed file's changes by component and module, dense float64, and the report."""
    out = tmp_path / "mixed.safetensors"
    styles = Styles.open(states)
    scales = parse_scales(styles.names, how.pop("scales", None))
    found = write_mix(styles, recipe or Recipe(), scales, out, **how)
    read = read_lora_file(out)
    return {f"{c}.{module}": dense(delta) for c, own in read.items() for module, delta in own.items()}, found


def flux_styles(count: int, **how: Any) -> dict[str, dict[str, Tensor]]:
    return {name: style(seed, FLUX_MODULES, **how) for seed, name in enumerate("abcd"[:count])}


@pytest.mark.parametrize("count", [2, 3])
def test_the_mix_equals_the_dense_decomposition(count: int, tmp_path: Path) -> None:
    states = flux_styles(count)
    changes = [products(state) for state in states.values()]
    found, _ = mix(tmp_path, states)
    assert set(found) == set(changes[0])
    for module, delta in found.items():
        expected = total(dense_unique([own[module] for own in changes]))
        assert relative(delta, expected) <= EXACT
        assert relative(total(own[module] for own in changes), expected) > 0.1, "the plain sum is something else"


def test_styles_with_disjoint_column_spaces_are_mixed_unchanged(tmp_path: Path) -> None:
    states = flux_styles(2, common=0)
    found, report = mix(tmp_path, states)
    for module, delta in found.items():
        assert relative(delta, total(products(state)[module] for state in states.values())) <= EXACT
    assert report["shared"]["all"] == {"a": 0.0, "b": 0.0}
    assert "share nothing to speak of at threshold 0.85 (at most 0.0% of a style)" in report["notes"][0]


def test_identical_styles_have_an_empty_unique_part_and_the_message_says_so(tmp_path: Path) -> None:
    same = style(0, FLUX_MODULES)
    with pytest.raises(ParameterError, match=r"a, b: the unique component of every style is empty: 100.0% of each"):
        mix(tmp_path, {"a": same, "b": dict(same)})
    assert list(tmp_path.iterdir()) == []
    once, _ = mix(tmp_path, {"a": same, "b": dict(same)}, Recipe(shared_weight=1.0))
    for module, delta in products(same).items():
        assert relative(once[module], delta) <= EXACT, "one copy of what they share is the style itself"


def test_a_style_that_is_all_shared_is_named_and_the_others_stay(tmp_path: Path) -> None:
    state = style(0, FLUX_MODULES)
    longer = {}
    for name, tensor in state.items():  # the same directions, and more
        more = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9)) * 0.3
        longer[name] = torch.cat([tensor, more], dim=0 if "lora_A" in name else 1)
    _, report = mix(tmp_path, {"a": state, "longer": longer})
    assert '"a" is empty in this mix: all of it is shared with the other styles' in report["notes"]
    assert report["kept"]["longer"] > 0.1


@pytest.mark.parametrize("side", ["column", "row"])
@pytest.mark.parametrize("pool", ["joint", "iterative"])
def test_unique_and_shared_components_add_up_to_the_plain_sum(side: Side, pool: Pool, tmp_path: Path) -> None:
    states = flux_styles(3) if side == "column" else {n: _turned(s) for n, s in flux_styles(3).items()}
    options = Options(side=side, pool=pool)
    parts = {kind: mix(tmp_path, states, Recipe(kind, options))[0] for kind in ("unique", "shared", "full")}
    for module, full in parts["full"].items():
        assert relative(parts["unique"][module] + parts["shared"][module], full) <= EXACT
        assert relative(full, total(products(state)[module] for state in states.values())) <= EXACT
        assert float(parts["shared"][module].norm()) > 0.1 * float(full.norm())


def _turned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transposed changes, whose row spaces have directions in common."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        name.replace(part, other): tensor.T.contiguous()
        for name, tensor in state.items()
        for part, other in swap.items()
        if part in name
    }


def test_a_mix_is_linear_in_the_scales(tmp_path: Path) -> None:
    states = flux_styles(2)
    alone = {name: mix(tmp_path, states, scales={n: float(n == name) for n in states})[0] for name in states}
    both, report = mix(tmp_path, states, scales={"a": 0.5, "b": -1.2})
    for module, delta in both.items():
        assert relative(delta, 0.5 * alone["a"][module] - 1.2 * alone["b"][module]) <= EXACT
    assert report["scales"] == {"a": 0.5, "b": -1.2}
    assert all(t.shape[0] == 4 for n, t in _rows(tmp_path, states, {"a": 0.0}).items() if "lora_A" in n)


def _rows(tmp_path: Path, states: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Tensor]:
    mix(tmp_path, states, scales=scales)
    return load_file(tmp_path / "mixed.safetensors")


def test_one_copy_of_the_shared_change_is_the_norm_weighted_mean(tmp_path: Path) -> None:
    states = flux_styles(2)
    once, _ = mix(tmp_path, states, Recipe(shared_weight=1.0))
    changes = [products(state) for state in states.values()]
    for module, delta in once.items():
        whole = [own[module] for own in changes]
        unique = dense_unique(whole)
        shared = [w - u for w, u in zip(whole, unique, strict=True)]
        norms = torch.stack([s.norm() for s in shared])
        mean = total(n * s for n, s in zip(norms, shared, strict=True)) / norms.sum()
        assert relative(delta, total(unique) + mean) <= EXACT


def test_iterative_removes_what_two_of_three_styles_share(tmp_path: Path) -> None:
    states = flux_styles(2) | {"other": style(7, FLUX_MODULES, common=0)}
    joint, report = mix(tmp_path, states, pairs=True)
    assert max(report["shared"]["all"].values()) == 0
    assert 'pool "iterative" also removes what only two of them share' in report["notes"][0]
    assert report["pairs"]["a + b"] > 0.3 and report["pairs"]["a + other"] == 0
    apart, report = mix(tmp_path, states, Recipe(options=Options(pool="iterative")))
    assert report["shared"]["all"]["a"] > 0.3 and report["shared"]["all"]["other"] == 0
    for module, delta in apart.items():
        pair = dense_unique([products(states[name])[module] for name in "ab"])
        assert relative(delta, total(pair) + products(states["other"])[module]) <= EXACT
        assert relative(joint[module], delta) > 0.1


def test_the_report_says_the_share_of_the_squared_norm_by_block(tmp_path: Path) -> None:
    states = flux_styles(2)
    _, report = mix(tmp_path, states, pairs=True)
    changes = [products(state) for state in states.values()]
    for group in ("transformer_blocks.0", "single_transformer_blocks.0"):
        whole = shared = 0.0
        for module in (m for m in changes[0] if m.startswith(f"transformer.{group}.")):
            first = [own[module] for own in changes]
            whole += float(first[0].square().sum())
            shared += float((first[0] - dense_unique(first)[0]).square().sum())
        assert report["shared"][group]["a"] == pytest.approx(shared / whole, rel=1e-4)
    total = report["shared"]["all"]
    assert min(total.values()) <= report["pairs"]["a + b"] <= max(total.values())
    assert report["kept"]["a"] == pytest.approx(1 - total["a"], rel=1e-4)


def test_a_rank_rule_lets_leading_directions_count_alone(tmp_path: Path) -> None:
    """A weak direction that two styles share is shared by the numerical rank, and not by the rule."""
    states = {}
    for seed, name in enumerate("ab"):
        state = style(seed, {"x_embedder": (64, 32)}, rank=3, common=0)
        weak = 1e-3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(5))
        state["transformer.x_embedder.lora_A.weight"] = torch.eye(4, 32)
        state["transformer.x_embedder.lora_B.weight"] = torch.cat(
            [state["transformer.x_embedder.lora_B.weight"], weak], dim=1
        )
        states[name] = state
    assert mix(tmp_path, states)[1]["shared"]["all"]["a"] > 0
    ruled = Recipe(options=Options(factored_rank="energy:0.99"))
    assert mix(tmp_path, states, ruled)[1]["shared"]["all"]["a"] == 0


def test_a_weight_that_a_style_fills_is_left_whole_and_named(tmp_path: Path) -> None:
    states = {
        name: style(seed, {"proj_out": (16, 32), "x_embedder": (64, 32)}, rank=16) for seed, name in enumerate("ab")
    }
    found, report = mix(tmp_path, states)
    assert report["left_whole"] == ["transformer.proj_out"]
    assert any("1 of 2 weights were left whole" in note for note in report["notes"])
    expected = total(products(state)["transformer.proj_out"] for state in states.values())
    assert relative(found["transformer.proj_out"], expected) <= EXACT


def test_ranks_that_look_shared_by_chance_are_said(tmp_path: Path) -> None:
    states = {name: style(seed, {"x_embedder": (32, 64)}, rank=14, common=0) for seed, name in enumerate("ab")}
    _, report = mix(tmp_path, states)
    assert report["by_chance"]["transformer.x_embedder"] > 0
    assert any("random ones would share up to" in note for note in report["notes"])
    assert mix(tmp_path, flux_styles(2))[1]["by_chance"] == {}


def test_a_weight_that_one_style_changes_is_its_own(tmp_path: Path) -> None:
    states = flux_styles(2)
    more = style(5, {"context_embedder": (32, 48)})
    found, report = mix(tmp_path, {"a": states["a"] | more, "b": states["b"]})
    expected = products(more)["transformer.context_embedder"]
    assert relative(found["transformer.context_embedder"], expected) <= EXACT
    assert report["shared"]["other"] == {"a": 0.0}


def test_convolutions_keep_their_kernels(tmp_path: Path) -> None:
    states = {}
    for seed, name in enumerate("ab"):
        state = style(seed, {CONV: (32, 32 * 9)}, "unet")
        key = f"unet.{CONV}.lora_"
        state[f"{key}A.weight"] = state[f"{key}A.weight"].reshape(4, 32, 3, 3)
        state[f"{key}B.weight"] = state[f"{key}B.weight"].reshape(32, 4, 1, 1)
        states[name] = state
    found, _ = mix(tmp_path, states)
    stored = load_file(tmp_path / "mixed.safetensors")
    assert stored[f"unet.{CONV}.lora_A.weight"].shape == (8, 32, 3, 3)
    assert stored[f"unet.{CONV}.lora_B.weight"].shape == (32, 8, 1, 1)
    expected = dense_unique([products(state)[f"unet.{CONV}"] for state in states.values()])
    assert relative(found[f"unet.{CONV}"], total(expected)) <= EXACT


def test_biases_of_factors_are_added_with_the_scales(tmp_path: Path) -> None:
    states = flux_styles(2)
    states["b"]["transformer.transformer_blocks.0.attn.to_q.lora_B.bias"] = torch.arange(32.0)
    found, _ = mix(tmp_path, states, scales={"b": 2.0})
    assert torch.equal(found["transformer.transformer_blocks.0.attn.to_q.bias"], 2 * torch.arange(32).double())
    assert not found["transformer.single_transformer_blocks.0.proj_out.bias"].any(), "PEFT wants one for every module"


def test_half_precision_styles_make_a_half_precision_mix(tmp_path: Path) -> None:
    states = {n: {k: t.bfloat16() for k, t in s.items()} for n, s in flux_styles(2).items()}
    found, report = mix(tmp_path, states)
    assert report["dtype"] == "bfloat16"
    exact, _ = mix(tmp_path, states, dtype=torch.float32)
    for module, delta in found.items():
        assert 0 < relative(delta, exact[module]) <= 2**-8 * 2
    _, report = mix(tmp_path, {"a": states["a"], "b": flux_styles(2)["b"]})
    assert report["dtype"] == "float32"


# Formats


def in_diffusers_format(file: Path) -> dict[str, Tensor]:
    """The same changes under diffusers' names."""
    state = {}
    for component, own in read_lora_file(file).items():
        for module, delta in own.items():
            left, values, right = torch.linalg.svd(dense(delta), full_matrices=False)
            state[f"{component}.{module}.lora_A.weight"] = (values[:4, None] * right[:4]).float()
            state[f"{component}.{module}.lora_B.weight"] = left[:, :4].float().contiguous()
    return state


def kohya_style(seed: int) -> dict[str, Tensor]:
    """Alphas of 3, 4, 5, ... at rank 4, and up factors with two directions in common."""
    state = kohya(FLUX_SHAPES)
    for number, name in enumerate(sorted(n for n in state if "lora_up" in n)):
        own = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(100 * seed + number))
        state[name] = torch.cat([state[name][:, :2], own[:, 2:]], dim=1)
    return state


def xlabs_style(seed: int) -> dict[str, Tensor]:
    state = {}
    for number, name in enumerate(["double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.proj_lora2"]):
        rows = 3 * SIDE if "qkv" in name else SIDE
        down, up = factors(100 * seed + number, rows, SIDE)
        common = factors(50 + number, rows, SIDE)[1][:, :2]
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": torch.cat([common, up[:, 2:]], dim=1)}
    return state


@pytest.mark.parametrize("make", [kohya_style, xlabs_style])
def test_other_formats_give_the_mix_of_their_twins_in_diffusers_format(make: Any, tmp_path: Path) -> None:
    files, twins = {}, {}
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        files[name] = str(write(tmp_path / name, make(seed)))
        twins[name] = in_diffusers_format(Path(files[name]))
    found, report = mix(tmp_path, files)
    expected, _ = mix(tmp_path, twins)
    mixed, _ = mix(tmp_path, {"a": files["a"], "b": twins["b"]})
    assert 0.05 < report["shared"]["all"]["a"] < 0.95
    for module, delta in expected.items():
        assert relative(found[module], delta) <= EXACT
        assert relative(mixed[module], delta) <= EXACT, "formats may be mixed, too"


def test_a_peft_directory_is_a_style(tmp_path: Path) -> None:
    states = flux_styles(2)
    place = tmp_path / "peft"
    place.mkdir()
    write(place, {n.replace("transformer.", "base_model.model.", 1): t for n, t in states["a"].items()})
    (place / "style.safetensors").rename(place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    found, _ = mix(tmp_path, {"a": str(place), "b": states["b"]})
    for module, delta in found.items():
        pair = dense_unique([2 * products(states["a"])[module], products(states["b"])[module]])
        assert relative(delta, total(pair)) <= EXACT, "alpha 8 at rank 4 doubles"


# The file


def test_the_recipe_is_in_the_header(tmp_path: Path) -> None:
    options = Options(0.7, "mean")
    mix(tmp_path, flux_styles(2), Recipe("unique", options, 0.5), scales={"b": 1.2}, sources={"a": "a.safetensors"})
    recipe = read_recipe(tmp_path / "mixed.safetensors")
    assert recipe is not None
    assert recipe["styles"]["b"]["scale"] == 1.2 and recipe["styles"]["a"]["source"] == "a.safetensors"
    assert (recipe["component"], recipe["threshold"], recipe["subspace"]) == ("unique", 0.7, "mean")
    assert recipe["shared_weight"] == 0.5
    assert read_recipe(__file__) is None


def test_the_same_styles_make_the_same_file(tmp_path: Path) -> None:
    mix(tmp_path, flux_styles(3))
    first = (tmp_path / "mixed.safetensors").read_bytes()
    mix(tmp_path, flux_styles(3))
    assert (tmp_path / "mixed.safetensors").read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 1
