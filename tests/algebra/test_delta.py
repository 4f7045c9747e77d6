"""Deltas: every form and every mix of forms gives the inner products of the dense changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvbases_hf import Dense
from tvbases_hf.algebra import blocks as blocks_module
from tvbases_hf.algebra.blocks import blocks, pieces
from tvbases_hf.algebra.delta import Delta, Dora, LowRank, dense, low_parts, reshaped, work_dtype, zeros
from tvbases_hf.algebra.products import gram, inner, premultiplied, square_distance, square_norm

EPS = torch.finfo(torch.float64).eps
FORMS = ("dense", "difference", "half", "low_rank", "dora")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def make(form: str, seed: int, rows: int = 7, columns: int = 5) -> tuple[Delta, Tensor]:
    """A delta of the form, and the change it stands for, float64, by other means."""
    generator = torch.Generator().manual_seed(seed)
    a, b = normal(generator, rows, columns), normal(generator, rows, columns)
    left, right, scale = normal(generator, rows, 2), normal(generator, 2, columns), normal(generator, rows)
    product = torch.einsum("ir,rj->ij", left.double(), right.double())
    match form:
        case "dense":
            return Dense(a), a.double()
        case "difference":
            return Dense(a, b), a.double() - b.double()
        case "half":
            return Dense(a.half(), b.bfloat16()), a.half().double() - b.bfloat16().double()
        case "low_rank":
            return LowRank(left, right), product
        case "dora":
            return Dora(scale, a, LowRank(left, right)), scale.double()[:, None] * a.double() + product
    raise ValueError(form)


def tolerance(*changes: Tensor) -> float:
    """Rounding of a sum over all entries: eps times the lengths of what is multiplied."""
    sizes = [float(change.norm()) for change in changes]
    return 10 * EPS * changes[0].numel() ** 0.5 * sizes[0] * sizes[-1]


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_inner_product_is_that_of_the_dense_changes(first: str, second: str) -> None:
    a, dense_a = make(first, 1)
    b, dense_b = make(second, 2)
    expected = float((dense_a * dense_b).sum())
    assert inner(a, b).dtype == torch.float64
    assert float(inner(a, b)) == pytest.approx(expected, abs=tolerance(dense_a, dense_b))
    assert float(inner(b, a)) == pytest.approx(expected, abs=tolerance(dense_a, dense_b))


@pytest.mark.parametrize("form", FORMS)
def test_dense_is_the_change_and_square_norm_its_length(form: str) -> None:
    change, expected = make(form, 3)
    assert torch.allclose(dense(change), expected, rtol=0, atol=10 * EPS * float(expected.norm()))
    assert square_norm(change) == pytest.approx(float(expected.square().sum()), rel=100 * EPS)


@settings(deadline=None, max_examples=30)
@given(
    forms=st.lists(st.sampled_from(FORMS), min_size=1, max_size=5),
    block=st.integers(1, 60),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
)
def test_gram_of_any_mix_of_forms_is_that_of_the_dense_changes_for_any_block_size(
    forms: list[str], block: int, rows: int, columns: int
) -> None:
    made = [make(form, seed, rows, columns) for seed, form in enumerate(forms)]
    matrix = torch.stack([change.reshape(-1) for _, change in made], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_NUMBERS", block)
        found = gram([change for change, _ in made])
    assert torch.allclose(found, matrix.T @ matrix, rtol=0, atol=tolerance(matrix, matrix))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 3, 5, 8, 34, 35, 1000])
def test_blocks_are_the_flattened_change_in_order(form: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = make(form, 4)
    monkeypatch.setattr(blocks_module, "BLOCK_NUMBERS", 2 * block)
    pieces = list(blocks([change, change]))
    assert all(0 < piece.shape[1] <= block for piece in pieces)
    whole = torch.cat(pieces, dim=1)
    assert torch.allclose(whole[0], expected.reshape(-1), rtol=0, atol=10 * EPS * float(expected.norm()))
    assert torch.equal(whole[0], whole[1])


def test_a_difference_of_stored_numbers_is_exact_even_where_it_vanishes_in_their_dtype() -> None:
    base = torch.tensor([1.0, 256.0, -3.0], dtype=torch.bfloat16)
    tuned = torch.tensor([1.0 + 1e-3, 256.5, -3.0])
    expected = tuned.double() - base.double()
    assert torch.equal(dense(Dense(tuned, base)), expected)
    assert float((tuned.bfloat16() - base).double().abs().sum()) < float(expected.abs().sum())  # the naive way loses it


def test_low_rank_inner_products_never_form_the_matrix() -> None:
    # 200 000 x 200 000 would be 160 GB in float32.
    generator = torch.Generator().manual_seed(0)
    a, b = (LowRank(normal(generator, 200_000, 2), normal(generator, 2, 200_000)) for _ in range(2))
    left, right = a.left.double().T @ b.left.double(), a.right.double() @ b.right.double().T
    expected = float(sum(left[i, j] * right[i, j] for i in range(2) for j in range(2)))
    scale = float(a.left.norm() * a.right.norm() * b.left.norm() * b.right.norm())
    assert float(gram([a, b])[0, 1]) == pytest.approx(expected, abs=10 * EPS * scale)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (4,), (2, 3, 4)])
def test_tensors_of_any_shape_have_inner_products(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    deltas = [Dense(a, b), Dense(b)]
    expected = float(((a.double() - b.double()) * b.double()).sum())
    assert float(gram(deltas)[0, 1]) == pytest.approx(expected, abs=100 * EPS)
    assert dense(deltas[0]).shape == shape


def test_tensors_that_are_not_contiguous_are_read_in_their_own_order() -> None:
    a = torch.arange(12.0).reshape(3, 4).T
    b = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(dense(Dense(a, b)), a.double() - b.double())


@pytest.mark.parametrize("form", FORMS)
def test_what_a_change_offers_agrees_with_its_dense_form(form: str) -> None:
    change, expected = make(form, 5)
    size = float(expected.norm())
    assert change.shape == tuple(expected.shape) and change.device == change.to(torch.device("cpu")).device
    assert torch.equal(dense(change.to(torch.device("cpu"))), dense(change))
    rounding = torch.finfo(torch.float32).eps if form == "dora" else EPS  # transposed, a DoRA is whole, in float32
    assert torch.allclose(dense(change.T), expected.T, rtol=0, atol=10 * rounding * size)
    matrix = normal(torch.Generator().manual_seed(6), 3, 7).double()
    assert torch.allclose(premultiplied(matrix, change), matrix @ expected, rtol=0, atol=100 * EPS * size)
    whole = torch.cat(list(pieces(change, -0.5)))
    assert torch.allclose(whole, -0.5 * expected.reshape(-1), rtol=0, atol=10 * EPS * size)
    assert dense(reshaped(change, (7, 5))).shape == (7, 5)
    assert torch.allclose(dense(reshaped(change, (7, 5, 1)))[..., 0], expected, rtol=0, atol=10 * EPS * size)


@pytest.mark.parametrize("form", FORMS)
def test_replacing_the_low_rank_part_leaves_the_rest(form: str) -> None:
    change, expected = make(form, 7)
    emptied = dense(change.with_low(lambda low: LowRank.zeros(low.shape)))
    rest = expected if change.low is None else expected - dense(change.low)
    assert torch.allclose(emptied, rest, rtol=0, atol=10 * EPS * float(expected.norm()))
    assert len(low_parts([change, change])) == (0 if form in ("dense", "difference", "half") else 2)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_square_distance_is_that_of_the_dense_changes(first: str, second: str) -> None:
    a, dense_a = make(first, 1)
    b, dense_b = make(second, 2)
    distance, square = square_distance(a, b)
    assert distance == pytest.approx(float((dense_a - dense_b).square().sum()), rel=1e-12)
    assert square == pytest.approx(float(dense_a.square().sum()), rel=1e-12)
    assert square_distance(a, a) == (0.0, square_norm(a))


def test_square_distance_of_doras_that_scale_rows_alike_is_that_of_their_factors() -> None:
    change, _ = make("dora", 1)
    assert change.low is not None
    other = change.with_low(lambda low: LowRank(low.left + 1, low.right))
    expected = float((dense(change) - dense(other)).square().sum())
    assert square_distance(change, other)[0] == pytest.approx(expected, rel=1e-12)
    assert square_distance(change, change.with_low(lambda low: low))[0] == 0.0


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 4)])
def test_zeros_have_the_shape_and_nothing_else(shape: tuple[int, ...]) -> None:
    nothing = zeros(shape)
    assert nothing.shape == shape and not dense(nothing).any()
    assert len(shape) != 2 or low_parts([nothing])[0].rank == 0


def test_work_is_done_in_the_widest_stored_dtype_float32_at_least() -> None:
    half, double = Dense(torch.ones(2, 2).half()), Dense(torch.ones(2, 2).double())
    low = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    assert work_dtype([half, low]) == torch.float32 and work_dtype([half, low, double]) == torch.float64
