"""What the app does, without a browser: the mix in memory, its recipe and its files are one sum, computed densely."""

from __future__ import annotations

import runpy
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands.command_line import refused, snapshot, tvbases
from tvbases_app import Mixer, build
from tvbases_app.beside import beside, can_be_beside
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import Basis
from tvbases_hf.errors import CheckpointError, MissingExtraError, OutputError, ParameterError
from tvbases_hf.models.vectors import Vectors
from zoo.adapter_zoo import Zoo, adapter_changes, make_zoo, relative
from zoo.hf_models import read_state

pytest_plugins = ["zoo.hf_fixtures"]
ROOT = Path(__file__).parents[3]
SPACE = ROOT / "examples" / "space"
EPS = torch.finfo(torch.float32).eps
WEIGHTS = {"math": 0.75, "code": -0.5, "chat": 0.0}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def bases(zoo: Zoo) -> dict[str, Path]:
    """Bases that keep every task, of checkpoints and of adapters."""
    places = {"basis of checkpoints": zoo.full, "basis of adapters": zoo.adapters}
    for name, tasks in places.items():
        basis = Basis.build(Vectors.open(zoo.base, tasks), len(tasks))
        basis.save_pretrained(zoo.base.parent / name)
    return {name: zoo.base.parent / name for name in places}


def opened(zoo: Zoo, bases: dict[str, Path], kind: str) -> Mixer:
    if kind in bases:
        return Mixer.open(basis=str(bases[kind]))
    tasks = zoo.full if kind == "checkpoints" else zoo.adapters
    return Mixer.open(str(zoo.base), {task: str(path) for task, path in tasks.items()})


def summed(zoo: Zoo) -> State:
    """The oracle: sum_t w_t tau_t."""
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    return {name: torch.tensordot(weights, tau.double(), 1) for name, tau in zoo.tau.items()}


