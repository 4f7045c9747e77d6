"""Models of quantised weights through the commands: merged and written as the numbers that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from commands.command_line import refused, tvbases
from tvbases_hf import Basis, Vectors
from tvbases_hf.errors import ParameterError
from zoo.hf_models import State, fine_tunes, make_llama, read_state, save_state
from zoo.quantised import FLOAT8, declare, float8_blocks, int8_rows

Q = "model.layers.0.self_attn.q_proj.weight"
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """A Llama, its numbers and those of two fine-tunes."""
    plain = make_llama(tmp_path_factory.mktemp("llama"))
    base = read_state(plain)
    return plain, [base, *fine_tunes(base, 2, seed=1, size=0.1)]


def family(
    root: Path, states: tuple[Path, list[State]], method: Mapping[str, object], store: Callable[[State], State]
) -> list[Path]:
    plain, numbers = states
    paths = []
    for name, state in zip(("base", "a", "b"), numbers, strict=True):
        path = save_state(root / name, store(state), plain)
        declare(path, method)
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}), encoding="utf-8")
        paths.append(path)
    (paths[0] / "quantize_config.json").write_text("{}", encoding="utf-8")
    return paths


def recipe(root: Path, base: Path, models: list[Path], more: str = "") -> Path:
    lines = "".join(f"  - model: {model}\n    parameters: {{weight: 1.0}}\n" for model in models)
    file = root / "merge.yml"
    file.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{lines}{more}", encoding="utf-8")
    return file


def test_float8_blocks_merge_as_what_transformers_dequantises(states: tuple[Path, list[State]], tmp_path: Path) -> None:
    """Bit for bit in float32: the same merge of the models that from_pretrained(dequantize=True) gives, saved."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    base, *models = family(tmp_path, states, FLOAT8, float8_blocks)
    plain = []
    for path in (base, *models):
        config = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plain.append(save_state(tmp_path / f"{path.name}-plain", state, states[0]))
    for name, (first, *others) in {"out": [base, *models], "out-plain": plain}.items():
        outcome = tvbases("merge", recipe(tmp_path, first, others, "dtype: float32\n"), tmp_path / name, "--quiet")
        assert outcome.code == 0, outcome
    merged, expected = read_state(tmp_path / "out"), read_state(tmp_path / "out-plain")
    assert merged.keys() == expected.keys() == states[1][0].keys()
    assert all(torch.equal(merged[n], expected[n]) and merged[n].dtype == torch.float32 for n in expected)
    assert not torch.equal(merged[Q], read_state(plain[0])[Q])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()[Q], merged[Q])


