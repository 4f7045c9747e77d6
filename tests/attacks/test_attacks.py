"""Every known attack, and some seconds of random ones: exit code 2, one line, nothing changed, and never for long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import bases, merges, places, texts  # noqa: F401  they note their attacks
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
def test_an_attack_ends_as_it_must(name: str, kept: Workplace, tmp_path: Path) -> None:
    attack, place = ATTACKS[name], kept.copied(tmp_path / "place")
    with contextlib.ExitStack() as during:
        found = attack.spoil(place)
        if isinstance(found, contextlib.AbstractContextManager):
            found = during.enter_context(found)
        for command in found or actions(place)[attack.commands][:3]:
            outcome = held(place, command, "models/online" if attack.commands == "online" else "out")
            assert outcome.code == attack.code, f"{command}: {outcome}"
            assert attack.says in (outcome.err if outcome.code else outcome.out)


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_are_damaged_at_random_break_no_promise(target: str, kept: Workplace) -> None:
    figures = Figures()
    try_file(kept, target, FEW, figures, None, time.monotonic() + 600)
    assert not figures.broken, "\n".join(figures.broken.values())
