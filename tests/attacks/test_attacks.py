"""Every known attack, and some seconds of random ones: exit code 2, one line, nothing changed, and never for long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import bases, merges  # noqa: F401  they note their attacks
from attacks.fuzzing import TARGETS, Figures, prepared, try_file
from attacks.kinds import ATTACKS
from attacks.workplace import Workplace, actions, held

# Inputs for each kind of file: always the same ones, for some seconds in all. `make fuzz` tries others.
FEW = 4


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield prepared(tmp_path_factory.mktemp("attacks"))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_one_line_and_changes_nothing(name: str, kept: Workplace, tmp_path: Path) -> None:
    attack, place = ATTACKS[name], kept.copied(tmp_path / "place")
    attack.spoil(place)
    for command in actions(place)[attack.commands][:3]:
        outcome = held(place, command, "models/online" if attack.commands == "online" else "out")
        assert outcome.code == 2, f"{command} took it"
        assert attack.says in outcome.err


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_are_damaged_at_random_break_no_promise(target: str, kept: Workplace) -> None:
    figures = Figures()
    try_file(kept, target, FEW, figures, None, time.monotonic() + 600)
    assert not figures.broken, "\n".join(figures.broken.values())
