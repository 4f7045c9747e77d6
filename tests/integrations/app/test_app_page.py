"""The app in a real browser: weights move, generations change, what is saved is the YAML that is shown, and what is
wrong is said on the page, not on the terminal."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from commands.command_line import tvbases
from tvbases_app import Mixer, launch
from zoo.hf_models import Family, fine_tunes, read_state, save_state

if TYPE_CHECKING:
    from commands.browser import Browser

pytest.importorskip("gradio")
pytest_plugins = ["zoo.hf_fixtures", "commands.browser"]
EPS = torch.finfo(torch.float32).eps  # mergekit adds up in float32, the app in float64
HERE = ("127.0.0.1", "localhost", None, "")
PROMPT = "word1 word2"
NAMES = ("math", "code", "a-task-with-a-<b>long</b>-name")
# What a person does: writes into a field, or moves a slider, and lets go.
SET = """
const field = document.querySelector(arguments[0]);
const kind = field.matches("textarea") ? HTMLTextAreaElement : HTMLInputElement;
Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, arguments[1]);
for (const what of ["input", "change", "pointerup"]) field.dispatchEvent(new Event(what, {bubbles: true}));
"""
CLICK = "document.querySelector(arguments[0]).click()"
VALUE = "return document.querySelector(arguments[0])?.value"
TEXT = "return document.querySelector(arguments[0])?.innerText"
CHANGED = "(was) => [document.querySelector('#after textarea').value].find((now) => now && now !== was)"
# The lines of an editor, which has those that are in sight only.
CODE = "return [...document.querySelectorAll('#recipe .cm-line')].map((line) => line.textContent).join('\\n')"
# Colours do not fade into each other.
STILL = """
const style = document.createElement("style");
style.textContent = "* { transition: none !important; }";
document.head.append(style);
"""
IDLE = "return document.querySelector('.generating, .progress-text') === null"
READY = "return document.querySelector('#weight-2 input[type=range]') !== null"


@pytest.fixture(scope="module")
def family(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Fine-tunes that have moved so far that they write something else."""
    place = tmp_path_factory.mktemp("app")
    states = fine_tunes(read_state(llama_base), 3, seed=0, size=0.3)
    tasks = {n: save_state(place / f"{i}", s, llama_base) for i, (n, s) in enumerate(zip(NAMES, states, strict=True))}
    return Family(llama_base, tasks)


