"""Merges in pieces: the numbers that mergekit's own methods give on whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import registry
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvbases_hf.algebra import blocks as blocks_module
from tvbases_hf.algebra.delta import Dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.merging.merge import Merge
from tvbases_hf.merging.write import write
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import Run, using
from tvbases_mergekit.kernels import Linear, Weight, kernel_of
from tvbases_mergekit.methods import merge_vectors
from tvbases_mergekit.streamed import Pieces

SHAPE = (37, 29)
WEIGHTS = [0.5, 1.0, -0.25]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every tensor has many, the last one shorter."""
    monkeypatch.setattr(blocks_module, "BLOCK_NUMBERS", 300)


def models(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[Tensor]]:
    """Sixteen-bit differences have few values: many entries are equal in magnitude, and some cancel."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator).to(dtype)
    return base, [(base.float() + 0.05 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in WEIGHTS]


def settings(**given: Any) -> dict[str, Any]:
    return {"weight": WEIGHTS, "normalize": False, "rescale": False, "int8_mask": False, "lambda": 1.0} | given


def whole(name: str, given: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """By mergekit, on whole float32 differences.

    Its sort is made stable: which of equal entries it keeps otherwise depends on the machine.
    """
    base, tuned = models(dtype)
    vectors = [model.float() - base.float() for model in tuned]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "argsort", functools.partial(torch.argsort, stable=True))
        return merge_vectors(registry.get(name), vectors[0], vectors, given)


def streamed(name: str, vectors: Pieces, given: dict[str, Any], seed: int = 0) -> Iterator[Tensor]:
    return kernel_of(registry.get(name)).pieces(vectors, given, Weight("weight", SHAPE, seed))


def in_pieces(name: str, given: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    base, tuned = models(dtype)
    found = list(streamed(name, Pieces([Dense(model, base) for model in tuned]), given, seed))
    assert len(found) > 3
    return torch.cat(found).reshape(SHAPE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("name", "density"), [("task_arithmetic", 1.0), ("ties", 1.0), ("ties", 0.2), ("ties", 0.003)])
def test_pieces_are_mergekits_whole_tensors(
    name: str, density: float, rescale: bool, normalize: bool, dtype: torch.dtype
) -> None:
    given = settings(density=[density, min(1.0, 2 * density), density], normalize=normalize, rescale=rescale)
    expected = whole(name, given, dtype)
    found = in_pieces(name, given, dtype=dtype)
    # 1e-5: the lengths that rescale divides are sums of a thousand numbers, in float32 there.
    assert (found - expected).abs().max() <= (1e-5 if rescale else 4 * EPS) * expected.abs().max()
    assert name != "ties" or torch.equal(found == 0, expected == 0)


def test_of_equal_entries_those_are_kept_that_come_first() -> None:
    tuned = torch.tensor([3.0, 1.0, -1.0, 1.0, 2.0, -1.0])
    vectors = Pieces([Dense(tuned)])
    given = settings(weight=[1.0], density=[4 / 6])
    (found,) = streamed("ties", vectors, given)
    assert found.tolist() == [3.0, 1.0, -1.0, 0.0, 2.0, 0.0]


def test_a_density_of_zero_keeps_nothing() -> None:
    given = settings(density=[0.0, 0.2, 0.0])
    assert torch.allclose(in_pieces("ties", given), whole("ties", given), atol=4 * EPS)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_drawn_entries_have_the_density_and_with_rescale_the_length_of_all(name: str) -> None:
    base, tuned = models()
    one = Pieces([Dense(tuned[0], base)])
    alone = {"weight": [1.0], "density": [0.3]}
    plain = torch.cat(list(streamed(name, one, settings(**alone), 7)))
    tau = (tuned[0].float() - base.float()).reshape(-1)
    kept = plain != 0
    assert torch.equal(plain[kept], tau[kept])
    assert abs(float(kept.float().mean()) - 0.3) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    scaled = torch.cat(list(streamed(name, one, settings(**alone, rescale=True), 7)))
    assert torch.equal(scaled != 0, kept)
    assert torch.isclose(scaled.abs().sum(), tau.abs().sum(), rtol=1e-5)


def test_draws_follow_the_seed_and_differ_between_the_vectors() -> None:
    given = settings(density=[0.5] * 3)
    assert torch.equal(in_pieces("dare_linear", given, 3), in_pieces("dare_linear", given, 3))
    assert not torch.equal(in_pieces("dare_linear", given, 3), in_pieces("dare_linear", given, 4))
    base, tuned = models()
    twice = Pieces([Dense(tuned[0], base), Dense(tuned[0], base)])
    opposed = settings(weight=[1.0, -1.0], density=[0.5, 0.5])
    assert torch.cat(list(streamed("dare_linear", twice, opposed, 3))).abs().max() > 0


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_mixed_vectors_are_the_products_with_the_mixing(name: str) -> None:
    base, tuned = models(torch.float32)
    mixing = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    taus = torch.stack([model - base for model in tuned])
    made = [torch.tensordot(column.float(), taus, dims=1) for column in mixing.T]
    given = settings(weight=[1.0, 0.5], density=[0.4, 0.4]) | {"lambda": 0.5}
    expected = merge_vectors(registry.get(name), made[0], made, given)
    vectors = Pieces([Dense(model, base) for model in tuned], mixing)
    found = torch.cat(list(streamed(name, vectors, given))).reshape(SHAPE)
    assert (found - expected).abs().max() <= 8 * EPS * expected.abs().max()


@pytest.mark.parametrize(("normalize", "own"), [(True, 0.0), (True, 0.5), (False, 0.5)])
def test_a_weighted_mean_of_models_is_that_of_their_numbers(normalize: bool, own: float) -> None:
    base, tuned = models(torch.float32)
    weights = [0.5, 1.0, 0.25]
    mean = sum(w * m.double() for w, m in zip(weights, tuned, strict=True)) + own * base.double()
    expected = mean / (sum(weights) + own if normalize else 1.0)
    vectors = Pieces([Dense(model, base) for model in tuned])
    kernel = Linear(Checkpoint.from_state_dict({"weight": base}), ModelReference.model_validate("base"))
    given = {"weight": dict(zip(["base", "a", "b", "c"], [own, *weights], strict=True)), "normalize": normalize}
    given["weight"] = {ModelReference.model_validate(name): value for name, value in given["weight"].items()}
    found = base + torch.cat(list(kernel.pieces(vectors, given, Weight("weight", SHAPE)))).reshape(SHAPE)
    assert (found - expected).abs().max() <= 16 * EPS * expected.abs().max()


def test_which_methods_are_done_in_pieces() -> None:
    assert [kernel_of(registry.get(name)).streams({}) for name in ("ties", "dare_ties", "breadcrumbs", "slerp")] == [
        True,
        True,
        False,
        False,
    ]


def written(tmp_path: Path, workers: int, tuned: list[Tensor] | None = None) -> dict[str, Tensor]:
    base, made = models()
    for label, tensor in zip(("base", "a", "b", "c"), [base, *(tuned or made)], strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        save_file({f"{i}.weight": tensor + i for i in range(5)}, tmp_path / label / "model.safetensors")
    vectors = Vectors.open(tmp_path / "base", {label: tmp_path / label for label in "abc"})

    def stream(name: str, deltas: Any) -> Iterator[Tensor]:
        return streamed("ties", Pieces(deltas), settings(density=[0.5] * 3))

    merge = Merge(vectors, lambda name, deltas: deltas[0], vectors.names, "ties", "", stream)
    out = tmp_path / f"out{workers}"
    with using(Run(workers=workers)):
        write(merge, out)
    return load_file(out / "model.safetensors")


def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path) -> None:
    one, many = written(tmp_path, 1), written(tmp_path, 4)
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    expected = whole("ties", settings(density=[0.5] * 3))
    base, _ = models()
    assert torch.equal(one["0.weight"], (base.float() + expected).bfloat16())


def test_a_number_that_is_none_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    _, tuned = models()
    tuned[1][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r'/b": tensor 0\.weight holds 1 NaN'):
        written(tmp_path, 2, tuned)
    assert not (tmp_path / "out2").exists()
