"""README.md of a mixed style file: what went into it, and how to load it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ParameterError
from ..storage.cards import header, hub_id
from ..text import code_block, code_span, in_markdown, quoted
from .mixed_file import read_recipe

BESIDES = ("styles", "tvbases_hf")
USE = """pipe.load_lora_weights("path/to/this/repository", weight_name={file})"""


def mix_card(file: Path) -> str:
    """Markdown with the Hub's header, of what the file's own header says; local styles are named by their names alone.

    Raises ParameterError for a file that is no mix.
    """
    recipe = read_recipe(file)
    if recipe is None:
        raise ParameterError(f'"{file}": not a mix of styles; it has no recipe in its header')
    styles = recipe["styles"]
    sources = {name: hub_id(style["source"]) for name, style in styles.items()}
    rows = (
        f"| {in_markdown(name)} | {style['scale']:g} | {code_span(source) if source else ''} |"
        for (name, style), source in zip(styles.items(), sources.values(), strict=True)
    )
    words = {word: value for word, value in recipe.items() if word not in BESIDES and value is not None}
    named = [source for source in sources.values() if source]
    lines = [
        *header("diffusers", "", "merge", ["lora", "text-to-image", "style-mixing"], named),
        "",
        f"# {' + '.join(in_markdown(name) for name in styles)}",
        "",
        f"{len(styles)} style LoRAs mixed into one by tvbases-hf {in_markdown(recipe['tvbases_hf'])}.",
        "",
        "| style | scale | from |",
        "|---|---|---|",
        *rows,
        "",
        ", ".join(f"{in_markdown(word)}: {code_span(str(value))}" for word, value in words.items()) + ".",
        "",
        code_block(USE.format(file=quoted(file.name)), "python"),
        "",
        "The licences of the base model and of the styles apply.",
    ]
    return "\n".join(lines) + "\n"
