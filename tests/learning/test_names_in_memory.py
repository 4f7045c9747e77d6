"""Methods that need data, on models whose weights transformers renames, stacks or splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.learning.data import TaskData, transformers_readout
from tvbases_hf.learning.inplace import InPlace, weights_of
from tvbases_hf.learning.with_data import DATA_METHODS
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import State, tune
from zoo.renamed import make, saved

TASKS = ("a", "b")
METHODS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "regmean": {},
    "adamerging_task": {"steps": 2},
    "localize": {"epochs": 1, "sparsity": 0.05, "lr": 100.0},
}


def hidden_readout(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For a model without a head: the first numbers of every token."""
    return model(**batch).last_hidden_state.flatten(0, 1)[:, :3], torch.zeros(6, dtype=torch.int64)


def data_of(name: str) -> list[TaskData]:
    ids = torch.arange(6)[None]
    batch: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    if name == "vit":
        generator = torch.Generator().manual_seed(3)
        batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1])}
    if name == "nomic bert":
        return [TaskData(task, [{"input_ids": ids}], hidden_readout) for task in TASKS]
    return [TaskData(task, [batch], transformers_readout) for task in TASKS]


def vectors_of(states: dict[str, State]) -> Vectors:
    base = Checkpoint.from_state_dict(states["base"], "base")
    return Vectors.of_models(base, {task: Checkpoint.from_state_dict(states[task], task) for task in TASKS})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "nomic bert", "mixtral"])
def test_a_method_finds_by_the_files_names_what_it_finds_by_the_models(method: str, name: str, tmp_path: Path) -> None:
    """Renamed, split and stacked: both ways the statistics are those of the same numbers."""
    model = make(name)
    disk = {"base": saved(model, tmp_path)}
    own = {"base": {n: t.clone() for n, t in model.state_dict().items()}}
    for task in TASKS:
        disk[task] = tune(disk["base"], ord(task), 0.1)
        change = {n: disk[task][n].double() - disk["base"][n].double() for n in disk[task]}
        with InPlace(model, change).changed(change.__getitem__):
            own[task] = {n: t.clone() for n, t in model.state_dict().items()}
    by_files, by_model = (
        DATA_METHODS[method](vectors_of(states), model, data_of(name), **METHODS[method]) for states in (disk, own)
    )
    with InPlace(model, by_model.names).changed(by_model.change):
        merged = {n: t.detach().clone() for n, t in weights_of(model, by_files.names).items()}
    for n, tensor in merged.items():
        expected = disk["base"][n].double() + dense(by_files.change(n)).reshape(tensor.shape)
        assert torch.allclose(tensor.double(), expected, rtol=1e-4, atol=1e-5), n