def test_int8_models_merge_as_numbers_and_are_written_without_their_codes(
    states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    base, *models = family(tmp_path, states, INT8, int8_rows)
    outcome = tvbases("merge", recipe(tmp_path, base, models), tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome
    merged = read_state(tmp_path / "out")
    numbers = [s[Q].float() * s[Q.replace("weight", "SCB")][:, None] for s in map(read_state, (base, *models))]
    exact = (numbers[1] + numbers[2] - numbers[0]) / 127
    assert merged.keys() == states[1][0].keys() and merged[Q].dtype == torch.bfloat16
    assert (merged[Q].float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and not (tmp_path / "out" / "quantize_config.json").exists()


@pytest.mark.parametrize("command", ["compress", "inspect", "decompose", "negate"])
def test_every_command_reads_them(command: str, states: tuple[Path, list[State]], tmp_path: Path) -> None:
    base, *models = family(tmp_path, states, FLOAT8, float8_blocks)
    given: list[object] = ["--base", base, *(x for m in models for x in ("--task", f"{m.name}={m}")), "--quiet"]
    more = {
        "compress": ["-m", 1, "--out", tmp_path / "out"],
        "inspect": [],
        "decompose": ["--out", tmp_path / "out"],
        "negate": ["--forget", "a", "--alpha", 0.5, "--out", tmp_path / "out"],
    }[command]
    outcome = tvbases(command, *given, *more)
    assert outcome.code == 0, outcome
    for file in (tmp_path / "out").rglob("config.json"):
        written = read_state(file.parent)
        assert written.keys() == states[1][0].keys() and written[Q].dtype == torch.bfloat16
        assert "quantization_config" not in file.read_text()


def test_mergekit_is_not_given_codes(states: tuple[Path, list[State]], tmp_path: Path) -> None:
    base, *models = family(tmp_path, states, INT8, int8_rows)
    told = refused(tmp_path, "mergekit-yaml", recipe(tmp_path, base, models), tmp_path / "out", "--quiet")
    assert "14 weights are quantised" in told and "`tvbases merge`" in told and str(base) in told


def test_a_rounded_fine_tune_and_other_integers_are_said(states: tuple[Path, list[State]], tmp_path: Path) -> None:
    plain, (base, tuned, _) = states
    positions = {"model.position_ids": torch.arange(4)}
    first = save_state(tmp_path / "plain", base | positions, plain)
    other = save_state(tmp_path / "other", int8_rows(tuned) | {"model.position_ids": torch.zeros(4).long()}, plain)
    declare(other, INT8)
    outcome = tvbases("inspect", "--base", first, "--task", f"a={other}", "--task", f"b={first}")
    said = " ".join((outcome.out + outcome.err).split())
    assert '"a": quantised (bitsandbytes) and the base is not; its change holds the error' in said
    assert '"a": 1 tensors of integers differ from the base\'s (first: model.position_ids)' in said


# --- what is stored is finite -----------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj.weight"


def spoilt(root: Path, states: tuple[Path, list[State]], dtype: torch.dtype, values: list[float]) -> list[Path]:
    """A model and two fine-tunes in ``dtype``, with these numbers at one place."""
    paths = []
    for name, state, value in zip(("base", "a", "b"), states[1], values, strict=True):
        state = {n: tensor.to(dtype) for n, tensor in state.items()}
        state[DOWN][0, 0] = value
        paths.append(save_state(root / name, state, states[0]))
    return paths


def arguments(command: str, root: Path, base: Path, models: list[Path], more: str = "") -> list[object]:
    if command in ("merge", "mergekit-yaml"):
        return [command, recipe(root, base, models, more), root / "out", "--quiet"]
    given: list[object] = [command, "--base", base, *(x for m in models for x in ("--task", f"{m.name}={m}"))]
    extra = ["--forget", "a", "--alpha", 1] if command.startswith("negate") else []
    return [*given, *extra, "--out", root / "out", "--quiet"]


@pytest.mark.parametrize("command", ["merge", "mergekit-yaml", "negate"])
def test_a_sum_that_does_not_fit_into_float16_is_not_written(
    command: str, states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    values = [60000.0, 40000.0 if command == "negate" else 64000.0, 64000.0]
    base, *models = spoilt(tmp_path, states, torch.float16, values)
    told = refused(tmp_path, *arguments(command, tmp_path, base, models))
    assert (
        f"of 1536 numbers {'' if command == 'mergekit-yaml' else f'of {DOWN} '}are infinite or NaN as float16" in told
    )
    assert DOWN in told and "bfloat16 or float32" in told


@pytest.mark.parametrize("command", ["decompose", "restore"])
def test_a_float32_change_of_a_float16_base_is_not_written_as_infinity(
    command: str, states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    base = save_state(tmp_path / "base", {n: t.half() for n, t in states[1][0].items()}, states[0])
    norm = "model.norm.weight"
    models = [
        save_state(tmp_path / name, state | {norm: torch.full_like(state[norm], 1e5)}, states[0])
        for name, state in zip("ab", states[1][1:], strict=True)
    ]
    told = rf'"{base}" with its change: 32 of 32 numbers of {norm} are infinite or NaN as float16'
    if command == "decompose":
        assert re.search(told, refused(tmp_path, *arguments(command, tmp_path, base, models)))
        return
    vectors = Vectors.open(base, {"a": models[0], "b": models[1]})
    basis = Basis.build(vectors, 1, dtype=torch.float32)
    with pytest.raises(ParameterError, match=told):
        basis.restore("a", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_float32_model_that_does_not_fit_into_float16_is_not_written(
    states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    base, *models = spoilt(tmp_path, states, torch.float32, [1e5, 1e5, 1e5])
    told = refused(tmp_path, *arguments("merge", tmp_path, base, models, "dtype: float16\n"))
    assert f"1 of 1536 numbers of {DOWN} are infinite or NaN as float16" in told
    outcome = tvbases(*arguments("merge", tmp_path, base, models, "dtype: bfloat16\n"))
    assert outcome.code == 0, outcome


@pytest.mark.parametrize("command", ["merge", "negate", "decompose", "compress"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoils", [0, 1])
def test_nan_and_infinity_in_a_model_are_named(
    command: str, value: float, spoils: int, states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    values = [0.5, 0.5, 0.5]
    values[spoils] = value
    paths = spoilt(tmp_path, states, torch.float32, values)
    given = arguments(command, tmp_path, paths[0], paths[1:])
    told = refused(tmp_path, *given, *(["-m", 1] if command == "compress" else []))
    assert f'"{paths[spoils]}": tensor {DOWN} holds 1 NaN or infinite numbers of 1536' in told


@pytest.mark.parametrize("command", ["merge", "negate", "decompose", "compress"])
def test_infinities_that_all_models_hold_are_no_change(
    command: str, states: tuple[Path, list[State]], tmp_path: Path
) -> None:
    """Masks are stored so by some architectures."""
    base, *models = spoilt(tmp_path, states, torch.float32, [-float("inf")] * 3)
    given = arguments(command, tmp_path, base, models)
    outcome = tvbases(*given, *(["-m", 1] if command == "compress" else []))
    assert outcome.code == 0, outcome
    for file in (tmp_path / "out").rglob("model.safetensors"):
        written = read_state(file.parent)[DOWN]
        assert written[0, 0] == -float("inf") and torch.isfinite(written.flatten()[1:]).all()
