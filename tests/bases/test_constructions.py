"""The constructions are declared once: what Python checks, what ``--help`` shows, and what all of them obey."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from commands.command_line import COMMANDS, tvbases
from oracles.grams import EPS, error, gram_of, loss_tolerance, task_matrix
from tvbases_hf.bases import CONSTRUCTIONS, BasisWeights, rand_select, registry
from tvbases_hf.bases.registry import construction
from tvbases_hf.basis import Basis
from tvbases_hf.basis.request import PER_TASK, POOL_OPTIONS, all_options, methods_of
from tvbases_hf.errors import ParameterError
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import random_state, tune

EVERY = pytest.mark.parametrize("name", CONSTRUCTIONS)


@EVERY
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(name: str) -> None:
    found, gram = CONSTRUCTIONS[name], torch.eye(4)
    for option in found.options:
        for call in (getattr(sys.modules["tvbases_hf.bases"], found.function.__name__), found.solve):
            with pytest.raises(ParameterError, match=rf"{option}x is no option of {name} \(did you mean"):
                call(gram, 2, **{f"{option}x": 1})
    with pytest.raises(ParameterError, match="foo is no option"):
        found.solve(gram, 2, foo=1)


@EVERY
def test_what_is_declared_is_complete(name: str) -> None:
    found = CONSTRUCTIONS[name]
    assert found.summary.endswith(".") and found.title and found.paper.startswith("https://")
    assert found.checked({option.name: option.default for option in found.options.values()}) is not None
    assert found.num_bases is None or 0 < found.num_bases < 1


def test_help_shows_every_method_and_every_option_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")  # a line for each
    shown = " ".join(tvbases("compress", "--help").out.replace("│", " ").split())
    assert set(all_options()) == {*CONSTRUCTIONS, *PER_TASK, "masks"}
    squeezed = shown.replace(" ", "")
    for name, options in all_options().items():
        assert name in squeezed
        for option in options.values():
            flag = {"target_weights": "--weight"}.get(option.name, f"--{option.name.replace('_', '-')}")
            assert flag in shown
            assert option.help.replace(" ", "") in squeezed
            if isinstance(option.default, int | float) and not isinstance(option.default, bool):
                assert f"default:{option.default}" in squeezed
            assert all(choice in squeezed for choice in option.choices)
    assert set(methods_of(True)) == {*PER_TASK, *(n for n, found in CONSTRUCTIONS.items() if not found.has_mean)}
    assert all(set(POOL_OPTIONS) <= set(options) for options in methods_of(True).values())


@EVERY
@pytest.mark.parametrize("kind", ["clustered", "nearly_orthogonal"])
def test_the_loss_is_that_of_the_vectors_and_scales_with_them(name: str, kind: str) -> None:
    matrix, found = task_matrix(kind, 8), CONSTRUCTIONS[name]
    gram = gram_of(matrix)
    weights = found.solve(gram, 3)
    tolerance = loss_tolerance(gram)
    assert weights.loss == pytest.approx(error(matrix, weights.reconstruction), abs=tolerance)
    assert weights.loss >= weights.bound - tolerance
    scaled = found.solve(gram * 4, 3)
    assert scaled.loss == pytest.approx(4 * weights.loss, rel=1e-6, abs=4 * tolerance)
    assert (weights.mean is not None) == found.has_mean


@EVERY
@pytest.mark.parametrize("number", [None, 1, 3, 0.5])
def test_as_many_bases_come_out_as_was_said(name: str, number: float | None) -> None:
    found = CONSTRUCTIONS[name]
    number = found.num_bases if number is None else number
    fewest, most = found.counts(number, 8)
    for kind in ("clustered", "nearly_orthogonal"):
        assert fewest <= found.solve(gram_of(task_matrix(kind, 8)), number).num_bases <= most


@EVERY
def test_a_task_that_changed_nothing_is_no_obstacle(name: str) -> None:
    matrix = task_matrix("clustered", 6).clone()
    matrix[:, 2] = 0
    weights = CONSTRUCTIONS[name].solve(gram_of(matrix), 3)
    assert torch.isfinite(weights.reconstruction).all()
    assert weights.loss == pytest.approx(error(matrix, weights.reconstruction), abs=loss_tolerance(gram_of(matrix)))


@EVERY
def test_the_loss_does_not_depend_on_the_order_of_the_tasks(name: str) -> None:
    matrix = task_matrix("independent", 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    first, again = (CONSTRUCTIONS[name].solve(gram_of(m), 3) for m in (matrix, matrix[:, order]))
    same = first.loss == pytest.approx(again.loss, rel=1e-6)
    assert same or name == "rand_select"  # which tasks it draws goes by their position


@EVERY
def test_one_task_is_its_own_basis(name: str) -> None:
    found = CONSTRUCTIONS[name].solve(torch.full((1, 1), 4.0, dtype=torch.float64), 1)
    assert found.reconstruction.item() == pytest.approx(1.0, abs=1e-12)
    assert found.loss == pytest.approx(0.0, abs=4 * EPS)


@EVERY
def test_a_task_and_its_copy_are_reconstructed_alike(name: str) -> None:
    matrix = task_matrix("independent", 5)
    matrix = torch.cat([matrix, matrix[:, :1]], dim=1)
    weights = CONSTRUCTIONS[name].solve(gram_of(matrix), 4)
    back = matrix @ weights.reconstruction
    assert torch.allclose(back[:, 0], back[:, 5], atol=1e-5 * float(matrix.norm()))


@EVERY
def test_a_gram_matrix_in_float32_is_as_good_to_its_precision(name: str) -> None:
    gram = gram_of(task_matrix("independent", 6))
    single = CONSTRUCTIONS[name].solve(gram.float(), 3)
    assert single.encoder.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    assert single.loss == pytest.approx(CONSTRUCTIONS[name].solve(gram, 3).loss, rel=100 * eps)


@pytest.fixture
def planted() -> Iterator[None]:
    @construction("first", "first_bases", "The first tasks", "https://example.org")
    def first_bases(
        gram: Tensor,
        num_bases: float = 0.5,
        *,
        turn: Annotated[Literal["left", "right"], Field(description="which way they turn")] = "left",
    ) -> BasisWeights:
        """The first of the task vectors."""
        return rand_select(gram, num_bases, seed=0 if turn == "left" else 1)

    COMMANDS.cache_clear()  # they have the options of every construction
    yield
    del registry._found["first"]
    COMMANDS.cache_clear()


def test_a_new_construction_is_known_everywhere(planted: None) -> None:
    state = random_state(0, shapes={"a.weight": (6, 5), "a.bias": (6,)})
    models: dict[str, Any] = {f"t{i}": Checkpoint.from_state_dict(tune(state, i)) for i in range(4)}
    vectors = Vectors.of_models(Checkpoint.from_state_dict(state), models)
    assert Basis.build(vectors, 2, method="first", turn="right").info.options == {"turn": "right"}
    assert Basis.build(vectors, 2, method="first").info.options == {"turn": "left"}
    with pytest.raises(ParameterError, match="turn is an option of method first, not of ae"):
        Basis.build(vectors, 2, turn="right")
    with pytest.raises(ParameterError, match=r"left or right"):
        Basis.build(vectors, 2, method="first", turn="up")
    shown = tvbases("compress", "--help").out
    assert "--turn" in shown and "first" in shown


def test_the_program_shows_its_help_without_the_registries() -> None:
    code = "import sys; from tvbases_hf.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pydantic', 'tvbases_hf.bases', 'tvbases_hf.options'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