@pytest.fixture(scope="module")
def mixer(family: Family) -> Mixer:
    return Mixer.open(str(family.base), {task: str(path) for task, path in family.tasks.items()})


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The machines that the program has looked for, other than this one."""
    return []


@pytest.fixture(scope="module")
def page(mixer: Mixer, browser: Browser, asked: list[str]) -> Iterator[Browser]:
    look_up = socket.getaddrinfo

    def noted(host: Any, *how: Any, **more: Any) -> Any:
        asked.extend([str(host)] if host not in HERE else [])
        return look_up(host, *how, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        served = launch(mixer)
        browser.look(1280, "light")
        browser.open(served.local_url)
        browser.wait(READY)
        yield browser
        served.close(verbose=False)


def move(page: Browser, place: int, weight: float) -> None:
    """A slider, and wait until the recipe says so."""
    page.run(SET, f"#weight-{place} input[type=range]", str(weight))
    page.wait(f"{CODE}.split('weight:')[{place + 1}].trim().startsWith(arguments[0])", f"{weight}")
    page.wait(IDLE)


def test_the_page_shows_the_tasks_and_what_they_share(page: Browser, mixer: Mixer) -> None:
    shown = page.run(TEXT, "#cosines")
    assert all(name in shown for name in NAMES)
    assert all(f"{value:g}" in shown for row in mixer.similarities for value in row[1:])
    page.run(CLICK, "#share")
    page.wait("return document.querySelector('#shared')?.innerText.includes(arguments[0])", f"{mixer.shared[0][1]}")


def test_a_moved_weight_changes_what_is_written_after_and_not_before(page: Browser, mixer: Mixer) -> None:
    page.run(SET, "#tokens input", "8")
    page.run(SET, "#prompt textarea", PROMPT)
    move(page, 0, 0.33)
    page.run(CLICK, "#write")
    first = page.wait(VALUE, "#after textarea")
    weights: dict[str, float] = dict.fromkeys(NAMES, 0.33)
    before = page.run(VALUE, "#before textarea")
    assert (before, first) == mixer.compare(PROMPT, weights, 8)
    move(page, 0, -1.5)  # and nothing is clicked
    second = page.wait(f"return ({CHANGED})(arguments[0])", first)
    assert (before, second) == mixer.compare(PROMPT, weights | {"math": -1.5}, 8)
    assert page.run(VALUE, "#before textarea") == before


def test_what_is_saved_is_what_merge_makes_of_the_yaml_that_is_shown(page: Browser, tmp_path: Path) -> None:
    move(page, 1, 0.75)
    (tmp_path / "shown.yml").write_text(page.run(CODE), encoding="utf-8")
    page.run(SET, "#out textarea", str(tmp_path / "mix"))
    page.run(CLICK, "#save")
    page.wait("return document.querySelector('#saved')?.innerText.includes('written')")
    assert tvbases("merge", tmp_path / "shown.yml", tmp_path / "merged").code == 0
    saved, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("mix", "merged"))
    assert set(saved) == set(merged)
    for name in merged:
        torch.testing.assert_close(saved[name], merged[name], rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize(("typed", "weight"), [("", 0.0), ("1e30", 2.0), ("nan", 0.0)])
def test_a_weight_that_is_none_becomes_what_the_field_then_shows(
    typed: str, weight: float, page: Browser, mixer: Mixer, capfd: pytest.CaptureFixture[str]
) -> None:
    move(page, 0, 0.5)
    page.run(SET, "#weight-0 input[type=number]", typed)
    page.run("document.querySelector('#weight-0 input[type=number]').dispatchEvent(new Event('blur'))")
    page.wait(f"{CODE}.split('weight:')[1].trim().startsWith(arguments[0])", f"{weight}")
    page.wait(IDLE)
    assert float(page.run(VALUE, "#weight-0 input[type=number]")) == weight
    assert "Traceback" not in capfd.readouterr().err


def test_a_number_of_tokens_that_is_none_is_said(page: Browser, capfd: pytest.CaptureFixture[str]) -> None:
    page.run(SET, "#tokens input", "")
    page.run(CLICK, "#write")
    page.wait("return document.querySelector('.toast-body')?.innerText.includes('from 1 to 1000')")
    page.run("document.querySelectorAll('.toast-close').forEach((button) => button.click())")
    page.run(SET, "#tokens input", "8")
    assert "Traceback" not in capfd.readouterr().err


def test_what_cannot_be_written_is_said_on_the_page(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    page.run(SET, "#out textarea", str(tmp_path))
    page.run(CLICK, "#save")
    page.wait("return document.querySelector('.toast-body')?.innerText.includes('mine.txt')")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_app_can_be_read_on_a_phone_and_a_desk_by_day_and_night(width: int, scheme: str, page: Browser) -> None:
    page.look(width, scheme)
    page.run(STILL)
    page.wait("return document.body.classList.contains('dark') === arguments[0]", scheme == "dark")
    seen = page.seen()
    assert seen["out"] == [] and seen["wide"] <= 0
    assert seen["contrast"] >= 4.5, seen["where"]
    assert (sum(seen["ground"]) < 384) == (scheme == "dark")


def test_nothing_is_asked_of_another_machine(page: Browser, asked: list[str]) -> None:
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and [name for name in loaded if not name.startswith(("http://127.0.0.1", "data:"))] == []
    assert asked == []


def test_models_are_named_on_the_page(
    browser: Browser, family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = launch()
    state = read_state(family.base)
    state["lm_head.weight"][0, 0] = float("nan")
    diverged = save_state(tmp_path / "diverged", state, family.base)

    def load(tasks: dict[str, Path]) -> None:
        browser.run(SET, "#base textarea", str(family.base))
        browser.run(SET, "#tasks textarea", "\n".join(f"{task}={path}" for task, path in tasks.items()))
        browser.run(CLICK, "#load")

    try:
        browser.open(served.local_url)
        browser.wait("return document.querySelector('#tasks textarea') !== null")
        assert browser.run("return document.querySelector('#weight-0')") is None
        load({"diverged": diverged})
        browser.wait("return document.querySelector('.toast-body')?.innerText.includes('NaN')")
        load(family.tasks)
        browser.wait(READY)
        browser.run(SET, "#prompt textarea", PROMPT)
        browser.run(SET, "#tokens input", "4")
        browser.run(CLICK, "#write")
        browser.wait(VALUE, "#before textarea")
        load(dict(list(family.tasks.items())[:2]))
        browser.wait("return document.querySelector('#weight-2') === null")
        browser.wait(IDLE)
        assert not browser.run(VALUE, "#before textarea"), "what other models have written is gone"
        assert "Traceback" not in capfd.readouterr().err
    finally:
        served.close(verbose=False)
