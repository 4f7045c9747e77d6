"""Names of tasks, styles and tensors that a machine chooses: paths, markup, what no one sees, what systems reserve."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from hypothesis import strategies as st

from attacks.workplace import Action, Workplace

# Names that have led somewhere, been taken for markup, or been lost before.
HOSTILE_NAMES = (
    "", " ", ".", "..", "...", "-", "--out", "-x", "=", "a=b", "a,b", "a+b", "a@b", "hf://a", "~", "~root", "$HOME",
    "*", "../escaped", "../../escaped", "/etc/passwd", "a/b", "a/../b", "a\\b", "c:evil", "\\\\host\\share", "a:b",
    "a|b", "a?", "CON", "nul.txt", "Com1.safetensors", "a.", " a", "a ", "README.md", "config.json",
    "basis_config.json", ".hidden", "math", "MATH", "code", "base", "unique", "shared", "stra\u00dfe", "STRASSE",
    "\u00e9", "e\u0301", "\ufb01", "fi", "a" * 201, "a" * 300, "a" * 5000, "\u6570" * 80, "\U0001f600", "a\tb", "a\nb",
    "a\r\nb", "\x1b[2J", "\x1b]0;x\x07", "\x7f", "\x9b31m", "\u202eevil", "\u200b", "\u2028", "\ufeff", "\udcff",
    "[v1]", "[/v2]", "[link=javascript:x]x[/link]", "[bold]", ":smile:", "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>', "&amp;", "| a | b |", "`x`", "```", "![x](javascript:x)", "# x", "---",
    "$\\frac{1}{0}$", "$", "\\", "%s", "{0}", "{x}", "'", '"', "null", "true", "1", "1e5", "nan",
    "!!python/object:os.system", "&a", "*a", "weight", "lora_A", "x.lora_A.weight", "0.0",
    "model.layers.99.mlp.up_proj.weight", "module.a", "model..weight", ".weight", "layers.-1.x", "layers.1e9.x",
)  # fmt: skip
PARTS = st.one_of(st.sampled_from(HOSTILE_NAMES), st.text(max_size=6), st.sampled_from(["/", ".", "a", "\u0301"]))
NAMES = st.one_of(st.sampled_from(HOSTILE_NAMES), st.lists(PARTS, min_size=1, max_size=3).map("".join))


def _is_argument(text: str) -> bool:
    """Whether a system hands it to a program: no NUL, and of half characters those that stand for odd bytes only."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Naming:
    """Two names, and which of the commands is given them."""

    one: str
    other: str
    command: int


TASKS = st.builds(Naming, *[NAMES.filter(_is_argument)] * 2, st.integers(0, 90))
TENSORS = st.builds(Naming, NAMES, NAMES, st.integers(0, 90))


def with_tasks(place: Workplace, drawn: Naming) -> Action:
    """Every command that takes names of tasks or styles; the one that draws, which takes longest, most seldom."""

    def tasks(*models: str) -> list[object]:
        named = zip((drawn.one, drawn.other), models, strict=True)
        return ["--base", place / "base", *(part for name, m in named for part in ("--task", f"{name}={place / m}"))]

    out, full = ["--out", place.out, "--quiet"], tasks("math", "code")
    styles = [f"{drawn.one}={place / 'math.safetensors'}", f"{drawn.other}={place / 'code.safetensors'}"]
    commands: list[list[object]] = [
        ["decompose", *full, *out],
        ["extract", *full, "--rank", "1", *out],
        ["negate", *full, "--forget", drawn.one, "--alpha", "0.5", *out],
        ["compress", *full, "-m", "1", *out],
        ["compress", *tasks("math-lora", "code-lora"), "--budget", "0.9", *out],
        ["online", *full, "-m", "2", *out],
        ["mix-styles", "--style", styles[0], "--style", styles[1], "--scale", f"{drawn.one}=0.5", "--report",
         "--out", place.out / "mix.safetensors"],
        ["inspect", *full, "--layers", "--json", place.out / "report.json"],
    ]  # fmt: skip
    if drawn.command == 90:
        return ["inspect", *full, "--html", place.out / "page.html"]
    return commands[drawn.command % len(commands)]


def with_tensors(place: Workplace, drawn: Naming) -> dict[str, bytes]:
    """The files of all models, two of whose tensors have these names."""
    new = {"model.norm.weight": drawn.one, "model.layers.0.mlp.up_proj.weight": drawn.other}
    found = {}
    for model in ("base", "math", "code"):
        for file in (place / model).glob("*.safetensors"):
            found[f"{model}/{file.name}"] = _renamed(file.read_bytes(), new)
    file = place / "code/model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    index["weight_map"] = {new.get(name, name): shard for name, shard in index["weight_map"].items()}
    return found | {"code/model.safetensors.index.json": json.dumps(index).encode()}


def _renamed(content: bytes, new: dict[str, str]) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = json.dumps({new.get(name, name): about for name, about in header.items()}).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]
