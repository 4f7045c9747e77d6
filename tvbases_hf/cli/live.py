"""``tvbases app``: weights as sliders, generations side by side, in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, console
from .options import Device, OptionalBase, OptionalTask, TrustRemoteCode


@app.command("app", epilog="Example: tvbases app --base llama/ --task math=math-lora/ --task code=code-lora/")
def show_app(
    base: OptionalBase = None,
    task: OptionalTask = None,
    basis: Annotated[
        str | None,
        typer.Option(
            help="A basis directory instead of tasks; --base is then what it names, unless you give it.",
            metavar="PATH_OR_ID",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="The port on this machine; default: the first free one from 7860 on.", min=1, max=65535),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Mix tasks in the browser. Each task's weight is a slider; see what the model writes before and after.

    The page also shows how alike the tasks are and the YAML of the mix, and saves it. Without models it asks for them.
    It is served to this machine only, until you press Ctrl-C.
    """
    from tvbases_app import Mixer, launch

    from ..models.vectors import parse_tasks

    named = bool(base or task or basis)
    mixer = Mixer.open(base or "", parse_tasks(task or ()), basis or "", device) if named else None
    page = launch(mixer, port=port, device=device, inbrowser=open_browser)
    console.print(f"{page.local_url} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
    page.block_thread()
