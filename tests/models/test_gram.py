"""The Gram matrix of task vectors: what it does not depend on, what it leaves out, what it warns of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors, gram_matrix
from tvbases_hf.algebra import blocks as blocks_module
from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.gram import Gram
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import SHAPES, dense_task_matrix, random_models, random_state, save_checkpoint, tune

EPS = torch.finfo(torch.float64).eps


def close(found: Tensor, matrix: Tensor) -> bool:
    """Whether ``found`` is matrix^T matrix up to rounding: eps sqrt(d) of the product of the lengths."""
    sizes = matrix.norm(dim=0)
    bound = 10 * EPS * len(matrix) ** 0.5 * torch.outer(sizes, sizes)
    return bool(((found - matrix.T @ matrix).abs() <= bound).all())


def in_memory(base: dict[str, Tensor], states: dict[str, dict[str, Tensor]]) -> Vectors:
    models = {task: Checkpoint.from_state_dict(state, task) for task, state in states.items()}
    return Vectors.of_models(Checkpoint.from_state_dict(base, "base"), models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_gram_is_that_of_the_stored_numbers(tmp_path: Path, dtype: torch.dtype, shards: int, kind: str) -> None:
    models = random_models(tmp_path, dtype=dtype, shards=shards, kind=kind)
    gram = gram_matrix(models.vectors())
    assert gram.tasks == tuple(models.tasks)
    assert gram.matrix.dtype == torch.float64
    assert close(gram.matrix, dense_task_matrix(models.base_state, models.states))


def test_gram_does_not_depend_on_how_the_same_numbers_are_stored(tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16)
    states = {f"task{i}": tune(base, i) for i in range(3)}  # numbers that all three dtypes hold exactly
    matrix = dense_task_matrix(base, states)
    layouts = [
        (torch.bfloat16, "safetensors", 1),
        (torch.float32, "safetensors", 3),
        (torch.float64, "bin", 1),
        (torch.bfloat16, "bin", 3),
    ]
    for index, (dtype, kind, shards) in enumerate(layouts):
        paths = {
            name: save_checkpoint(
                tmp_path / str(index) / name,
                {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()},
                kind=kind,
                shards=shards,
            )
            for name, state in {"base": base, **states}.items()
        }
        assert close(gram_matrix(Vectors.open(paths.pop("base"), paths)).matrix, matrix)


def test_every_model_may_be_stored_in_a_way_of_its_own(tmp_path: Path) -> None:
    base = random_state(0, torch.float16)
    states = {f"task{i}": tune(base, i) for i in range(3)}
    states["task1"] = {n: t.float() if t.is_floating_point() else t for n, t in states["task1"].items()}
    paths = {
        "task0": save_checkpoint(tmp_path / "0", states["task0"], kind="bin"),
        "task1": save_checkpoint(tmp_path / "1", states["task1"], shards=4),
        "task2": save_checkpoint(tmp_path / "2", states["task2"]),
    }
    vectors = Vectors.open(save_checkpoint(tmp_path / "base", base, shards=2, kind="bin"), paths)
    assert close(gram_matrix(vectors).matrix, dense_task_matrix(base, states))


@pytest.mark.parametrize("block", [1, 7, 100, 10**6])
def test_gram_does_not_depend_on_the_block_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (13, 5), "b": (7,), "c": ()}
    base = random_state(1, shapes=shapes)
    states = {f"task{i}": tune(base, i) for i in range(3)}
    monkeypatch.setattr(blocks_module, "BLOCK_NUMBERS", block)
    gram = gram_matrix(in_memory(base, states))
    assert close(gram.matrix, dense_task_matrix(base, states))
    expected = sum(float(t.double().square().sum()) for t in base.values() if t.is_floating_point()) ** 0.5
    assert gram.base_norm == pytest.approx(expected, rel=100 * EPS)


def test_permuting_the_tasks_permutes_the_gram_matrix() -> None:
    base = random_state(2)
    states = {f"task{i}": tune(base, i) for i in range(4)}
    order = [2, 0, 3, 1]
    gram = gram_matrix(in_memory(base, states)).matrix
    permuted = gram_matrix(in_memory(base, {f"task{i}": states[f"task{i}"] for i in order})).matrix
    assert torch.allclose(permuted, gram[order][:, order], rtol=100 * EPS, atol=0)


def test_integer_buffers_carry_no_task_vector() -> None:
    base = random_state(3)
    states = {"a": tune(base, 0), "b": tune(base, 1)}
    expected = gram_matrix(in_memory(base, states)).matrix
    states["a"]["model.position_ids"] = states["a"]["model.position_ids"] + 1000
    assert torch.equal(gram_matrix(in_memory(base, states)).matrix, expected)
    states["a"]["model.norm.weight"] = states["a"]["model.norm.weight"] + 1  # a weight would have been noticed
    assert not torch.equal(gram_matrix(in_memory(base, states)).matrix, expected)


def tied_models(directory: Path, tied: bool) -> Vectors:
    """Models whose output matrix is stored although it is the embedding, or is one of its own."""
    config = {"model_type": "small", "tie_word_embeddings": tied}
    base = random_state(4)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    paths = {}
    for name in ("base", "a", "b"):
        state = base if name == "base" else tune(base, ord(name))
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        paths[name] = save_checkpoint(directory / name, state, config=config)
    return Vectors.open(paths.pop("base"), paths)


def test_a_tied_output_matrix_counts_once(tmp_path: Path) -> None:
    tied, untied = tied_models(tmp_path / "tied", True), tied_models(tmp_path / "untied", False)
    assert "lm_head.weight" not in tied.names
    assert "lm_head.weight" in untied.names
    embedding = SHAPES["model.embed_tokens.weight"]
    assert untied.numel - tied.numel == embedding[0] * embedding[1]
    assert (gram_matrix(untied).norms > gram_matrix(tied).norms).all()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_share_their_storage_count_once(tmp_path: Path, kind: str) -> None:
    """torch.save writes tied weights as one storage; a safetensors file holds one of the two names."""
    shared, single = {}, {}
    for seed, name in enumerate(("base", "a", "b")):
        state = random_state(0, shapes={"embed.weight": (6, 4), "layer.weight": (4, 4)})
        state = state if name == "base" else tune(state, seed)
        single[name] = save_checkpoint(tmp_path / "single" / name, state)
        state = {**state, "head.weight": state["embed.weight"]} if kind == "bin" else state
        shared[name] = save_checkpoint(tmp_path / "shared" / name, state, kind=kind)
    grams = [gram_matrix(Vectors.open(paths.pop("base"), paths)) for paths in (shared, single)]
    assert torch.allclose(grams[0].matrix, grams[1].matrix, rtol=100 * EPS, atol=0)


def test_tensors_absent_in_a_model_count_as_unchanged_and_are_reported() -> None:
    base = random_state(5)
    states = {"a": tune(base, 0), "b": tune(base, 1)}
    del states["a"]["model.layers.0.mlp.up_proj.weight"], states["a"]["model.norm.weight"]
    vectors = in_memory(base, states)
    full = {**states, "a": {**base, **states["a"]}}
    assert close(gram_matrix(vectors).matrix, dense_task_matrix(base, full))
    (note,) = vectors.coverage.notes()
    assert '"a": 2 tensors' in note and "up_proj" in note and "unchanged" in note


def test_tensors_that_the_base_lacks_are_left_out_and_reported() -> None:
    base = random_state(6)
    states = {"a": tune(base, 0), "b": tune(base, 1)}
    expected = gram_matrix(in_memory(base, states)).matrix
    states["b"]["classifier.weight"] = torch.ones(3, 16)
    vectors = in_memory(base, states)
    assert torch.equal(gram_matrix(vectors).matrix, expected)
    (note,) = vectors.coverage.notes()
    assert '"b": 1 tensors are not in the base (first: classifier.weight)' in note


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "task1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_named_with_their_tensor_and_model(
    tmp_path: Path, bad: float, where: str, dtype: torch.dtype
) -> None:
    base = random_state(7, dtype)
    states = {f"task{i}": tune(base, i) for i in range(3)}
    damaged = base if where == "base" else states[where]
    damaged["model.layers.0.mlp.up_proj.weight"].reshape(-1)[5:8] = bad
    paths = {n: save_checkpoint(tmp_path / n, s) for n, s in {"base": base, **states}.items()}
    vectors = Vectors.open(paths.pop("base"), paths)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 3 NaN or infinite numbers of 640") as caught:
        gram_matrix(vectors)
    assert f'/{where}"' in str(caught.value)
    assert "earlier checkpoint" in str(caught.value)


def test_numbers_too_large_for_float64_are_refused() -> None:
    base = {"w": torch.zeros(4, dtype=torch.float64)}
    states = {"a": {"w": torch.full((4,), 1e200, dtype=torch.float64)}}
    with pytest.raises(CheckpointError, match="tensor w: its inner products overflow"):
        gram_matrix(in_memory(base, states))


def test_eight_bit_floats_have_task_vectors_and_nan(tmp_path: Path) -> None:
    base = {"w": torch.randn(8, 4).to(torch.float8_e4m3fn)}
    states = {"a": {"w": (base["w"].float() + 1).to(torch.float8_e4m3fn)}}
    assert close(gram_matrix(in_memory(base, states)).matrix, dense_task_matrix(base, states))
    states["a"]["w"].view(torch.uint8)[0, 0] = 0x7F  # NaN in this format
    with pytest.raises(CheckpointError, match='"a": tensor w holds 1 NaN'):
        gram_matrix(in_memory(base, states))


# --- lengths and warnings ---------------------------------------------------------------------------------------------


def test_norms_ratios_and_cosines_are_those_of_the_vectors() -> None:
    base = random_state(8)
    states = {"a": tune(base, 0), "b": tune(base, 1, size=0.02), "c": base}
    gram = gram_matrix(in_memory(base, states))
    matrix = dense_task_matrix(base, states)
    norms = matrix.norm(dim=0)
    whole = sum(float(t.double().square().sum()) for t in base.values() if t.is_floating_point()) ** 0.5
    assert torch.allclose(gram.norms, norms, rtol=100 * EPS, atol=0)
    assert gram.norm_ratios is not None
    assert torch.allclose(gram.norm_ratios, norms / whole, rtol=100 * EPS, atol=0)
    cosine = (matrix[:, 0] @ matrix[:, 1]) / norms[0] / norms[1]
    assert float(gram.cosine[0, 1]) == pytest.approx(float(cosine), abs=100 * EPS)
    assert gram.cosine.diagonal().tolist() == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("size", [0.001, 0.01, 0.04])
def test_fine_tunes_of_this_base_bring_no_warning(size: float) -> None:
    base = random_state(9)
    states = {f"task{i}": tune(base, i, size * (1 + i)) for i in range(2)} | {"task2": tune(base, 2, size)}
    assert gram_matrix(in_memory(base, states)).warnings() == []


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_fine_tune_of_another_base_is_named(others: int) -> None:
    base = random_state(10)
    states = {f"task{i}": tune(base, i) for i in range(others)} | {"foreign": tune(random_state(11), 5)}
    (warning,) = gram_matrix(in_memory(base, states)).warnings()
    assert '"foreign"' in warning and "another base" in warning and "%" in warning
    assert ("the others" in warning) == (others > 0)


def test_a_task_vector_much_longer_than_the_others_is_named() -> None:
    base = random_state(12)
    states = {f"task{i}": tune(base, i, 0.002) for i in range(3)} | {"long": tune(base, 7, 0.03)}
    (warning,) = gram_matrix(in_memory(base, states)).warnings()
    assert '"long"' in warning


def far(base: dict[str, Tensor], seed: int, ratio: float) -> dict[str, Tensor]:
    """A model whose change has a random direction and ``ratio`` of the base's norm."""
    return tune(base, seed, ratio * (whole(base) / count(base)) ** 0.5)


