"""The app's page, made with Gradio: what a Mixer does, behind sliders and buttons."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tvbases_hf.errors import MissingExtraError, ParameterError, TvbasesError, of_system
from tvbases_hf.models.vectors import parse_tasks
from tvbases_hf.text import in_html

from .mixer import TOKENS, Mixer

TITLE = "tvbases"
LEAST, MOST, STEP = -2.0, 2.0, 0.01
MOST_TOKENS = 1000
# Seconds that a file for download is kept.
KEPT = 3600
# Nothing is loaded from elsewhere: the system's own fonts.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# Gradio's own colours are too pale to be read by everybody.
COLOURS = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "block_label_text_color": "*neutral_700",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_800",
    "button_primary_background_fill_hover": "*primary_800",
}


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError(f'the app needs Gradio ({error}); pip install "tvbases-hf[app]"') from error
    return gradio


def build(mixer: Mixer | None = None, *, public: bool = False, device: str = "cpu") -> Any:
    """The page, as gradio.Blocks; ``launch`` it, or let a Space do so.

    Args:
        mixer: what is shown first; None: the page asks for models.
        public: strangers use it: they load no other models, and what they save is a file to download.
        device: where the model is that the page asks for.

    Raises MissingExtraError without Gradio, ParameterError for a public page without models.
    """
    gr = _gradio()
    if public and mixer is None:
        raise ParameterError("a public page shows models that its owner has chosen; give them")
    if mixer is not None:
        _ = mixer.similarities  # what is wrong with a model is said now, where the page would show a traceback
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        state = gr.State()
        heading = gr.Markdown(_heading(mixer))
        if not public:
            _asking(gr, state, heading, device, opened=mixer is None)
        page.load(lambda: mixer, None, state, show_progress="hidden", api_visibility="private")

        # Not when the page is loaded as well: the second of two renders takes away what the first has shown.
        @gr.render(inputs=state, triggers=[state.change])
        def _(loaded: Mixer | None) -> None:
            if loaded is not None:
                _similarities(gr, loaded)
                _mixing(gr, loaded, public)

    return page


def launch(mixer: Mixer | None = None, *, port: int | None = None, device: str = "cpu", **how: Any) -> Any:
    """The page, served to this machine only (``local_url``) until it is closed, or ``block_thread`` ends by Ctrl-C.

    ``port`` None is the first free one from 7860 on; ``how`` as gradio.Blocks.launch takes it. Raises ParameterError
    for a port that is taken.
    """
    gr = _gradio()
    page = build(mixer, device=device)
    how = {"server_name": "127.0.0.1"} | look(gr) | how
    try:
        page.launch(server_port=port, share=False, quiet=True, prevent_thread_lock=True, **how)
    except OSError as error:
        taken = "no port is free" if port is None else f"port {port} is taken"
        raise ParameterError(f"{taken}; give another one with --port") from error
    return page


def look(gr: Any) -> dict[str, Any]:
    """How the page looks, as gradio.Blocks.launch takes it."""
    return {"theme": gr.themes.Default(**FONTS, primary_hue="blue").set(**COLOURS), "footer_links": []}


def _heading(mixer: Mixer | None) -> str:
    if mixer is None:
        return "# Task vectors\nName a base and fine-tunes of it, or a basis directory."
    count = len(mixer.tasks)
    return f"# Task vectors\n{count} task{'s' if count > 1 else ''} over {in_html(mixer.vectors.base.label)}"


def _saying(gr: Any, act: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong for a reason that the user can mend is shown on the page."""

    def acting(*given: Any) -> Any:
        try:
            return act(*given)
        except (TvbasesError, OSError, MemoryError) as error:
            said = str(error) if isinstance(error, TvbasesError) else of_system(error)
            raise gr.Error(in_html(said), duration=None, print_exception=False) from error

    return acting


def _asking(gr: Any, state: Any, heading: Any, device: str, opened: bool) -> None:
    def load(base: str, tasks: str, basis: str) -> tuple[Mixer, str]:
        lines = [line.strip() for line in tasks.splitlines() if line.strip()]
        found = Mixer.open(base.strip(), parse_tasks(lines), basis.strip(), device)
        _ = found.similarities  # as in build
        return found, _heading(found)

    with gr.Accordion("Models", open=opened):
        base = gr.Textbox(label="Base", info="A directory or a Hub id.", elem_id="base")
        tasks = gr.Textbox(label="Tasks", lines=4, info="NAME=PATH_OR_ID, one a line.", elem_id="tasks")
        basis = gr.Textbox(label="Or a basis directory", elem_id="basis")
        button = gr.Button("Load", elem_id="load")
    button.click(_saying(gr, load), [base, tasks, basis], [state, heading], api_visibility="private")


