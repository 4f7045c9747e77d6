"""Task vectors: which models fit a base, and what is said of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import MismatchError, ParameterError
from tvbases_hf.models.vectors import parse_tasks
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import SHAPES, dense_task_matrix, random_models, random_state, save_checkpoint, tune


def model(state: dict[str, Tensor], label: str, model_type: str | None = None) -> Checkpoint:
    opened = Checkpoint.from_state_dict(state, label)
    opened.config = {"model_type": model_type} if model_type else {}
    return opened


def test_deltas_are_the_differences_of_stored_numbers_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    models = random_models(tmp_path, dtype=torch.bfloat16)
    vectors = models.vectors()
    assert vectors.tasks == tuple(models.tasks) and len(vectors) == 3
    assert vectors.numel == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    columns = torch.cat([torch.stack([dense(d).reshape(-1) for d in vectors.deltas(n)], 1) for n in sorted(SHAPES)])
    assert torch.equal(columns, dense_task_matrix(models.base_state, models.states))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    state = random_state(0)
    read: list[str] = []

    def reader(name: str) -> Tensor:
        read.append(name)
        return state[name]

    infos = Checkpoint.from_state_dict(state).tensors
    vectors = Vectors.of_models(Checkpoint("base", infos, reader), {"a": Checkpoint("a", infos, reader)})
    assert read == []
    vectors.deltas("model.norm.weight")
    assert read == ["model.norm.weight"] * 2


def test_no_task_at_all_is_refused_with_an_example() -> None:
    with pytest.raises(ParameterError, match=r"name at least one.*--task math=path/to/math"):
        Vectors.of_models(model(random_state(0), "base"), {})


def test_another_architecture_is_refused_by_its_type() -> None:
    base = random_state(0)
    with pytest.raises(MismatchError, match=r'"a" \(its path\) is a bert model but the base \(base\) is llama'):
        Vectors.of_models(model(base, "base", "llama"), {"a": model(tune(base, 0), "its path", "bert")})


def test_another_architecture_is_refused_by_its_tensors() -> None:
    other = {f"encoder.{name}": tensor for name, tensor in random_state(1).items()}
    with pytest.raises(MismatchError, match=r'"a".* has 0 of the 9 tensors of the base.*it has encoder\.model'):
        Vectors.of_models(model(random_state(0), "base"), {"a": model(other, "its path")})


def test_a_model_that_holds_half_of_the_tensors_fits_and_one_with_fewer_does_not() -> None:
    base = random_state(0, shapes={f"w{i}": (2, 2) for i in range(8)})
    half = {name: base[name] for name in list(base)[:4]}
    found = Vectors.of_models(model(base, "base"), {"a": model(half, "a")})
    assert found.coverage.missing == {"a": ("w4", "w5", "w6", "w7")}
    fewer = {name: base[name] for name in list(base)[:3]}
    with pytest.raises(MismatchError, match="3 of the 8 tensors"):
        Vectors.of_models(model(base, "base"), {"a": model(fewer, "a")})


def test_other_shapes_are_refused_with_how_many_and_the_first() -> None:
    base = random_state(0)
    tuned = tune(base, 0)
    tuned["model.layers.0.mlp.up_proj.weight"] = torch.zeros(44, 16)
    tuned["model.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 44)
    with pytest.raises(
        MismatchError, match=r'"a".*: 2 of 9 tensors differ.*up_proj\.weight \[44, 16\] vs \[40, 16\]\)'
    ):
        Vectors.of_models(model(base, "base"), {"a": model(tuned, "its path")})


def test_another_vocabulary_is_refused_with_the_option() -> None:
    base = random_state(0)
    tuned = tune(base, 0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.zeros(58, 16)
    with pytest.raises(MismatchError, match=r"vocabularies differ \(58 and 50 tokens\): --extra-rows drop"):
        Vectors.of_models(model(base, "base"), {"a": model(tuned, "its path")})


def test_other_shapes_are_left_out_for_all_tasks_when_asked() -> None:
    base = random_state(0)
    states = {"a": tune(base, 0), "b": tune(base, 1)}
    states["b"]["lm_head.weight"] = torch.zeros(58, 16)
    vectors = Vectors.of_models(
        model(base, "base"), {task: model(state, task) for task, state in states.items()}, skip_mismatched=True
    )
    assert vectors.coverage.skipped == ("lm_head.weight",)
    assert set(vectors.names) == set(SHAPES) - {"lm_head.weight"}
    assert "1 tensors differ in shape (first: lm_head.weight); left out" in vectors.coverage.notes()


def test_weights_stored_as_integers_are_refused() -> None:
    """Quantised numbers mean something only with scales that are stored elsewhere."""
    base = random_state(0)
    tuned = tune(base, 0)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned[name] = (tuned[name] * 10).to(torch.int8)
    with pytest.raises(MismatchError, match=r'"a".*1 of 9.*up_proj\.weight, int8.*quantised'):
        Vectors.of_models(model(base, "base"), {"a": model(tuned, "its path")})


def test_a_base_without_floating_point_tensors_is_refused() -> None:
    state = {"w": torch.arange(3)}
    with pytest.raises(MismatchError, match="no floating-point tensor"):
        Vectors.of_models(model(state, "base"), {"a": model(state, "a")})


def test_task_arguments_are_names_and_paths() -> None:
    assert parse_tasks(["math=a/b", "code=c=d"]) == {"math": "a/b", "code": "c=d"}
    for bad in ("math", "=path", "math=", " =x"):
        with pytest.raises(ParameterError, match="is not NAME=PATH"):
            parse_tasks([bad])
    with pytest.raises(ParameterError, match=r'two tasks are named "a" \(x and y\)'):
        parse_tasks(["a=x", "a=y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directories_and_states_in_memory_give_the_same_deltas(tmp_path: Path, dtype: torch.dtype) -> None:
    base = random_state(0, dtype)
    tuned = tune(base, 1)
    paths = [save_checkpoint(tmp_path / name, state) for name, state in (("base", base), ("a", tuned))]
    from_files = Vectors.open(paths[0], {"a": paths[1]})
    from_memory = Vectors.of_models(model(base, "base"), {"a": model(tuned, "a")})
    for name in from_files.names:
        assert torch.equal(dense(from_files.deltas(name)[0]), dense(from_memory.deltas(name)[0]))
