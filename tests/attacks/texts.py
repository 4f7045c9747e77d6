"""Attacks by names that a terminal, a page or a card would take for more than text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attacks.kinds import NAN, attack, rewrite
from attacks.names import Naming, with_tensors
from attacks.workplace import Action, Workplace


def inspecting(place: Workplace, name: str) -> list[Action]:
    return [["inspect", "--base", place / "base", "--task", f"{name}={place / 'math'}"]]


@attack("", "math[v1]", code=0)
def a_task_in_brackets(place: Workplace) -> Sequence[Action]:
    return inspecting(place, "math[v1]")


@attack("", "[/x][bold]:smile:", code=0)
def a_task_that_closes_what_is_not_open(place: Workplace) -> Sequence[Action]:
    """A traceback, once, after the work was done."""
    return inspecting(place, "[/x][bold]:smile:")


@attack("", 'task "\\x1b[2J": its name has characters that cannot be seen')
def a_task_that_clears_the_screen(place: Workplace) -> Sequence[Action]:
    return inspecting(place, "\x1b[2J")


@attack("model", "\\x1b]0;x\\x07")
def a_tensor_that_renames_the_window(place: Workplace) -> None:
    name = "\x1b]0;x\x07"
    for file, content in with_tensors(place, Naming(name, "other", 0)).items():
        (place / file).write_bytes(content)
    rewrite(place / "math/model.safetensors", lambda s: s.update({name: torch.full((16,), NAN)}))


@attack("", "", code=0)
def a_script_in_a_card(place: Workplace) -> Sequence[Action]:
    """``workplace.held`` looks for it in all pages that were written."""
    tasks = [f"<script>alert(1)</script>={place / 'math'}", f"| a | `x`={place / 'code'}"]
    models = ["--base", place / "base", *(part for task in tasks for part in ("--task", task))]
    return [["compress", *models, "-m", "1", "--out", place.out, "--quiet"]]
