"""A Space that mixes the tasks which its owner has chosen: see README.md beside this file."""

import os

import gradio as gr

from tvbases_app import Mixer, build, look
from tvbases_hf.models.vectors import parse_tasks

mixer = Mixer.open(
    base=os.environ.get("BASE", ""),
    tasks=parse_tasks(os.environ.get("TASKS", "").split()),
    basis=os.environ.get("BASIS", ""),
)
page = build(mixer, public=True)

if __name__ == "__main__":
    page.launch(**look(gr))