def _similarities(gr: Any, mixer: Mixer) -> None:
    headers = ["task", "length", *mixer.tasks]
    gr.Markdown(
        "## How alike are they?\nCosines of the task vectors: 1 for the same direction, 0 for nothing in common."
    )
    gr.Dataframe(mixer.similarities, headers=headers, interactive=False, show_label=False, elem_id="cosines")
    button = gr.Button("What do they share?", elem_id="share")
    headers = ["pair", "shared", "by chance"]
    table = gr.Dataframe(headers=headers, interactive=False, show_label=False, visible=False, elem_id="shared")
    shown = lambda: gr.Dataframe(mixer.shared, headers=headers, visible=True)  # noqa: E731
    button.click(_saying(gr, shown), None, table, api_visibility="private")


def _mixing(gr: Any, mixer: Mixer, public: bool) -> None:
    start = max(STEP, round(1 / len(mixer.tasks), 2))

    def weights(values: tuple[float | None, ...]) -> dict[str, float]:
        return dict(zip(mixer.tasks, map(_as_shown, values), strict=True))

    def compare(prompt: str, tokens: float | None, *values: float | None) -> tuple[str, str]:
        if tokens is None or not 1 <= tokens <= MOST_TOKENS:
            raise ParameterError(f"Tokens: give a number from 1 to {MOST_TOKENS}")
        return mixer.compare(prompt, weights(values), int(tokens)) if prompt.strip() else ("", "")

    gr.Markdown("## Mix them\nThe base plus the task vectors times these weights. Below 0 a task is forgotten.")
    with gr.Row():
        sliders = [
            gr.Slider(LEAST, MOST, start, step=STEP, label=task, interactive=True, elem_id=f"weight-{place}")
            for place, task in enumerate(mixer.tasks)
        ]
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", scale=4, elem_id="prompt")
        tokens = gr.Number(TOKENS, label="Tokens", precision=0, minimum=1, maximum=MOST_TOKENS, elem_id="tokens")
    for field in (*sliders, tokens):
        field.preprocess = lambda value: value  # as it was typed: Gradio's own check ends in a traceback
    button = gr.Button("Write", variant="primary", elem_id="write")
    with gr.Row():
        before = gr.Textbox("", label="Before: the base", lines=6, interactive=False, elem_id="before")
        after = gr.Textbox("", label="After: with these weights", lines=6, interactive=False, elem_id="after")
    values = dict.fromkeys(mixer.tasks, start)
    recipe = gr.Code(mixer.recipe(values), label="What you see", interactive=False, elem_id="recipe")
    write = _saying(gr, compare)
    private: dict[str, Any] = {"api_visibility": "private"}
    gr.on([button.click, prompt.submit], write, [prompt, tokens, *sliders], [before, after], **private)
    for slider in sliders:
        slider.release(write, [prompt, tokens, *sliders], [before, after], trigger_mode="always_last", **private)
        slider.change(
            _saying(gr, lambda *now: mixer.recipe(weights(now))), sliders, recipe, show_progress="hidden", **private
        )
    _saving(gr, mixer, sliders, weights, public)


def _as_shown(typed: float | None) -> float:
    """What a slider shows once its field is left: 0 for what is no number, and no more than its ends."""
    return min(max(typed or 0.0, LEAST), MOST)


def _saving(gr: Any, mixer: Mixer, sliders: list[Any], weights: Callable[..., dict[str, float]], public: bool) -> None:
    def save(out: str, adapter: bool, *values: float | None) -> str:
        if not out.strip():
            raise ParameterError("name the directory to write")
        written = mixer.save(out.strip(), weights(values), adapter=adapter)
        return f"written: {in_html(written)}"

    def pack(*values: float | None) -> str:
        out = mixer.save(Path(holder.name) / "merged", weights(values), adapter=mixer.holds_adapters)
        return shutil.make_archive(str(out), "zip", out)

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
    if public:
        holder = tempfile.TemporaryDirectory(prefix="tvbases-")  # one mix at a time, which the next one replaces
        button = gr.Button("Save", elem_id="save")
        file = gr.File(label="The mix, as a zip", interactive=False, elem_id="file")
        button.click(_saying(gr, pack), sliders, file, **private)
        return
    with gr.Row():
        out = gr.Textbox(label="Save to", info="A new directory.", scale=4, elem_id="out")
        adapter = gr.Checkbox(
            mixer.holds_adapters, label="As an adapter", interactive=mixer.holds_adapters, elem_id="adapter"
        )
    button, said = gr.Button("Save", elem_id="save"), gr.Markdown("", elem_id="saved")
    button.click(_saying(gr, save), [out, adapter, *sliders], said, **private)