KINDS = ["adapters", "basis of adapters", "basis of checkpoints", "checkpoints"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_the_weighted_sum(kind: str, zoo: Zoo, bases: dict[str, Path]) -> None:
    mixer = opened(zoo, bases, kind)
    change: Any = mixer.change(WEIGHTS)
    expected = summed(zoo)
    found = {name: dense(change(name)).double().reshape(expected[name].shape) for name in mixer.vectors.names}
    assert relative(found, {name: expected[name] for name in found}) < 20 * EPS
    assert set(expected) - set(found) <= {name for name, tau in expected.items() if not tau.any()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_base_and_that_sum(kind: str, zoo: Zoo, bases: dict[str, Path], tmp_path: Path) -> None:
    mixer = opened(zoo, bases, kind)
    mixer.save(tmp_path / "mix", WEIGHTS)
    origin = {name: tensor.double() for name, tensor in read_state(zoo.base).items()}
    found = {name: tensor.double() - origin[name] for name, tensor in read_state(tmp_path / "mix").items()}
    error = relative(found, summed(zoo))
    assert error < 1e-6 and set(found) == set(origin)
    if mixer.holds_adapters:
        mixer.save(tmp_path / "lora", WEIGHTS, adapter=True)
        found = adapter_changes(zoo.base, tmp_path / "lora")
        expected = summed(zoo)
        assert relative(found, {name: expected[name] for name in found}) < 20 * EPS


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_writes_what_is_saved(
    kind: str, zoo: Zoo, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = opened(zoo, bases, kind)
    mixer.save(tmp_path / "saved", WEIGHTS, adapter=mixer.holds_adapters)
    recipe = mixer.recipe(WEIGHTS)
    monkeypatch.chdir(tmp_path)
    if mixer.basis is None:
        (tmp_path / "recipe.yml").write_text(recipe, encoding="utf-8")
        done = tvbases("merge", "recipe.yml", "merged", *(["--adapter"] if mixer.holds_adapters else []))
        assert done.code == 0, done.err
    else:
        exec(recipe, {})
    read: Any = (lambda path: adapter_changes(zoo.base, path)) if mixer.holds_adapters else read_state
    assert relative(read(tmp_path / "merged"), read(tmp_path / "saved")) < 4 * EPS


@pytest.mark.parametrize("kind", KINDS)
def test_generations_are_those_of_the_saved_model_and_the_model_is_as_it_was(
    kind: str, zoo: Zoo, bases: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mixer = opened(zoo, bases, kind)
    before, after = mixer.compare("word1 word2 word3", WEIGHTS, 6)
    kept = {name: tensor.clone() for name, tensor in mixer._model.model.state_dict().items()}
    assert mixer.compare("word1 word2 word3", WEIGHTS, 6) == (before, after)
    assert all(tensor.equal(kept[name]) for name, tensor in mixer._model.model.state_dict().items())
    mixer.save(tmp_path / "mix", WEIGHTS)

    def written(path: Path) -> str:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        ids = tokenizer("word1 word2 word3", return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(said, skip_special_tokens=True).strip()

    assert (before, after) == (written(zoo.base), written(tmp_path / "mix")) and before != after


@pytest.mark.parametrize("kind", ["adapters", "basis of adapters"])
def test_factors_beside_the_layers_are_the_change_in_the_weights(kind: str, zoo: Zoo, bases: dict[str, Path]) -> None:
    mixer, ids = opened(zoo, bases, kind), torch.arange(4, 24).reshape(2, 10)
    model: Any = mixer._model.model.double()
    change, names = mixer.change(WEIGHTS), mixer.vectors.names
    plain = model(ids).logits
    assert can_be_beside(model, names, change)
    with beside(model, names, change):
        found = model(ids).logits
    with mixer._in_place.changed(change):
        expected = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected - plain).norm() > 0.01 * plain.norm() and model(ids).logits.equal(plain)
    assert not can_be_beside(model, names, Mixer.open(str(zoo.base), {"math": str(zoo.full["math"])}).change({}))


def test_what_is_wrong_is_said(zoo: Zoo, bases: dict[str, Path], tmp_path: Path) -> None:
    tasks = {task: str(path) for task, path in zoo.full.items()}
    mixer = Mixer.open(str(zoo.base), tasks)
    for given in ({}, {"tasks": tasks, "basis": str(bases["basis of checkpoints"])}):
        with pytest.raises(ParameterError, match="give tasks, each as"):
            Mixer.open(str(zoo.base), **given)
    with pytest.raises(ParameterError, match="need the base"):
        Mixer.open("", tasks)
    wrong: list[dict[str, Any]] = [{"maths": 1.0}, {"math": float("nan")}, {"math": None}, {"math": ""}]
    for weights in wrong:
        with pytest.raises(ParameterError, match="a weight is a number for one of math, code, chat"):
            mixer.recipe(weights)
    with pytest.raises(ParameterError, match="prompt"):
        mixer.compare(" ", WEIGHTS)
    with pytest.raises(ParameterError, match="at least one token"):
        mixer.compare("word1", WEIGHTS, 0)
    with pytest.raises(ParameterError, match="NaN"):
        mixer.compare("word1", {"math": 1e38})
    with pytest.raises(ParameterError, match="no home directory for ~nobody-of-this-name"):
        mixer.save("~nobody-of-this-name/mix", WEIGHTS)
    with pytest.raises(ParameterError, match="full checkpoints"):
        mixer.save(tmp_path / "lora", WEIGHTS, adapter=True)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"mine\.txt"):
        mixer.save(tmp_path, WEIGHTS)
    assert snapshot(tmp_path) == before


def test_a_prompt_that_the_model_cannot_continue_is_said(zoo: Zoo, bases: dict[str, Path]) -> None:
    mixer = opened(zoo, bases, "adapters")
    mixer._model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ParameterError, match="a LlamaForCausalLM cannot continue this prompt: roles must alternate"):
        mixer.compare("word1", WEIGHTS)


def test_a_base_that_is_gone_is_said_without_asking_the_hub(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(zoo.base, tmp_path / "base")
    mixer = Mixer.open(str(tmp_path / "base"), {"math": str(zoo.full["math"])})
    shutil.rmtree(tmp_path / "base")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        mixer.compare("word1", {})


def test_a_file_of_weights_has_its_configuration_beside_it(zoo: Zoo, tmp_path: Path) -> None:
    tasks = {"math": str(zoo.full["math"])}
    found = Mixer.open(str(zoo.base / "model.safetensors"), tasks).compare("word1", {}, 4)
    assert found == Mixer.open(str(zoo.base), tasks).compare("word1", {}, 4)
    (tmp_path / "other.safetensors").write_bytes((zoo.base / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is a file of weights"):
        Mixer.open(str(tmp_path / "other.safetensors"), tasks).compare("word1", {})


def test_a_base_that_writes_no_text_is_compared_all_the_same_but_for_generations(bert: Any) -> None:
    mixer = Mixer.open(str(bert.base), {task: str(path) for task, path in bert.tasks.items()})
    assert len(mixer.similarities) == len(mixer.shared) == 3
    with pytest.raises(ParameterError, match="writes no text"):
        mixer.compare("word1", {})


def test_a_public_page_asks_for_no_paths(zoo: Zoo) -> None:
    pytest.importorskip("gradio")
    mixer = Mixer.open(str(zoo.base), {task: str(path) for task, path in zoo.full.items()})
    asked = lambda page: {part["props"].get("elem_id") for part in page.config["components"]}  # noqa: E731
    assert {"base", "tasks", "basis", "load"} <= asked(build(mixer))
    assert not {"base", "tasks", "basis", "load"} & asked(build(mixer, public=True))
    with pytest.raises(ParameterError, match="public page"):
        build(public=True)


def test_the_space_shows_the_models_that_its_variables_name(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import SpaceCard

    pytest.importorskip("gradio")
    monkeypatch.setenv("BASE", str(zoo.base))
    monkeypatch.setenv("TASKS", " ".join(f"{task}={path}" for task, path in zoo.adapters.items()))
    found = runpy.run_path(str(SPACE / "app.py"))
    assert found["mixer"].tasks == tuple(zoo.adapters) and found["mixer"].holds_adapters
    card: Any = SpaceCard.load(SPACE / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and card.data.license == "apache-2.0"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={card.data.sdk_version}\n" in pins, "what was tried"


def test_without_gradio_the_extra_is_named_and_wrong_models_are_refused(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "base" in refused(tmp_path, "app", "--task", f"math={zoo.full['math']}")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tvbases-hf\[app\]"'):
        build()
    assert 'pip install "tvbases-hf[app]"' in refused(tmp_path, "app")
