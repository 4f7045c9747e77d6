"""The examples run as they are, and every YAML example is accepted by the check that precedes a merge."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from tvbases_hf.basis import Basis
from tvbases_mergekit.command import merge
from zoo.hf_models import fine_tunes, make_bert, read_state, save_state

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yml"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models of the names in the examples."""
    directory = tmp_path_factory.mktemp("examples")
    base = make_bert(directory / "base")
    states = fine_tunes(read_state(base), 4, seed=0)
    for name, state in zip(("math", "code", "chat", "law"), states, strict=True):
        save_state(directory / name, state, base)
    return directory


def test_quickstart_restores_a_task_within_the_error_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path)
    printed = capsys.readouterr().out
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert f"code: relative error {basis.info.task_error[1]:.1%}" in printed
    assert (tmp_path / "code-restored" / "model.safetensors").is_file()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_example_merges(config: Path, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    merge([str(config), str(tmp_path / "merged"), "--quiet"])
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_there_are_yaml_examples() -> None:
    assert len(CONFIGS) >= 5


def test_the_style_example_trains_mixes_draws_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    example = runpy.run_path(str(ROOT / "examples" / "flux_style_mixing.py"))
    given = ["--quick", "--quiet", "--processes", "1", "--workdir", str(tmp_path)]
    found = example["main"]([*given, "--out", str(tmp_path / "styles.md"), "--picture", str(tmp_path / "styles.png")])
    assert (tmp_path / "styles.png").stat().st_size > 1000
    alone = {(q["family"], q["style"]) for q, _ in found["loras"]}
    assert alone == {("apart", "neon"), ("apart", "sepia"), ("apart", "cat")} | {
        ("house", style) for style in ("neon", "sepia", "framed")
    }
    assert len(found["base"].found) == 2 and len(found["screen"].found) == 4 + 4 + 2
    assert len(found["final"].found) == 3 + len(found["screen"].found) + 3  # drawn, at the best scales, at scale 1
    results = (tmp_path / "styles.md").read_text()
    assert "| steps |" in results and "A person and a style" in results
    assert "styles.png" in capsys.readouterr().out


def test_digits_take_the_place_of_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The person, and shapes where nothing else is asked, are as ever."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    from style_mixing.drawing import PERSON, SHAPES, draw, scenes

    content, colour = torch.arange(len(SHAPES)).repeat(3), torch.zeros(33, dtype=torch.int64)
    shapes, digits, again = (scenes(content, colour, 1, *what) for what in ((), ("digits",), ("digits",)))
    assert torch.equal(digits.distance, again.distance)
    person = content == list(SHAPES).index(PERSON)
    assert torch.equal(digits.distance[person], shapes.distance[person])
    assert not any(torch.equal(a, b) for a, b in zip(digits.distance[~person], shapes.distance[~person], strict=True))
    inside = (digits.distance[~person] < 0).double().mean((1, 2))
    assert inside.min() > 0.02 and inside.max() < 0.3
    edge = digits.distance[~person][:, [0, -1]]
    assert (edge > 0).all(), "whole digits, in the middle"
    steps = (digits.distance[~person].diff(dim=2) / (2 / 32)).abs()
    assert steps.max() < 1.6, "a distance: no steeper than the way between two pixels"
    assert draw(digits, ("sepia", "framed")).shape == (33, 3, 32, 32)
    assert len(scenes(torch.tensor([7, 7]), colour[:2], 1, "digits")) == 2, "of one digit alone"


def test_the_example_of_images_trains_and_runs_its_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "image_digits.py"))
    example["main"](["--quick", "--model", "clip", "--workdir", str(tmp_path)])
    printed = capfd.readouterr().out
    for command in ("inspect", "compress", "evaluate", "merge", "negate"):
        assert f"$ tvbases {command} " in printed
    assert "data upright" in printed and '"target" (accuracy of inverted)' in printed
    for directory in ("basis", "merged", "clean"):
        assert (tmp_path / "clip" / directory).is_dir()
