"""Balanced bases whose errors are even: the same sum, convex, and no task given up; against dense task vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commands.command_line import compress, root, tvbases
from tvbases_hf import Basis
from tvbases_hf.bases import ae_bases
from tvbases_hf.errors import ParameterError
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]
# Of a squared error relative to a vector's own: twice the square root of float64's precision covers the decoder's
# solution with a condition number of a thousand.
TOLERANCE = 3e-8
SEEDS = st.integers(0, 10_000)
SOME = settings(max_examples=15, deadline=None)  # a search takes a tenth of a second


def vectors_of(seed: int, tasks: int, spread: float = 1.0, size: int = 60) -> Tensor:
    """[size, T] task vectors with something in common, of lengths up to 10^spread apart."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(size, tasks, generator=generator, dtype=torch.float64)
    common = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return (own + 0.3 * common) * torch.logspace(0, spread, tasks, dtype=torch.float64)


def errors(vectors: Tensor, reconstruction: Tensor) -> Tensor:
    """[T] |tau_hat - tau|^2 / |tau|^2 of the dense vectors."""
    return (vectors @ reconstruction - vectors).square().sum(0) / vectors.square().sum(0)


def best_from(vectors: Tensor, mixtures: Tensor) -> Tensor:
    """[T] the same for the best reconstructions from the span of some mixtures."""
    basis = torch.linalg.qr(vectors @ mixtures).Q
    return (vectors - basis @ (basis.T @ vectors)).square().sum(0) / vectors.square().sum(0)


@SOME
@given(SEEDS, st.integers(2, 8), st.floats(0, 1), st.data())
def test_they_are_convex_and_have_the_sum_of_all(seed: int, tasks: int, spread: float, data: st.DataObject) -> None:
    vectors = vectors_of(seed, tasks, spread)
    found = ae_bases(vectors.T @ vectors, data.draw(st.integers(1, tasks)), even_errors=True)
    assert (found.encoder >= 0).all()
    assert torch.allclose(found.encoder.sum(0), torch.ones(found.num_bases, dtype=torch.float64), atol=1e-9)
    total = vectors.sum(1) * found.num_bases / tasks
    assert (vectors @ found.encoder.sum(1) - total).norm() <= 1e-9 * total.norm()


@SOME
@given(SEEDS, st.integers(3, 8), st.data())
def test_no_span_that_holds_the_sum_has_evener_errors(seed: int, tasks: int, data: st.DataObject) -> None:
    """Neither that of least squares, nor random ones, nor one a little way off."""
    vectors = vectors_of(seed, tasks, 0.3)
    gram, count = vectors.T @ vectors, data.draw(st.integers(2, tasks - 1))
    found = ae_bases(gram, count, even_errors=True)
    even = errors(vectors, found.reconstruction)
    generator = torch.Generator().manual_seed(seed)
    others = [ae_bases(gram, count, normalize=normalize).encoder for normalize in (False, True)]
    ones = torch.ones(tasks, 1, dtype=torch.float64)
    for _ in range(5):
        random = torch.randn(tasks, count - 1, generator=generator, dtype=torch.float64)
        others.append(torch.cat([ones, random], 1))
        moved = found.encoder + 1e-3 * torch.randn(found.encoder.shape, generator=generator, dtype=torch.float64)
        others.append(torch.cat([ones, moved[:, 1:]], 1))
    for mixtures in others:
        assert even.square().sum() <= best_from(vectors, mixtures).square().sum() + 1e-6
    assert found.loss == pytest.approx(float(even.sum()), rel=1e-6, abs=TOLERANCE)
    assert found.loss >= found.bound - TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_gives_tasks_up_and_this_does_not(seed: int) -> None:
    vectors = vectors_of(seed, 8, 0.0, size=4000)
    gram = vectors.T @ vectors
    least, even = ae_bases(gram, 4, normalize=True), ae_bases(gram, 4, even_errors=True)
    uneven = errors(vectors, least.reconstruction)
    assert uneven.max() > 1.25 * uneven.mean(), "otherwise there is nothing to mend"
    even_errors = errors(vectors, even.reconstruction)
    assert even_errors.max() < 1.1 * even_errors.mean()
    assert even.loss < 1.03 * even.bound, "and it costs next to nothing in all"


@SOME
@given(SEEDS, st.integers(2, 6))
def test_nothing_is_lost_where_there_are_enough_bases(seed: int, tasks: int) -> None:
    vectors = vectors_of(seed, tasks)
    twice = torch.cat([vectors, vectors], 1)  # half as many dimensions as tasks
    for some, count in ((vectors, tasks), (twice, tasks + 1), (twice, 2 * tasks)):
        found = ae_bases(some.T @ some, count, even_errors=True)
        assert errors(some, found.reconstruction).max() < TOLERANCE


def test_a_task_that_changed_nothing_does_not_count() -> None:
    vectors = vectors_of(5, 6, 0.0)
    vectors[:, 2] = 0
    found = ae_bases(vectors.T @ vectors, 3, even_errors=True)
    rest = [0, 1, 3, 4, 5]
    kept = errors(vectors[:, rest], found.reconstruction[rest][:, rest])
    assert torch.isfinite(found.encoder).all() and kept.max() < 1.2 * kept.mean()
    empty = ae_bases(torch.zeros(4, 4), 2, even_errors=True)
    assert empty.loss == 0 and torch.isfinite(empty.encoder).all()


@SOME
@given(SEEDS, st.floats(-8, 8))
def test_the_unit_of_the_weights_and_the_order_of_the_tasks_do_not_matter(seed: int, exponent: float) -> None:
    vectors = vectors_of(seed, 6, 0.5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain = ae_bases(vectors.T @ vectors, 3, even_errors=True)
    scaled = vectors * 10**exponent
    again = ae_bases(scaled.T @ scaled, 3, even_errors=True)
    moved = ae_bases(vectors[:, order].T @ vectors[:, order], 3, even_errors=True)
    value = errors(vectors, plain.reconstruction).square().sum()
    assert errors(scaled, again.reconstruction).square().sum() == pytest.approx(float(value), rel=1e-3)
    assert errors(vectors[:, order], moved.reconstruction).square().sum() == pytest.approx(float(value), rel=2e-2)


@pytest.mark.parametrize("options", [{"balance": False}, {"solver": "adam"}])
def test_free_bases_have_no_even_errors(options: dict) -> None:
    with pytest.raises(ParameterError, match="even errors are of balanced bases by varpro"):
        ae_bases(torch.eye(3), 2, even_errors=True, **options)


def test_the_command_makes_them_and_refuses_what_does_not_fit(pair: Family) -> None:
    assert tvbases(*compress(pair, "-m", 1, "--even-errors", "--quiet")).code == 0
    assert Basis.from_pretrained(root(pair) / "basis").info.options["even_errors"] is True
    for more, message in (
        (["--no-balance"], "balanced bases"),
        (["--method", "pca"], "--even-errors goes with --method ae"),
    ):
        done = tvbases(*compress(pair, "--even-errors", *more))
        assert done.code == 2 and message in done.err
