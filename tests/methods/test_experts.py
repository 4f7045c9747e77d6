"""Experts in one tensor are matrices, each merged as if it were alone; biases and kernels are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.algebra.layout import is_matrix, is_stack
from tvbases_hf.merging.apply import decomposed, merged
from tvbases_hf.methods.continual import orthogonal_sum, weight_sum
from tvbases_hf.methods.devec import Options, decompose
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.models.names import is_transposed
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint

EPS = torch.finfo(torch.float32).eps
NAME, SHAPE = "model.layers.0.mlp.experts.down_proj", (3, 24, 20)
OF_MATRICES = [name for name, method in METHODS.items() if method.of_matrices]
OPTIONS = {"devec_unique": {"rank": 8, "threshold": 0.05}}


def changes(shape: tuple[int, ...] = SHAPE, count: int = 3) -> list[Delta]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator)
    return [Dense(base + torch.randn(shape, generator=generator), base) for _ in range(count)]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e3 * EPS * expected.norm())


def vectors(name: str, shape: tuple[int, ...], others: dict[str, Tensor] | None = None) -> Vectors:
    base = {name: torch.zeros(shape), **(others or {})}
    tuned = [{**base, name: dense(delta).float()} for delta in changes(shape)]
    models = {f"t{index}": Checkpoint.from_state_dict(state) for index, state in enumerate(tuned)}
    return Vectors.of_models(Checkpoint.from_state_dict(base), models)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_stack_of_matrices_is_merged_as_the_matrices_one_by_one(name: str) -> None:
    method, weights, own = METHODS[name], [1.0, -0.5, 2.0], OPTIONS.get(name, {})
    found = dense(method.change(NAME, SHAPE, changes(), weights, own))
    alone = [[Dense(dense(delta)[i].float()) for delta in changes()] for i in range(SHAPE[0])]
    expected = torch.stack([dense(method.combine(part, weights, **own)) for part in alone])
    assert close(found, expected)
    kernel = dense(method.change("conv1.weight", SHAPE, changes(), weights, own))
    assert not close(kernel, expected)


def test_truncated_experts_are_the_dense_truncations() -> None:
    found = dense(METHODS["tsv_compress"].change(NAME, SHAPE, changes(), [1.0, -0.5, 2.0], {"rank": 4}))
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for delta, weight in zip(changes(), [1.0, -0.5, 2.0], strict=True):
        left, values, right = torch.linalg.svd(dense(delta), full_matrices=False)
        expected += weight * (left[..., :4] * values[:, None, :4]) @ right[:, :4]
    assert close(found, expected)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_biases_of_experts_are_vectors(name: str) -> None:
    shape, weights = (24, 20), [1.0, -0.5, 2.0]
    found = METHODS[name].change(f"{NAME}_bias", shape, changes(shape), weights, {})
    flat: list[Delta] = [Dense(dense(delta).float().reshape(-1)) for delta in changes(shape)]
    assert found.shape == shape
    assert close(dense(found).reshape(-1), dense(METHODS[name].combine(flat, weights)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_weights_of_no_dimension(name: str, dtype: torch.dtype) -> None:
    base = {"logit_scale": torch.tensor(2.0).to(dtype)}
    models = {f"t{i}": Checkpoint.from_state_dict({"logit_scale": torch.tensor(3.0 + i).to(dtype)}) for i in range(2)}
    found = merged(Vectors.of_models(Checkpoint.from_state_dict(base), models), name)("logit_scale")
    assert found.shape == () and 0 < float(dense(found)) <= 3


def test_the_continual_sum_takes_experts_one_by_one() -> None:
    old, new = changes(count=2)
    found = dense(weight_sum(NAME, SHAPE, old, new))
    pairs = [[Dense(dense(delta)[i].float()) for delta in (old, new)] for i in range(SHAPE[0])]
    assert close(found, torch.stack([dense(orthogonal_sum(*pair)) for pair in pairs]))
    assert not close(found, dense(old) + dense(new))
    kernel = weight_sum("conv1.weight", SHAPE, old, new)
    assert close(dense(kernel), dense(old) + dense(new))


def test_experts_are_decomposed_one_by_one_and_add_up() -> None:
    tasks, options = vectors(NAME, SHAPE), Options(rank=8, threshold=0.05)
    split = decomposed(tasks, NAME, options)
    deltas = tasks.deltas(NAME)
    for index in range(SHAPE[0]):
        alone = decompose([Dense(dense(delta)[index].float()) for delta in deltas], options)
        assert close(dense(split.combined)[index], dense(alone.combined))
    for shared, unique, delta in zip(split.shared, split.unique, deltas, strict=True):
        assert close(dense(shared) + dense(unique), dense(delta)) and dense(shared).norm() > 0


def test_columns_of_a_matrix_stored_in_out_are_its_output_directions() -> None:
    name, shape = "transformer.h.0.attn.c_attn.weight", (24, 72)
    tasks = vectors(name, shape, {name.replace("weight", "bias"): torch.zeros(72)})
    assert is_transposed(name, tasks.base)
    own = {"rank": 8, "threshold": 0.05}
    found = dense(merged(tasks, "devec_unique", **own)(name))
    turned: list[Delta] = [Dense(dense(delta).float().T.contiguous()) for delta in tasks.deltas(name)]
    expected = dense(METHODS["devec_unique"].combine(turned, [1.0] * 3, **own)).T
    assert close(found, expected)
    assert not close(dense(METHODS["devec_unique"].combine(tasks.deltas(name), [1.0] * 3, **own)), expected)


@pytest.mark.parametrize(("shapes", "transposed"), [(((24, 40), (20, 24)), True), (((40, 24), (24, 20)), False)])
def test_the_width_of_the_model_tells_how_experts_lie(shapes: tuple, transposed: bool) -> None:
    names = [NAME.replace("down", "gate_up"), NAME]
    state = {name: torch.zeros(2, *shape) for name, shape in zip(names, shapes, strict=True)}
    base = Checkpoint.from_state_dict(state)
    base.config["hidden_size"] = 24
    assert [is_transposed(name, base) for name in names] == [transposed] * 2


def test_names_tell_experts_from_kernels_and_tables() -> None:
    stacks = (NAME, "model.layers.1.block_sparse_moe.input_linear.weight", "layers.0.mlp.experts.fc1.weight")
    stacks += ("model.layers.1.moe.down_proj.weight", "model.llm.layers.0.mlp.shared_experts.shared_w2_weight")
    for name in stacks:
        assert is_stack(name, SHAPE)
    for name in ("conv1.weight", "layers.0.mixer.conv1d.weight", "embeddings.cls_token", "experts.conv.weight"):
        assert not is_stack(name, SHAPE)
    assert is_matrix("layers.0.mlp.experts.0.w1.weight", (4, 6)) and not is_matrix(f"{NAME}_bias", (4, 6))
