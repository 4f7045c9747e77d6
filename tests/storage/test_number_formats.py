"""Quantised weights are read as the numbers that they stand for, bit for bit as the format's owner computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors
from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import Run, using
from zoo.models import random_state, save_checkpoint
from zoo.quantised import MODULE, Recorded, packed, recorded

CASES = recorded()
WEIGHT = f"{MODULE}.weight"


def opened(directory: Path, state: dict[str, Tensor], method: dict[str, Any] | None, **config: object) -> Checkpoint:
    named = {"quantization_config": method} if method is not None else {}
    return Checkpoint.open(save_checkpoint(directory, state, config={**named, **config}))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_what_its_library_computes(case: str, tmp_path: Path) -> None:
    model = Checkpoint.open(CASES[case].save(tmp_path))
    expected, found = CASES[case].expected, model.read(WEIGHT)
    assert set(model.tensors) == {WEIGHT, "model.norm.weight"}
    assert (model.tensors[WEIGHT].shape, model.tensors[WEIGHT].dtype) == (tuple(expected.shape), expected.dtype)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert model.copied(WEIGHT) == expected.nbytes and model.copied("model.norm.weight") == 0


@pytest.mark.parametrize("case", [case for case in CASES if "float8" not in case])
def test_the_names_and_shapes_alone_tell_the_format(case: str, tmp_path: Path) -> None:
    """Also where the configuration has lost its quantization_config; of float8, blocks are then equal ones."""
    bare = Recorded(CASES[case].stored, CASES[case].expected, {})
    found = Checkpoint.open(bare.save(tmp_path)).read(WEIGHT)
    assert torch.equal(found.float(), CASES[case].expected.float())


def test_pieces_of_large_weights_agree_with_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 37):
        monkeypatch.setattr("tvbases_hf.storage.quantised.weight.CHUNK_NUMBERS", chunk)
        for case, one in CASES.items():
            model = Checkpoint.open(one.save(tmp_path / f"{case}{chunk}"))
            assert torch.equal(model.read(WEIGHT), one.expected), case


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((48, 32), (3, 2), [16, 16]),
        ((48, 32), (1, 1), None),
        ((48, 32), (48, 1), None),
        ((3, 48, 32), (3, 3, 2), None),
    ],
    ids=["blocks", "one", "rows", "experts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_float8_is_what_transformers_dequantises(
    shape: tuple[int, ...], grid: tuple[int, ...], block: list[int] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(110, 140, grid, generator=generator, dtype=torch.uint8)
    scales = exponents.view(dtype) if dtype.itemsize == 1 else torch.rand(grid, generator=generator).to(dtype)
    method = {"quant_method": "fp8", "weight_block_size": block}
    model = opened(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}, method)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(model.read(WEIGHT), expected)


def test_blocks_at_the_edge_may_be_smaller(tmp_path: Path) -> None:
    codes, scales = torch.randn(20, 10).to(torch.float8_e4m3fn), torch.rand(2, 2)
    method = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    model = opened(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}, method)
    grid = scales.repeat_interleave(16, 0)[:20].repeat_interleave(8, 1)[:, :10]
    assert torch.equal(model.read(WEIGHT), codes.float() * grid)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale", "qscale_weight", "scale_weight"])
def test_one_scale_may_have_any_of_its_names_and_no_configuration(name: str, tmp_path: Path) -> None:
    codes, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.tensor(0.3)
    state = {WEIGHT: codes, f"{MODULE}.{name}": scale, f"{MODULE}.input_scale": torch.tensor(2.0)}
    model = opened(tmp_path, state, None)
    assert set(model.tensors) == {WEIGHT} and torch.equal(model.read(WEIGHT), codes.float() * 0.3)


def test_mxfp4_is_what_transformers_dequantises(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 10, 2), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 10)}
    model = opened(tmp_path, state, {"quant_method": "mxfp4"})
    assert set(model.tensors) == {name, f"{name}_bias"}
    assert torch.equal(bits(model.read(name)), bits(convert_moe_packed_tensors(blocks, scales)))


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_is_scales_times_codes_less_zero_points(width: int, layout: str, tmp_path: Path) -> None:
    """W[j, i] = s[g(i), j] (q[i, j] - z[g(i), j]) with groups in any order; the first layout stores z - 1."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, groups, codes = 32, 16, 4, 2**width
    q = torch.randint(0, codes, (inputs, outputs), generator=generator)
    z = torch.randint(0, codes, (groups, outputs), generator=generator)
    s = torch.rand(groups, outputs, generator=generator).half()
    order = torch.randint(0, groups, (inputs,), generator=generator)
    less = 1 if layout == "gptq" else 0
    state = {
        "qweight": packed(q.T, width).T.contiguous(),
        "qzeros": packed((z - less) % codes, width),
        "scales": s,
        "g_idx": order.int(),
        "bias": torch.zeros(outputs),
    }
    method = {"quant_method": "gptq", "bits": width, "checkpoint_format": layout}
    model = opened(tmp_path, {f"{MODULE}.{end}": tensor for end, tensor in state.items()}, method)
    expected = (s[order] * (q - z[order])).T
    assert set(model.tensors) == {WEIGHT, f"{MODULE}.bias"} and torch.equal(model.read(WEIGHT), expected)


