"""Merges of models whose architecture mergekit does not define: layers are told by the names, tower by tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands.command_line import refused, tvbases
from tvbases_hf.models.positions import positions_of
from zoo.adapter_zoo import config_of, make_zoo, merged_adapter, relative, weighted
from zoo.models import State, tune
from zoo.renamed import make, resave, saved

LAYERS = {
    "clip": ".layers.",
    "t5": ".block.",
    "vit": ".layer.",
    "llava": ".layers.",
    "nomic bert": ".layers.",
}


def configuration(name: str, directory: Path, **parameters: Any) -> tuple[Path, list[State]]:
    """A merge of two fine-tunes, and the three states."""
    states = [saved(make(name), directory / "base")]
    config = (directory / "base" / "config.json").read_bytes()
    for i in (1, 2):
        (directory / f"task{i}").mkdir()
        (directory / f"task{i}" / "config.json").write_bytes(config)
        states.append(tune(states[0], i))
        resave(directory / f"task{i}", states[i])
    models = [{"model": str(directory / f"task{i}"), "parameters": {"weight": 1.0}} for i in (1, 2)]
    merge = {"merge_method": "task_arithmetic", "base_model": str(directory / "base"), "models": models}
    (directory / "m.yml").write_text(json.dumps({**merge, "parameters": parameters}), encoding="utf-8")
    return directory / "m.yml", states


def check(out: Path, states: list[State], scale: dict[str, float]) -> None:
    found, (base, *tasks) = load_file(out / "model.safetensors"), states
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        if tensor.is_floating_point():
            change = sum((task[name].double() - tensor.double() for task in tasks), torch.zeros(()))
            assert torch.allclose(found[name].double(), tensor.double() + scale[name] * change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*LAYERS, "qwen2 vl"])
def test_a_scale_needs_no_layers(name: str, tmp_path: Path) -> None:
    file, states = configuration(name, tmp_path, **{"lambda": 0.5})
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0
    check(tmp_path / "out", states, dict.fromkeys(states[0], 0.5))


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_runs_from_the_first_to_the_last_layer_of_each_tower(name: str, tmp_path: Path) -> None:
    scale = [{"filter": LAYERS[name], "value": [0.0, 1.0]}, {"value": 0.25}]
    file, states = configuration(name, tmp_path, **{"lambda": scale})
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0
    places = positions_of(states[0])
    assert {place.share for place in places.values()} == {0.0, 1.0}
    assert len({place.tower for place in places.values()}) == (1 if name in ("vit", "nomic bert") else 2)
    check(tmp_path / "out", states, {n: places[n].share if n in places else 0.25 for n in states[0]})


def test_a_gradient_on_a_tensor_of_no_layer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file, states = configuration("clip", tmp_path, **{"lambda": [0.0, 1.0]})
    message = refused(tmp_path, "merge", file, tmp_path / "out", "--quiet")
    loose = len(states[0]) - len(positions_of(states[0]))
    assert f"logit_scale lies in no layer (as {loose} of {len(states[0])} tensors of {tmp_path / 'base'})" in message
    assert "[{filter: .layers., value: [...]}, {value: ...}]" in message


def test_a_base_without_a_configuration_merges(tmp_path: Path) -> None:
    zoo, weights = make_zoo(tmp_path / "zoo"), [0.7, -0.4, 1.1]
    (zoo.base / "config.json").unlink()
    found = merged_adapter(zoo, config_of(zoo, "task_arithmetic", weights), tmp_path / "out")
    assert relative(found, weighted(zoo, weights)) < 1e-5
