"""Whatever is a change for every weight is written by one writer: base + change, rounded once, or an adapter of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import OutputError, ParameterError
from tvbases_hf.merging.changes import Changes, Computed, Edit
from tvbases_hf.merging.merge import Merge, is_merge
from tvbases_hf.merging.write import write
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.model import is_edited_model
from zoo.adapter_families import Adapters, random_adapters
from zoo.models import random_models, random_state, read_directory, tune

WEIGHTS = [0.5, -1.0, 0.25, 2.0]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    return random_models(tmp_path_factory.mktemp("models"), 3).vectors()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("adapters"))


def summed(vectors: Vectors) -> Merge:
    return Merge(
        vectors, lambda _, deltas: total(deltas, WEIGHTS[: len(deltas)]), vectors.names, "task_arithmetic", "a: 1\n"
    )


def computed(vectors: Vectors) -> Computed:
    shapes = vectors.base.tensors
    sums = {
        name: dense(total(vectors.deltas(name), WEIGHTS[: len(vectors)])).reshape(shapes[name].shape)
        for name in vectors.names
    }
    return Computed(vectors, "summed", sums)


def edited(vectors: Vectors) -> Edit:
    return Edit.of(vectors, lambda name: vectors.deltas(name)[1], "task1 forgotten", -0.5)


@pytest.mark.parametrize("side", ["base", "models"])
def test_eight_bit_floats_without_scales_are_added_as_the_numbers_that_they_are(side: str, tmp_path: Path) -> None:
    base, model = random_state(0), Checkpoint.from_state_dict
    states = {f"task{seed}": tune(base, seed) for seed in (1, 2)}
    small = lambda state: {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}  # noqa: E731
    base, states = (small(base), states) if side == "base" else (base, {t: small(s) for t, s in states.items()})
    vectors = Vectors.of_models(model(base, "base"), {task: model(own, task) for task, own in states.items()})
    write(summed(vectors), tmp_path / "out")
    found = read_directory(tmp_path / "out")
    for name in vectors.names:
        own = base[name].double()
        expected = own + sum(w * (s[name].double() - own) for w, s in zip(WEIGHTS, states.values(), strict=False))
        rounded = expected.to(base[name].dtype)
        assert found[name].dtype == base[name].dtype
        step = 0.13 if rounded.element_size() == 1 else 1e-6  # of three bits, where sums in float32 round the other way
        assert torch.allclose(found[name].float(), rounded.float(), rtol=step, atol=1e-6)


KINDS: dict[str, Callable[[Vectors], Merge | Computed | Edit]] = {
    "merge": summed,
    "computed": computed,
    "edit": edited,
}


def expected(vectors: Vectors, changes: Changes) -> dict[str, Tensor]:
    """base + change, float64, rounded once."""
    found = {name: vectors.base.read(name) for name in vectors.base.tensors}
    for name in changes.names:
        whole = found[name].double() + dense(changes.change(name)).reshape(found[name].shape)
        found[name] = whole.to(found[name].dtype)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_base_plus_the_change_whatever_made_it(kind: str, vectors: Vectors, tmp_path: Path) -> None:
    changes = KINDS[kind](vectors)
    report = write(changes, tmp_path / "out")
    written, wanted = read_directory(tmp_path / "out"), expected(vectors, changes)
    assert written.keys() == wanted.keys() and report["kind"] == "checkpoint"
    for name, tensor in wanted.items():
        # A change that is rounded by itself first, to float32, may move the sum by one more rounding.
        close = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        assert torch.allclose(written[name].double(), tensor.double(), rtol=close, atol=1e-6 * bool(close)), name
    assert any(not torch.equal(written[name], vectors.base.read(name)) for name in changes.names)


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_what_was_written_may_be_replaced_until_something_is_added(
    before: str, after: str, vectors: Vectors, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(KINDS[before](vectors), out)
    write(KINDS[after](vectors), out)
    assert is_edited_model(out) if after == "edit" else is_merge(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        write(KINDS[after](vectors), out)
    assert (out / "notes.txt").read_text() == "mine"


def test_outputs_of_earlier_versions_are_known_by_their_markers(vectors: Vectors, tmp_path: Path) -> None:
    for marker in ("tvbases_merge.json", "tvbases_edit.json"):
        out = tmp_path / marker
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"")
        (out / marker).write_text(json.dumps({"files": ["model.safetensors", marker]}))
        write(edited(vectors), out)
        assert is_edited_model(out)


def test_pieces_of_an_edit_are_its_change(vectors: Vectors) -> None:
    edit = edited(vectors)
    for name in edit.names:
        pieces = torch.cat(list(edit.pieces(name))) if edit.base.tensors[name].numel else torch.zeros(0)
        torch.testing.assert_close(pieces, dense(edit.change(name)).reshape(-1), rtol=1e-6, atol=1e-9)


def test_a_recipe_names_the_change_so_that_another_one_cannot_go_on_with_its_files(vectors: Vectors) -> None:
    one, same, other = (Computed(vectors, "x", {"weight": torch.full((2, 3), value)}) for value in (1.0, 1.0, 2.0))
    recipes = [Merge.of(found, "a: 1\n").recipe for found in (one, same, other)]
    assert recipes[0] == recipes[1] != recipes[2] and recipes[0].startswith("a: 1\n# change ")


@pytest.mark.parametrize("make", [summed, edited])
def test_an_adapter_makes_the_change(
    make: Callable[[Vectors], Merge | Edit], adapters: Adapters, tmp_path: Path
) -> None:
    vectors = adapters.vectors()
    chosen = vectors.selected(range(3)) if make is summed else vectors
    changes = make(chosen)
    assert write(changes, tmp_path / "out", as_adapter=True)["kind"] == "adapter"
    again = Vectors.open(adapters.base, {"out": tmp_path / "out"})
    assert set(again.names) == set(changes.names)
    for name in again.names:
        wanted = dense(changes.change(name))
        assert (dense(again.deltas(name)[0]) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("make", [summed, edited])
def test_full_checkpoints_have_no_adapter(
    make: Callable[[Vectors], Merge | Edit], vectors: Vectors, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match="full checkpoint"):
        write(make(vectors), tmp_path / "out", as_adapter=True)
    assert not (tmp_path / "out").exists()