def test_float8_without_any_scale_is_numbers(tmp_path: Path) -> None:
    values = torch.randn(6, 4).to(torch.float8_e4m3fn)
    model = opened(tmp_path, {WEIGHT: values}, None, model_type="llama")
    assert not model.quantised and torch.equal(bits(model.read(WEIGHT)), bits(values))


def test_a_configuration_that_is_left_over_changes_nothing(tmp_path: Path) -> None:
    state = random_state(0)
    model = opened(tmp_path, state, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert set(model.tensors) == set(state) and not model.quantised


def test_the_fingerprint_is_that_of_the_codes(tmp_path: Path) -> None:
    case = CASES["bitsandbytes nf4"]
    first = Checkpoint.open(case.save(tmp_path / "a")).fingerprint()
    other = case.stored | {"weight.absmax": case.stored["weight.absmax"] * 2}
    assert Checkpoint.open(case.save(tmp_path / "b")).fingerprint() == first
    assert Checkpoint.open(Recorded(other, case.expected, case.method).save(tmp_path / "c")).fingerprint() != first


# --- what is written, and the memory that it takes --------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "dtype"), [("float16", torch.float16), ("float32", torch.bfloat16)])
def test_dequantised_weights_are_written_as_a_16_bit_float(declared: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Checkpoint.open(CASES["bitsandbytes int8"].save(tmp_path, torch_dtype=declared))
    assert model.written()[WEIGHT].dtype == dtype and model.written()["model.norm.weight"].dtype == torch.float32
    assert {info.dtype for info in model.written(torch.float32).values()} == {torch.float32}


def test_the_copies_of_dequantised_weights_count_against_the_memory(tmp_path: Path) -> None:
    """The base and two models, in float32 each."""
    state = {WEIGHT: torch.randn(3000, 1000).to(torch.float8_e4m3fn), f"{WEIGHT}_scale": torch.tensor(0.01)}
    paths = [save_checkpoint(tmp_path / name, state, config={}) for name in ("base", "a", "b")]
    vectors = Vectors.open(paths[0], {"a": paths[1], "b": paths[2]})
    copies = 3 * 3000 * 1000 * 4
    assert vectors.copied(WEIGHT) == copies
    with using(Run(memory=copies)), pytest.raises(ParameterError, match=f"{WEIGHT} takes about .* of memory"):
        gram_matrix(vectors)
    with using(Run(memory=copies + (1 << 25))):
        assert gram_matrix(vectors).matrix.abs().max() == 0


# --- what is refused --------------------------------------------------------------------------------------------------

INT8 = torch.ones(8, 4, dtype=torch.int8)
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "unknown integers": ({"weight": INT8}, None, r"an unknown format, int8 \[8, 4\]"),
    "hqq": ({"W_q": INT8.to(torch.uint8)}, {"quant_method": "hqq"}, r"hqq, uint8 \[8, 4\]"),
    "bitnet": ({"weight": INT8.to(torch.uint8), "weight_scale": torch.ones(1)}, {"quant_method": "bitnet"}, "bitnet"),
    "nvfp4": (
        {"weight_packed": INT8.to(torch.uint8), "weight_scale": torch.ones(8, 1), "weight_global_scale": torch.ones(1)},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "compressed-tensors nvfp4-pack-quantized",
    ),
    "float8 without scale": (
        {"weight": INT8.to(torch.float8_e4m3fn)},
        {"quant_method": "fp8"},
        r"fp8, float8_e4m3fn \[8, 4\]",
    ),
    "scales without codes": (
        {"weight": torch.ones(8, 4).to(torch.float8_e8m0fnu)},
        None,
        r"an unknown format, float8_e8m0fnu \[8, 4\]",
    ),
    "float8 with odd scales": (
        {"weight": INT8.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 3)},
        {"quant_method": "fp8"},
        r"\[8, 4\] float8 codes with \[3, 3\] scales",
    ),
    "gptq of 3 bits": (
        {"qweight": torch.ones(3, 32).int(), "qzeros": torch.ones(1, 3).int(), "scales": torch.ones(1, 32).half()},
        {"quant_method": "gptq", "bits": 3},
        "gptq, gptq, 3 bits",
    ),
    "marlin": (
        {"qweight": torch.ones(4, 8).int(), "qzeros": torch.ones(1, 1).int(), "scales": torch.ones(1, 8).half()},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "gptq, marlin, 4 bits",
    ),
    "awq gemv": (
        {"qweight": torch.ones(8, 1).int(), "qzeros": torch.ones(1, 1).int(), "scales": torch.ones(1, 8).half()},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "awq, gemv, 4 bits",
    ),
    "codes without zero points": ({"qweight": torch.ones(4, 8).int()}, {"quant_method": "gptq"}, "without scales or"),
    "columns of one GPU": (
        {"weight": INT8, "SCB": torch.ones(8), "weight_format": torch.tensor(2, dtype=torch.uint8)},
        None,
        "a layout of one GPU type",
    ),
    "damaged state": (
        {"weight": INT8.to(torch.uint8), "weight.quant_state.bitsandbytes__nf4": torch.tensor([1], dtype=torch.uint8)},
        None,
        "damaged quant_state",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_codes_that_cannot_be_read_are_refused_by_name(case: str, tmp_path: Path) -> None:
    state, method, told = REFUSED[case]
    config = {"model_type": "llama"} | ({} if method is None else {"quantization_config": method})
    save_checkpoint(tmp_path, {f"{MODULE}.{end}": tensor for end, tensor in state.items()}, config=config)
    with pytest.raises(CheckpointError, match=rf'"{tmp_path}": {MODULE}.* is quantised \(.*{told}.*dequantize'):
        Checkpoint.open(tmp_path)


def test_the_transpose_that_bitsandbytes_keeps_of_gpt2_is_refused(tmp_path: Path) -> None:
    for case in ("bitsandbytes nf4", "bitsandbytes int8"):
        CASES[case].save(tmp_path / case, model_type="gpt2")
        with pytest.raises(CheckpointError, match="gpt2 model, which keeps the transpose"):
            Checkpoint.open(tmp_path / case)


def test_a_file_beside_the_configuration_may_name_the_format(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {WEIGHT: INT8.to(torch.float8_e4m3fn)}, config={"model_type": "llama"})
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="gptq, float8"):
        Checkpoint.open(tmp_path)
