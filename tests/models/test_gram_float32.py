"""The Gram matrix by float32 products: what bases need of it is known as well as in float64, or float64 it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oracles.matrices import EPS
from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra import products
from tvbases_hf.algebra.delta import Dense
from tvbases_hf.algebra.products import MIN_NUMBERS, PIECE, float32_products
from tvbases_hf.storage.checkpoint import Checkpoint

SIZE = MIN_NUMBERS + 77
# A sum of PIECE products rounds each partial sum; the pieces' errors are independent.
TOLERANCE = EPS * math.sqrt(PIECE) / 16


def numbers(seed: int, scale: float = 1.0, size: int = SIZE) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def models(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[Tensor]]:
    base = numbers(0, 0.02).to(dtype)
    common = 0.0 if kind == "apart" else 1.0
    own = {"apart": 2e-3, "alike": 2e-3, "nearly equal": 3e-5}[kind]
    steps = [common * numbers(9, 4e-3) + numbers(1 + task, own) for task in range(3)]
    return base, [(base.float() + step).to(dtype) for step in steps]


def exact(base: Tensor, tuned: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    vectors = torch.stack([model.double() - base.double() for model in tuned])
    return vectors @ vectors.T, vectors @ base.double(), float(base.double().square().sum())


def opened(base: Tensor, tuned: list[Tensor]) -> Vectors:
    tasks = {f"task{i}": Checkpoint.from_state_dict({"weight": model}) for i, model in enumerate(tuned)}
    return Vectors.of_models(Checkpoint.from_state_dict({"weight": base}), tasks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["apart", "alike"])
def test_products_of_float32_pieces_are_those_of_float64(kind: str, dtype: torch.dtype) -> None:
    base, tuned = models(kind, dtype)
    found = float32_products([Dense(model, base) for model in tuned], base)
    matrix, along, square = exact(base, tuned)
    assert found is not None
    lengths = matrix.diagonal().sqrt()
    assert ((found[:-1, :-1] - matrix).abs() <= TOLERANCE * lengths[:, None] * lengths).all()
    assert ((found[:-1, -1] - along).abs() <= TOLERANCE * lengths * square**0.5).all()
    assert float(found[-1, -1]) == pytest.approx(square, rel=TOLERANCE)
    single = torch.stack([model.float() - base.float() for model in tuned])
    assert ((single @ single.T - matrix).abs() > TOLERANCE * lengths[:, None] * lengths).any()  # in one float32 sum


@pytest.mark.parametrize("kind", ["apart", "alike", "nearly equal"])
def test_the_error_that_bases_leave_is_known_to_five_digits(kind: str) -> None:
    """Also of vectors that are the same to one per cent, whose error is a small difference of large numbers."""
    base, tuned = models(kind)
    matrix, along, square = exact(base, tuned)
    gram = gram_matrix(opened(base, tuned))
    for num_bases in (1, 2):
        weights = ae_bases(gram.matrix, num_bases)
        left = torch.eye(3, dtype=torch.float64) - weights.reconstruction
        loss, seen = (float((left.T @ products_ @ left).diagonal().sum()) for products_ in (matrix, gram.matrix))
        assert seen == pytest.approx(loss, rel=1e-5)
    assert gram.along is not None and gram.base_norm == pytest.approx(square**0.5, rel=TOLERANCE)
    assert torch.allclose(gram.along, along, atol=TOLERANCE * float((matrix.diagonal() * square).max()) ** 0.5)


def test_nearly_dependent_vectors_would_not_be_known_from_float32() -> None:
    """Why there is a second pass."""
    base, tuned = models("nearly equal")
    found = float32_products([Dense(model, base) for model in tuned], base)
    matrix, _, _ = exact(base, tuned)
    assert found is not None
    least, rough = torch.linalg.eigvalsh(matrix)[0], torch.linalg.eigvalsh(found[:-1, :-1])[0]
    assert abs(rough - least) > 1e-5 * least
    assert torch.allclose(torch.linalg.eigvalsh(gram_matrix(opened(base, tuned)).matrix)[0], least, rtol=1e-7)


def test_copies_are_still_told() -> None:
    base, tuned = models("apart")
    assert any("task2" in line for line in gram_matrix(opened(base, [*tuned[:2], tuned[0]])).warnings())


def test_what_float32_cannot_hold_is_left_to_float64() -> None:
    base = numbers(0).bfloat16()
    for scale in (1e-16, 1e22):
        tuned = (scale * numbers(1)).bfloat16()
        zero = torch.zeros_like(base)
        assert float32_products([Dense(tuned, zero)], zero) is None
        gram = gram_matrix(opened(zero, [tuned]))
        assert float(gram.matrix) == pytest.approx(float(tuned.double().square().sum()), rel=1e-12)
    unchanged = Dense(base, base)
    assert float32_products([unchanged], base) is None
    assert float(gram_matrix(opened(base, [base.clone()])).matrix) == 0
    few, wide = base[:1000], base.float()
    assert float32_products([Dense(few * 2, few)], few) is None
    assert float32_products([Dense(wide * 2, wide)], wide) is None
    assert float32_products([Dense(base * 2)], base) is None
    many = products.STEP_NUMBERS // PIECE
    assert float32_products([Dense(base * 2, base)] * many, base) is None