def whole(state: dict[str, Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in state.values() if t.is_floating_point())


def count(state: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in state.values() if t.is_floating_point())


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.8])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_small_models_that_are_all_trained_far_bring_no_warning(tasks: int, ratio: float) -> None:
    base = random_state(14)
    gram = gram_matrix(in_memory(base, {f"task{i}": far(base, i, ratio * (1 + i / 8)) for i in range(tasks)}))
    assert gram.norm_ratios is not None and float(gram.norm_ratios.min()) > 0.1
    assert gram.warnings() == []


@pytest.mark.parametrize("tasks", [2, 4])
def test_fine_tunes_that_are_all_of_another_base_are_all_named(tasks: int) -> None:
    other = random_state(15)
    lines = gram_matrix(in_memory(random_state(16), {f"task{i}": tune(other, i) for i in range(tasks)})).warnings()
    assert [line.split('"')[1] for line in lines] == [f"task{i}" for i in range(tasks)]
    assert all("another base" in line and "cosine with the base is" in line for line in lines)


def test_cosines_with_the_base_are_those_of_the_whole_models() -> None:
    base = random_state(17)
    states = {"near": tune(base, 0), "far": far(base, 1, 0.7), "foreign": random_state(18), "copy": base}
    found = gram_matrix(in_memory(base, states)).base_cosine
    assert found is not None
    for task, state in states.items():
        inner = sum(float((base[n].double() * t.double()).sum()) for n, t in state.items() if t.is_floating_point())
        cosine = inner / (whole(base) * whole(state)) ** 0.5
        assert float(found[list(states).index(task)]) == pytest.approx(cosine, abs=100 * EPS)


def test_a_model_given_twice_is_named_and_a_near_one_is_not() -> None:
    base = random_state(19)
    first = tune(base, 0)
    near = {name: tensor.clone() for name, tensor in first.items()}
    near["model.norm.weight"][3] += 1e-4
    gram = gram_matrix(in_memory(base, {"a": first, "near": near, "b": first, "c": tune(base, 1), "d": first}))
    assert [line.split('"')[1::2] for line in gram.warnings()] == [["b", "a"], ["d", "a"]]
    assert all("counts twice" in line for line in gram.warnings())


def test_a_model_equal_to_the_base_is_named() -> None:
    base = random_state(13)
    (warning,) = gram_matrix(in_memory(base, {"a": tune(base, 0), "copy": base})).warnings()
    assert '"copy" equals the base' in warning
    assert gram_matrix(in_memory(base, {"a": tune(base, 0), "b": tune(base, 1)})).warnings() == []


def test_a_base_of_zeros_has_no_ratios_to_warn_of() -> None:
    gram = Gram(("a", "b"), torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64), 0.0)
    assert not any("inf" in line or "nan" in line for line in gram.warnings())
