"""Attacks by names that become paths, on files that are not ours, and by what lies beside the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from unittest.mock import patch

from attacks.kinds import attack
from attacks.workplace import Action, Workplace, actions
from commands.command_line import tvbases


def named(place: Workplace, one: str, other: str = "code") -> list[Action]:
    """The commands that make a folder of each task, the tasks called so."""
    tasks = ["--base", place / "base", "--task", f"{one}={place / 'math'}", "--task", f"{other}={place / 'code'}"]
    end = ["--out", place.out, "--quiet"]
    return [["decompose", *tasks, *end], ["extract", *tasks, "--rank", "1", *end]]


@attack("", 'task "../../../escaped" cannot be the name of a file: it has / in it')
def a_task_above_the_output(place: Workplace) -> Sequence[Action]:
    return named(place, "../../../escaped")


@attack("", "cannot be the name of a file: it means another directory")
def a_task_that_is_the_output_itself(place: Workplace) -> Sequence[Action]:
    return named(place, ".")


@attack("", "cannot be the name of a file: it has / in it")
def a_task_in_the_folder_of_another(place: Workplace) -> Sequence[Action]:
    return named(place, "code/b")


@attack("", "cannot be the name of a file: it has 300 bytes, more than 200")
def a_task_with_a_name_of_300_characters(place: Workplace) -> Sequence[Action]:
    return named(place, "x" * 300)


@attack("", "would be one file where upper and lower case")
def two_tasks_in_one_folder(place: Workplace) -> Sequence[Action]:
    """On a Mac, and on Windows."""
    return named(place, "Code")


# What is not ours


@attack("", "exists and this command did not write it")
def a_report_in_the_place_of_weights(place: Workplace) -> Sequence[Action]:
    weights = place / "base/model.safetensors"
    return [["inspect", *place.tasks(), option, weights] for option in ("--json", "--html", "--plot")]


@attack("", "exists and this command did not write it")
def a_mix_in_the_place_of_a_style(place: Workplace) -> Sequence[Action]:
    styles = [part for name in ("math", "code") for part in ("--style", f"{name}={place / name}.safetensors")]
    return [["mix-styles", *styles, "--out", place / "chat.safetensors"]]


@attack("writing", "exists and holds something that this command did not write (1 entries, first: notes.txt)")
def an_output_that_holds_something_else(place: Workplace) -> None:
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")


@attack("", 'README.md" was changed since it was written')
def a_card_that_somebody_has_changed(place: Workplace) -> Sequence[Action]:
    command = ["extract", *place.tasks(), "--rank", "1", "--out", place.out, "--quiet"]
    assert tvbases(*command).code == 0
    card = place.out / "math/README.md"
    card.write_text(card.read_text(encoding="utf-8") + "mine")
    return [command]


@attack("", "is one of the models")
def an_output_that_is_an_input(place: Workplace) -> Sequence[Action]:
    """An earlier output of ours, which may be replaced otherwise."""
    assert tvbases("merge", place / "merge.yml", place.out, "--quiet").code == 0
    tasks = ["--base", place / "base", "--task", f"math={place.out}", "--task", f"code={place / 'code'}"]
    return [["negate", *tasks, "--forget", "math", "--alpha", "0.5", "--out", place.out, "--quiet"]]


# What travels


@attack("writing", "is a link to /etc/passwd, outside of the model")
def a_tokenizer_that_is_a_link_out_of_the_folder(place: Workplace) -> None:
    (place / "base/tokenizer.json").unlink()
    (place / "base/tokenizer.json").symlink_to("/etc/passwd")


@attack("", "", code=0)
def secrets_beside_the_weights(place: Workplace) -> Sequence[Action]:
    secrets = ("id_rsa", ".env", "model.ckpt", "training_args.bin", "notes.md")
    for name in secrets:
        (place / "base" / name).write_text("secret")

    def merge() -> None:
        command = actions(place)["yaml"][0]
        assert isinstance(command, Sequence) and tvbases(*command).code == 0
        assert not [file for file in place.out.rglob("*") if file.name in secrets]

    return [merge]


# The machine


@attack("writing", "0 B are free. Nothing was left behind")
@contextlib.contextmanager
def a_disk_that_is_full(place: Workplace) -> Iterator[None]:
    """Found before anything is written; tests/storage/test_machine.py has what is found in mid-write."""
    with patch("shutil.disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=1 << 40, free=0)):
        yield
