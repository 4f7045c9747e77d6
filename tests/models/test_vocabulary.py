"""Vocabularies of other lengths: the common rows, or every row as the models that have it hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import MismatchError
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import State, random_state, tune

# By axis: where the rows of the vocabulary lie in a tensor.
AXES = {"model.embed_tokens.weight": 0, "lm_head.weight": 0, "lm_head.bias": 0, "final_logits_bias": 1}
ROWS, MORE = 64, 72


def state(rows: int, seed: int = 0) -> State:
    """A model of these rows, of which the first ROWS are the same for every number of rows."""
    shapes = {
        "model.embed_tokens.weight": (MORE, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "lm_head.weight": (MORE, 8),
        "lm_head.bias": (MORE,),
        "final_logits_bias": (1, MORE),
    }
    return {name: cut(name, tensor, rows) for name, tensor in random_state(seed, shapes=shapes).items()}


def cut(name: str, tensor: Tensor, rows: int) -> Tensor:
    return tensor.narrow(AXES[name], 0, rows).clone() if name in AXES else tensor


def tuned(rows: int, seed: int) -> State:
    return tune(state(rows), seed)


def opened(base: State, models: Mapping[str, State], **how: Any) -> Vectors:
    model = Checkpoint.from_state_dict
    return Vectors.of_models(model(base, "base"), {task: model(s, task) for task, s in models.items()}, **how)


@pytest.mark.parametrize("sizes", [(ROWS, MORE, ROWS), (MORE, ROWS, MORE), (ROWS, MORE, 68), (68, ROWS, MORE)])
def test_drop_takes_the_rows_that_all_have(sizes: tuple[int, int, int]) -> None:
    base, models = state(sizes[0]), {"a": tuned(sizes[1], 1), "b": tuned(sizes[2], 2)}
    vectors = opened(base, models, extra_rows="drop")
    for name in base.keys() - {"model.position_ids"}:
        rows = min(sizes)
        expected = [cut(name, s[name], rows).double() - cut(name, base[name], rows).double() for s in models.values()]
        assert torch.equal(vectors.base.read(name), cut(name, base[name], rows))
        assert vectors.base.tensors[name].shape == vectors.base.read(name).shape
        assert all(torch.equal(dense(d), e) for d, e in zip(vectors.deltas(name), expected, strict=True))


@pytest.mark.parametrize("name", sorted(AXES))
def test_keep_leaves_a_row_that_one_model_has_and_adds_what_several_change(name: str) -> None:
    """Rows 64 to 67 are in both models, 68 to 71 in one; the base has neither."""
    axis, models = AXES[name], {"a": tuned(MORE, 1), "b": tuned(68, 2), "c": tuned(ROWS, 3)}
    vectors = opened(state(ROWS), models, extra_rows="keep")
    base, (a, b, c) = vectors.base.read(name), vectors.deltas(name)

    def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor.narrow(axis, start, stop - start).double()

    mean = (rows(models["a"][name], 64, 68) + rows(models["b"][name], 64, 68)) / 2
    assert torch.equal(rows(base, 0, ROWS), rows(state(ROWS)[name], 0, ROWS))
    assert torch.equal(rows(base, 64, 68), mean.float().double())
    assert torch.equal(rows(base, 68, 72), rows(models["a"][name], 68, 72))
    assert torch.equal(rows(dense(a), 64, 68), rows(models["a"][name], 64, 68) - mean.float().double())
    assert torch.equal(rows(dense(b), 64, 68), rows(models["b"][name], 64, 68) - mean.float().double())
    assert not any(rows(dense(delta), 68, 72).any() for delta in (a, b, c))
    assert not rows(dense(c), 64, 72).any()
    assert rows(dense(c), 0, ROWS).any()


def test_a_row_that_only_the_base_has_does_not_change() -> None:
    vectors = opened(state(MORE), {"a": tuned(ROWS, 1)}, extra_rows="keep")
    (delta,) = vectors.deltas("lm_head.weight")
    assert torch.equal(vectors.base.read("lm_head.weight"), state(MORE)["lm_head.weight"])
    assert not dense(delta)[ROWS:].any() and dense(delta)[:ROWS].any()


def test_a_model_may_be_shorter_than_the_base_where_another_is_longer() -> None:
    models = {"a": tuned(60, 1), "b": tuned(MORE, 2)}
    vectors = opened(state(ROWS), models, extra_rows="keep")
    for name in sorted(AXES):
        a, b = (dense(delta) for delta in vectors.deltas(name))
        axis, base = AXES[name], vectors.base.read(name)
        assert torch.equal(base.narrow(axis, ROWS, MORE - ROWS), models["b"][name].narrow(axis, ROWS, MORE - ROWS))
        assert a.narrow(axis, 0, 60).any() and not a.narrow(axis, 60, MORE - 60).any()
        assert b.narrow(axis, 0, ROWS).any() and not b.narrow(axis, ROWS, MORE - ROWS).any()


def test_the_rows_of_a_half_precision_base_do_not_move_where_a_model_lacks_them() -> None:
    base = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state(ROWS).items()}
    short = {name: t.float() if t.is_floating_point() else t for name, t in base.items()}
    short = {name: cut(name, t, 60) for name, t in short.items()}
    (delta,) = opened(base, {"a": short}, extra_rows="keep").deltas("lm_head.weight")
    assert not dense(delta).any()


def test_a_tied_base_and_a_fine_tune_with_an_output_of_its_own() -> None:
    """The output of the base is its embedding, whatever its number of rows."""
    config = {"model_type": "llama", "tie_word_embeddings": True}
    names = [name for name in state(ROWS) if name != "lm_head.weight"]
    base = Checkpoint.from_state_dict({name: state(ROWS)[name] for name in names}, "base")
    base.config |= config
    long = tuned(MORE, 1)
    vectors = Vectors.of_models(base, {"a": Checkpoint.from_state_dict(long, "a")}, extra_rows="drop")
    (delta,) = vectors.deltas("lm_head.weight")
    embedding = state(ROWS)["model.embed_tokens.weight"].double()
    assert torch.equal(dense(delta), long["lm_head.weight"][:ROWS].double() - embedding)


@pytest.mark.parametrize("extra_rows", ["drop", "keep"])
def test_models_that_fit_are_as_they_were(extra_rows: Any) -> None:
    base, models = state(ROWS), {"a": tuned(ROWS, 1)}
    plain, level = opened(base, models), opened(base, models, extra_rows=extra_rows)
    assert level.base is not None and level.base.tensors == plain.base.tensors and not level.coverage.notes()


def test_without_the_option_the_models_are_refused_by_it() -> None:
    with pytest.raises(MismatchError, match=r'"a": 4 of 5 tensors.*\(72 and 64 tokens\): --extra-rows drop') as caught:
        opened(state(ROWS), {"a": tuned(MORE, 1)})
    assert "\n" not in str(caught.value)


def test_what_differs_and_is_no_vocabulary_is_refused_all_the_same() -> None:
    wide = tuned(MORE, 1)
    wide["model.layers.0.mlp.up_proj.weight"] = torch.zeros(14, 8)
    with pytest.raises(MismatchError, match=r"up_proj.weight \[14, 8\] vs \[12, 8\]"):
        opened(state(ROWS), {"a": wide}, extra_rows="drop")


def test_a_basis_keeps_the_rows_of_its_base() -> None:
    how = {"rows_of_base": True}
    vectors = opened(state(68), {"a": tuned(MORE, 1), "b": tuned(ROWS, 2)}, extra_rows="drop", **how)
    a, b = (dense(delta) for delta in vectors.deltas("lm_head.weight"))
    assert vectors.base.tensors["lm_head.weight"].shape == (68, 8)
    assert torch.equal(a, tuned(MORE, 1)["lm_head.weight"][:68].double() - state(68)["lm_head.weight"].double())
    assert not b[ROWS:].any() and b[:ROWS].any()
    with pytest.raises(MismatchError, match=r'"a": 4 rows of .* are not in the base .*--extra-rows drop'):
        opened(state(68), {"a": tuned(MORE, 1)}, extra_rows="keep", **how)


def test_a_view_of_other_rows_has_the_fingerprint_of_what_is_stored() -> None:
    base = Checkpoint.from_state_dict(state(ROWS), "base")
    vectors = Vectors.of_models(base, {"a": Checkpoint.from_state_dict(tuned(MORE, 1), "a")}, extra_rows="keep")
    assert vectors.base.tensors != base.tensors and vectors.base.fingerprint() == base.fingerprint()
    assert vectors.base.copied("lm_head.weight") == MORE * 8 * 4
