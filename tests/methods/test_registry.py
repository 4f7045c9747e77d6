"""Methods declared once: what the signature says is what is checked; and the laws that all methods obey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS, Method, find_method, method
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint

EPS = torch.finfo(torch.float32).eps
SHAPE = (24, 20)
# With which random vectors have something in common, and lose something.
OPTIONS: dict[str, dict[str, Any]] = {"devec_unique": {"rank": 8, "threshold": 0.05}, "tsv_compress": {"rank": 4}}
# Which entries, or which components, are kept depends on the weights; and on the order of equals.
SCALED = sorted(set(METHODS) - {"mean", "top_k", "ties"})


def low_rank(count: int = 3, rank: int = 8, seed: int = 0) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    factors = [(torch.randn(SHAPE[0], rank, generator=generator), rank) for _ in range(count)]
    return [LowRank(left, torch.randn(r, SHAPE[1], generator=generator)) for left, r in factors]


def whole(deltas: list[LowRank]) -> list[Delta]:
    return [Dense(dense(delta).float()) for delta in deltas]


def combined(name: str, deltas: Any, weights: list[float] | None = None) -> Tensor:
    """[*shape] float64."""
    return dense(METHODS[name].combine(deltas, weights or [1.0] * len(deltas), **OPTIONS.get(name, {})))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e3 * EPS * expected.norm())


def test_the_methods_are_found_without_a_list() -> None:
    known = {"mean", "task_arithmetic", "top_k", "ties", "magmax", "tsv", "tsv_compress", "devec_unique"}
    assert known <= set(METHODS) and list(METHODS) == sorted(METHODS)
    assert all(chosen.name == name and chosen.summary.endswith(".") for name, chosen in METHODS.items())
    assert all(chosen.title and chosen.source.startswith("https://") for chosen in METHODS.values())


def test_every_option_has_a_description_and_a_default_that_it_accepts() -> None:
    for chosen in METHODS.values():
        assert all(option.help for option in chosen.options.values())
        assert chosen.checked(chosen.defaults) == chosen.defaults


def test_one_name_is_of_one_method() -> None:
    with pytest.raises(ValueError, match="two merging methods are called ties"):
        method("ties", title="again")(lambda deltas, weights: deltas[0])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("devec_unique", {"threshold": 1.5}, "above 0 and at most 1; got 1.5"),
        ("devec_unique", {"pool": "all"}, "pool of devec_unique must be joint or iterative or pairs; got 'all'"),
        ("devec_unique", {"rank": 0}, "rank 0.* is not a rank rule"),
        ("devec_unique", {"shared": 1.0}, r"shared is no option of devec_unique \(did you mean shared_weight\?\)"),
        ("tsv", {"low_rank": 1}, "low_rank of tsv .* must be true or false; got 1"),
        ("tsv_compress", {"rank": "energy:2"}, "is not a rank rule"),
        ("ties", {"density": "many"}, "density of ties .* must be a number"),
    ],
)
def test_options_are_checked_by_what_the_signature_says(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        find_method(name).checked(given)


# Laws


@pytest.mark.parametrize("name", METHODS)
def test_low_rank_and_dense_changes_give_the_same(name: str) -> None:
    deltas = low_rank()
    assert close(combined(name, deltas, [1.0, -0.5, 2.0]), combined(name, whole(deltas), [1.0, -0.5, 2.0]))


@pytest.mark.parametrize("name", METHODS)
def test_a_larger_change_is_merged_to_a_larger_one(name: str) -> None:
    deltas = low_rank()
    larger = [LowRank(3.0 * delta.left, delta.right) for delta in deltas]
    assert close(combined(name, larger), 3.0 * combined(name, deltas))


@pytest.mark.parametrize("name", SCALED)
def test_larger_weights_scale_the_result(name: str) -> None:
    deltas = low_rank()
    assert close(combined(name, deltas, [2.0, 1.0, -4.0]), 2.0 * combined(name, deltas, [1.0, 0.5, -2.0]))


@pytest.mark.parametrize("name", ["mean", "task_arithmetic", "magmax", "top_k", "ties", "tsv"])
def test_one_vector_is_itself_or_a_part_of_itself(name: str) -> None:
    (delta,) = low_rank(1)
    found, own = combined(name, [delta]), dense(delta)
    kept = found != 0
    assert close(found, own) or close(found[kept], own[kept])


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_made_of_nothing(name: str) -> None:
    zero = LowRank(torch.zeros(SHAPE[0], 2), torch.zeros(2, SHAPE[1]))
    assert not combined(name, [zero, zero]).any()
    assert not dense(METHODS[name].combine([Dense(torch.zeros(5)), Dense(torch.zeros(5))], [1.0, 1.0])).any()


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_a_vector_may_stand_anywhere(name: str) -> None:
    first, second = low_rank(2)
    orders = ([first, first, second], [first, second, first], [second, first, first])
    options = OPTIONS.get(name, {}) | ({"subspace": "mean"} if name == "devec_unique" else {})  # a chain has an order
    found = [dense(METHODS[name].combine(order, [1.0] * 3, **options)) for order in orders]
    assert all(torch.isfinite(result).all() and close(result, found[0]) for result in found)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_read_as_the_numbers_that_it_holds(name: str) -> None:
    short = [Dense(dense(delta).bfloat16()) for delta in low_rank()]
    assert close(combined(name, short), combined(name, [Dense(delta.tuned.float()) for delta in short]))


@pytest.mark.parametrize("name", METHODS)
def test_sum_only_is_said_of_the_methods_of_which_it_is_true(name: str) -> None:
    """Vectors with the same weighted sum, otherwise different."""
    deltas, weights = low_rank(), [1.0, 0.5, 2.0]
    moved = low_rank(1, seed=9)[0]
    others: list[Delta] = whole(deltas)
    others[0] = Dense((dense(deltas[0]) + dense(moved)).float())
    others[1] = Dense((dense(deltas[1]) - 2.0 * dense(moved)).float())
    assert close(combined(name, others, weights), combined(name, deltas, weights)) == METHODS[name].sum_only


@pytest.mark.parametrize("name", METHODS)
def test_equivariant_is_said_of_the_methods_of_which_it_is_true(name: str) -> None:
    """Matrices [6, 5], and the same between orthonormal columns: of 8 or 24 rows, and 20 columns."""
    weights, chosen = [1.0, 0.5, 2.0], METHODS[name]
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in weights]
    alone, holds = dense(chosen.combine([Dense(m) for m in small], weights)), []
    for rows in (8, 24):
        left = torch.linalg.qr(torch.randn(rows, 6, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(20, 5, generator=generator, dtype=torch.float64)).Q
        found = dense(chosen.combine([LowRank(left @ m, right.T) for m in small], weights))
        holds.append(close(found, left @ alone @ right.T))
    assert all(holds) == chosen.equivariant


@pytest.mark.parametrize("name", [name for name, chosen in METHODS.items() if chosen.in_turn])
def test_methods_in_turn_are_linear_in_the_weights_by_columns(name: str) -> None:
    first, second = [1.0, 0.5, 2.0], [-0.3, 1.0, 0.7]
    found, other = (METHODS[name].combine(low_rank(rank=4), weights) for weights in (first, second))
    assert isinstance(found, LowRank) and isinstance(other, LowRank) and found.rank == 3 * 4
    ratio = torch.tensor([b / a for a, b in zip(first, second, strict=True)]).repeat_interleave(4)
    assert close((found.left * ratio).double(), other.left.double())
    assert close(found.right.double(), other.right.double())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_has_the_shape_of_what_is_stored(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in (SHAPE, (20,), (), (4, 3, 2)):
        base = torch.randn(shape, generator=generator).to(dtype)
        tuned = [(base.float() + torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]
        change = METHODS[name].combine([Dense(t, base) for t in tuned], [1.0] * 3, **OPTIONS.get(name, {}))
        assert change.shape == shape and dense(change).isfinite().all()


# Through the whole model


def vectors(shape: tuple[int, ...] = SHAPE) -> Vectors:
    generator = torch.Generator().manual_seed(5)
    base = {"a.weight": torch.randn(shape, generator=generator), "b.weight": torch.randn(6, generator=generator)}
    models = {
        f"task{i}": Checkpoint.from_state_dict(
            {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        )
        for i in range(3)
    }
    return Vectors.of_models(Checkpoint.from_state_dict(base), models)


def test_a_weight_of_zero_is_compared_with_but_not_added() -> None:
    tasks = vectors()
    given: dict[str, Any] = {"threshold": 0.2, "rank": 8, "pool": "iterative"}
    found = dense(merged(tasks, "devec_unique", [-0.8, 0.0, 0.0], **given)("a.weight"))
    alone = dense(tasks.deltas("a.weight")[0])
    assert (found + 0.8 * alone).norm() > 0.01 * alone.norm()  # what is shared with the others stays
    both = dense(merged(tasks, "devec_unique", [-0.8, 0.0, 0.0], shared_weight=-0.8, **given)("a.weight"))
    assert close(both, -0.8 * alone)


def test_truncations_are_added_up() -> None:
    tasks, weights = vectors(), [1.0, -0.5, 2.0]
    found = dense(merged(tasks, "tsv_compress", weights, rank=3)("a.weight"))
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for weight, delta in zip(weights, tasks.deltas("a.weight"), strict=True):
        u, s, v = torch.linalg.svd(dense(delta), full_matrices=False)
        expected += weight * (u[:, :3] * s[:3]) @ v[:3]
    assert close(found, expected)
    whole_vector = dense(merged(tasks, "tsv_compress", weights, rank=3)("b.weight"))
    plain = [weight * dense(delta) for weight, delta in zip(weights, tasks.deltas("b.weight"), strict=True)]
    assert close(whole_vector, torch.stack(plain).sum(0))


def test_what_a_method_refuses_of_one_weight_names_it() -> None:
    with pytest.raises(ParameterError, match=r"^devec_unique, a\.weight: 3 of 3 tasks .* span all 24 directions"):
        merged(vectors((24, 40)), "devec_unique", rank="energy:1")("a.weight")


def test_a_method_is_told_that_factors_are_a_convolution() -> None:
    shape = (6, 2, 3, 3)
    deltas = [LowRank(torch.ones(6, 1), torch.ones(1, 18)), LowRank(torch.ones(6, 1), torch.zeros(1, 18))]
    for name in ("tsv", "tsv_compress"):
        assert isinstance(METHODS[name], Method) and METHODS[name].of_matrices
        change = METHODS[name].change("conv", shape, deltas, [1.0, 1.0], {})
        assert torch.equal(dense(change), torch.full(shape, 0.5 if name == "tsv" else 1.0, dtype=torch.float64))
