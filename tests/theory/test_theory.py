"""The bounds of the AE paper on quadratic losses, where both sides are known, and on networks at their minima."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tvbases_hf.bases import ae_bases
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.data import TaskData
from tvbases_hf.theory.hessian import cross_entropy, gradient, hessian_product, mean_loss, top_eigenvalue
from tvbases_hf.theory.theorems import (
    addition_bound,
    alignment,
    basis_negation_bound,
    constants,
    coverage,
    negation_bound,
    ood_bound,
)


class Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        self.other = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.x


def quadratic(hessian: Tensor, minimum: Tensor, parts: int = 1):
    """Terms of 1/2 (x - minimum)^T H (x - minimum), as the mean over ``parts`` batches of unequal sizes."""

    def terms(model: Any) -> Iterator[tuple[Tensor, int]]:
        x = model()
        for number in range(1, parts + 1):
            yield number * 0.5 * (x - minimum) @ hessian @ (x - minimum), number

    return terms


def symmetric(values: list[float], seed: int) -> Tensor:
    turn = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T


# The Hessian


@pytest.mark.parametrize(
    "values", [[3.0, 1.0, 0.5, 0.0], [0.5, -2.0, 1.0, 0.1], [4.0, 4.0, 1.0, 0.0], [1e-6, 1e-7, 0, 0]]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_top_eigenvalue_of_a_quadratic_is_exact_to_a_millionth(values: list[float], parts: int) -> None:
    hessian = symmetric(values, 1)
    model = Point(torch.randn(4, dtype=torch.float64))
    found = top_eigenvalue(model, ["x"], quadratic(hessian, torch.zeros(4, dtype=torch.float64), parts), tolerance=1e-4)
    expected = max(values, key=abs)
    assert found.converged and found.residual <= 1e-4
    assert abs(found.value - expected) < 1e-6 * abs(expected)


def test_products_and_gradients_are_those_of_the_formula_and_of_the_chosen_weights_only() -> None:
    hessian, minimum = symmetric([3.0, 1.0, 0.5, -1.0], 2), torch.randn(4, dtype=torch.float64)
    model = Point(torch.randn(4, dtype=torch.float64))
    terms = quadratic(hessian, minimum, 2)
    direction = torch.randn(4, dtype=torch.float64)
    assert torch.allclose(hessian_product(model, ["x"], terms, direction), hessian @ direction, rtol=1e-12, atol=1e-14)
    expected = hessian @ (model.x.detach() - minimum)
    assert torch.allclose(gradient(model, ["x"], terms), expected, rtol=1e-12, atol=1e-14)
    assert model.x.grad is None and len(gradient(model, ["x"], terms)) == 4
    both = gradient(model, ["other", "x"], terms)  # weights that the loss does not know
    assert torch.equal(both[:3], torch.zeros(3, dtype=torch.float64)) and torch.allclose(both[3:], expected)


def test_the_network_that_is_differentiated_is_the_dense_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 2, (7,))
    data = TaskData("t", [(x[:3], y[:3]), (x[3:], y[3:])], lambda m, b: (m(b[0]), b[1]))
    names = ["0.weight", "2.weight"]
    shapes = [dict(model.named_parameters())[n].shape for n in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    flat = torch.cat([dict(model.named_parameters())[n].detach().reshape(-1) for n in names])
    dense = torch.func.hessian(loss)(flat)
    terms = cross_entropy(data)
    direction = torch.randn(len(flat), dtype=torch.float64)
    assert torch.allclose(hessian_product(model, names, terms, direction), dense @ direction, rtol=1e-9, atol=1e-12)
    assert torch.allclose(gradient(model, names, terms), torch.func.grad(loss)(flat), rtol=1e-9, atol=1e-12)
    assert mean_loss(model, terms) == pytest.approx(loss(flat).item(), rel=1e-12)
    found = top_eigenvalue(model, names, terms, tolerance=1e-5, max_iterations=2000)
    assert found.value == pytest.approx(max(torch.linalg.eigvalsh(dense.detach()).tolist(), key=abs), rel=1e-6)
    assert model.training


def test_dropout_is_off_while_the_loss_is_asked_and_on_again_afterwards() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    data = TaskData("t", [(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))], lambda m, b: (m(b[0]), b[1]))
    assert len({mean_loss(model, cross_entropy(data)) for _ in range(5)}) == 1
    assert model.training


def test_attention_of_a_transformer_is_differentiated_twice() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 1])}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    terms = cross_entropy(TaskData("t", [batch]))
    direction = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = hessian_product(model.double(), [name], terms, direction)
    step, weight = 1e-5, model.state_dict()[name]
    with torch.no_grad():
        weight += step * direction.view(8, 8)
        above = gradient(model, [name], terms)
        weight -= 2 * step * direction.view(8, 8)
        below = gradient(model, [name], terms)
    assert torch.allclose(found, (above - below) / (2 * step), rtol=1e-5, atol=1e-9)


def test_without_a_gap_it_says_that_it_has_not_converged_and_the_seed_decides_the_start() -> None:
    hessian = symmetric([1.0, -1.0, 0.3, 0.2], 3)  # equal sizes, opposite signs: power iteration cannot settle
    model, zero = Point(torch.zeros(4, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64)
    first = top_eigenvalue(model, ["x"], quadratic(hessian, zero), max_iterations=30)
    assert not first.converged and first.residual > 1e-3 and first.iterations == 30
    assert first == top_eigenvalue(model, ["x"], quadratic(hessian, zero), max_iterations=30)
    assert first != top_eigenvalue(model, ["x"], quadratic(hessian, zero), max_iterations=30, seed=1)


def test_a_loss_without_curvature_or_without_data_or_without_sense_is_told() -> None:
    model, zero = Point(torch.ones(2, dtype=torch.float64)), torch.zeros(2, dtype=torch.float64)
    linear = lambda m: iter([(m().sum(), 1)])  # noqa: E731
    assert top_eigenvalue(model, ["x"], linear).value == 0
    with pytest.raises(ParameterError, match="empty"):
        top_eigenvalue(model, ["x"], lambda m: iter(()))
    with pytest.raises(ParameterError, match="empty"):
        mean_loss(model, lambda m: iter(()))
    with pytest.raises(ParameterError, match="no finite second derivative"):
        top_eigenvalue(model, ["x"], quadratic(torch.full((2, 2), math.inf, dtype=torch.float64), zero))
    for tolerance, iterations in ((0.0, 10), (1e-3, 0)):
        with pytest.raises(ParameterError, match="must be positive"):
            top_eigenvalue(model, ["x"], linear, tolerance=tolerance, max_iterations=iterations)


# Constants


def test_the_constants_are_those_of_the_dense_vectors() -> None:
    vectors = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = vectors.T @ vectors
    found = constants(gram, 2)
    cosines = [
        abs(float(nn.functional.cosine_similarity(vectors[:, i], vectors[:, j], 0))) for i in range(4) for j in range(i)
    ]
    values = torch.linalg.svdvals(vectors) ** 2
    assert found.c == pytest.approx(max(float(vectors[:, i].square().sum()) for i in range(4)))
    assert found.epsilon == pytest.approx(max(cosines))
    assert found.gap == pytest.approx(float(values[1] - values[2])) and found.tail == pytest.approx(float(values[2]))
    assert constants(gram, 4).tail == 0 and constants(gram[:1, :1], 1).epsilon == 0
    assert constants(torch.diag(torch.tensor([1.0, 0.0])), 1).epsilon == 0  # a task vector that is zero
    assert alignment(torch.tensor([0.1, 0.6, -0.9]), 2.0) == (1, pytest.approx(0.3))
    assert coverage(torch.tensor([[0.5, 0.2], [0.5, 0.8]], dtype=torch.float64), 1) == (1, 0.8)
    with pytest.raises(ParameterError, match="choose 1 to 4"):
        constants(gram, 5)


# Both sides on quadratics


def side(loss_minimum: Tensor, hessian: Tensor, at: Tensor) -> float:
    return float(0.5 * (at - loss_minimum) @ hessian @ (at - loss_minimum))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], Tensor]:
    """(task vectors [d, T], a positive Hessian per task, convex coefficients [T])."""
    count, seed = draw(st.integers(2, 5)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(6, count, dtype=torch.float64, generator=generator)
    vectors = vectors + draw(st.sampled_from([0.0, 1.0])) * torch.randn(6, 1, dtype=torch.float64, generator=generator)
    roots = torch.randn(count, 6, 6, dtype=torch.float64, generator=generator)
    power = draw(st.sampled_from([1.0, 8.0]))
    chosen = torch.rand(count, dtype=torch.float64, generator=generator) ** power
    return vectors, [root @ root.T for root in roots], chosen / chosen.sum()


def smoothness(hessian: Tensor) -> float:
    return float(torch.linalg.eigvalsh(hessian)[-1])


@given(problems())
@settings(max_examples=60, deadline=None)
def test_no_quadratic_exceeds_a_bound(problem: tuple[Tensor, list[Tensor], Tensor]) -> None:
    vectors, hessians, alphas = problem
    count = vectors.shape[1]
    gram = vectors.T @ vectors
    weights = ae_bases(gram, max(1, count - 1))
    found = constants(gram, weights.num_bases)
    over_bases = (
        vectors @ weights.encoder @ torch.full((weights.num_bases,), 1 / weights.num_bases, dtype=torch.float64)
    )
    rebuilt = vectors @ weights.reconstruction
    residuals = (rebuilt - vectors).square().sum(0)
    for task in range(count):
        curved = smoothness(hessians[task])
        bound = addition_bound(curved, found.c, found.epsilon) * (1 + 1e-12)
        assert side(vectors[:, task], hessians[task], vectors @ alphas) <= bound
        assert side(vectors[:, task], hessians[task], over_bases) <= bound
        others = [i for i in range(count) if i != task]
        best, gamma = alignment(gram[others, task], found.c)
        reached = side(vectors[:, task], hessians[task], vectors[:, others[best]])
        assert reached <= ood_bound(curved, found.c, gamma) * (1 + 1e-12)
        for forgotten in others:
            start = side(vectors[:, task], hessians[task], torch.zeros(6, dtype=torch.float64))
            gap = side(vectors[:, task], hessians[task], -vectors[:, forgotten]) - start
            assert gap <= negation_bound(curved, found.c, found.epsilon) * (1 + 1e-12)
            assert gap <= curved * found.c * (0.5 + found.epsilon) * (1 + 1e-12)  # what a quadratic can reach
            gap = side(vectors[:, task], hessians[task], -rebuilt[:, forgotten]) - start
            residual = float(residuals[forgotten])
            assert gap <= basis_negation_bound(curved, found.c, found.epsilon, residual) * (1 + 1e-12)


def two(cosine: float, length: float = 2.0) -> Tensor:
    """[2, 2] two vectors of one length with a given cosine, as columns."""
    return length * torch.tensor([[1.0, cosine], [0.0, math.sqrt(1 - cosine**2)]], dtype=torch.float64)


@pytest.mark.parametrize("cosine", [-0.9, -0.3, 0.0])
def test_addition_is_tight_for_the_other_task_alone_and_vectors_that_oppose(cosine: float) -> None:
    vectors = two(cosine)
    found = constants(vectors.T @ vectors, 1)
    reached = side(vectors[:, 0], 3.0 * torch.eye(2, dtype=torch.float64), vectors[:, 1])
    assert reached == pytest.approx(addition_bound(3.0, found.c, found.epsilon), rel=1e-12)


def test_addition_needs_coefficients_that_sum_to_one() -> None:
    vectors = two(0.0)
    found = constants(vectors.T @ vectors, 1)
    reached = side(
        vectors[:, 0], torch.eye(2, dtype=torch.float64), vectors @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    )
    assert reached > addition_bound(1.0, found.c, found.epsilon)


@pytest.mark.parametrize("cosine", [0.1, 0.5, 1.0])
def test_ood_is_tight_for_equal_lengths_and_a_curvature_equal_in_all_directions(cosine: float) -> None:
    vectors = two(cosine)
    c = float(vectors.square().sum(0).max())
    _, gamma = alignment(vectors[:, 1:].T @ vectors[:, 0], c)
    reached = side(vectors[:, 0], 3.0 * torch.eye(2, dtype=torch.float64), vectors[:, 1])
    assert reached == pytest.approx(ood_bound(3.0, c, gamma), rel=1e-12, abs=1e-12)


def test_ood_over_bases_holds_for_sources_that_do_not_oppose_the_target_and_is_false_without() -> None:
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(6, dtype=torch.float64)
    for _ in range(200):
        vectors = torch.rand(6, 4, dtype=torch.float64, generator=generator)  # all inner products are positive
        encoder = torch.rand(3, 2, dtype=torch.float64, generator=generator).softmax(0)
        c = float(vectors.square().sum(0).max())
        best, gamma = alignment(vectors[:, 1:].T @ vectors[:, 0], c)
        basis, rho = coverage(encoder, best)
        reached = side(vectors[:, 0], eye, vectors[:, 1:] @ encoder[:, basis])
        assert reached <= ood_bound(1.0, c, gamma, rho) * (1 + 1e-12)
    target = eye[:, 0]
    sources = torch.stack([0.5 * target, -target], dim=1)  # as the theorem's statement allows: gamma = 1/2, rho = 0.1
    encoder = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    best, gamma = alignment(sources.T @ target, 1.0)
    basis, rho = coverage(encoder, best)
    assert (gamma, rho) == (0.5, 0.1)
    assert side(target, eye, sources @ encoder[:, basis]) > ood_bound(1.0, 1.0, gamma, rho)


def test_negation_reaches_what_a_quadratic_can_and_its_first_step_is_tight() -> None:
    vectors = two(0.4)
    eye = torch.eye(2, dtype=torch.float64)
    found = constants(vectors.T @ vectors, 1)
    merged = side(vectors[:, 0], eye, -vectors[:, 1])
    assert merged == pytest.approx(found.c * (1 + found.epsilon), rel=1e-12)  # L_j(theta_neg) - L_j(theta_j)
    gap = merged - side(vectors[:, 0], eye, torch.zeros(2, dtype=torch.float64))
    assert gap == pytest.approx(found.c * (0.5 + found.epsilon), rel=1e-12)
    assert gap < negation_bound(1.0, found.c, found.epsilon)


def test_the_spectral_tail_bounds_the_error_of_bases_that_attain_it_but_not_of_balanced_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        vectors = torch.rand(8, 5, dtype=torch.float64, generator=generator)  # one cluster: the bound is attained
        gram = vectors.T @ vectors
        free = ae_bases(gram, 1, balance=False)
        assert free.loss <= free.spectral_bound * (1 + 1e-6)
        errors = (vectors @ free.reconstruction - vectors).square().sum(0)
        assert float(errors.max()) <= constants(gram, 1).tail * (1 + 1e-5)
    opposed = two(-0.9)  # their sum, which balanced bases contain, has little of either
    gram = opposed.T @ opposed
    errors = (opposed @ ae_bases(gram, 1).reconstruction - opposed).square().sum(0)
    assert float(errors.max()) > 2 * constants(gram, 1).tail
