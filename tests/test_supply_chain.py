"""No code comes from data: nothing is evaluated, unpickled or imported because a file says so. And the network."""

from __future__ import annotations

import ast
import importlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from commands.command_line import inputs, root, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf.basis.compress import compress
from tvbases_hf.cli import app
from zoo.hf_models import Family
from zoo.lora_files import write
from zoo.pipelines import FLUX_MODULES, style
from zoo.planted_adapters import planted_adapters

pytest_plugins = ["zoo.hf_fixtures"]
ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for folder in ("tvbases_hf", "integrations", "examples") for file in (ROOT / folder).rglob("*.py")
)
# Each runs what it is given, or loads it in a way that may.
CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"}
CODE |= {
    f"{module}.{call}"
    for module in ("pickle", "cPickle", "dill", "cloudpickle", "marshal")
    for call in ("load", "loads")
}
CODE |= {"pickle.Unpickler", "joblib.load", "shelve.open", "jsonpickle.decode", "pandas.read_pickle", "pd.read_pickle"}
CODE |= {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"}
# Modules that import by a name that is not written there: their own submodules, mergekit's, and what --scorer names.
IMPORTING = {
    "tvbases_hf/__init__.py",
    "tvbases_hf/bases/__init__.py",
    "tvbases_hf/methods/registry.py",
    "integrations/tvbases_lm_eval/__init__.py",
    "integrations/tvbases_lm_eval/scorers.py",
    "integrations/tvbases_diffusers/__init__.py",
    "integrations/tvbases_mergekit/light.py",
}


WORDS = {"trust_remote_code", "allow_pickle", "shell"}
# Off, or what the user has asked for with --trust-remote-code.
ASKED = {"False", *(f"{asked}.trust_remote_code" for asked in ("options", "current()", "run.current()"))}
OPTION = "_in_run(context, trust_remote_code=True)"


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in this code runs code, or may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in WORDS:
            if ast.unparse(node.value) not in ASKED:
                yield f"{node.value.lineno}: {node.arg}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in WORDS and ast.unparse(value) not in ASKED:
                    yield f"{node.lineno}: {key.value}"
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in CODE or (called == "torch.load" and given.get("weights_only") != "True"):
                yield f"{node.lineno}: {called}"
            if called == "yaml.load" and [ast.unparse(loader) for loader in node.args[1:]] != ["yaml.SafeLoader"]:
                yield f"{node.lineno}: {called}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_code_is_made_of_data(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.relative_to(ROOT).as_posix() == "tvbases_hf/cli/options.py":
        assert text.count(OPTION) == 1  # what the option does
        text = text.replace(OPTION, "pass")
    tree = ast.parse(text)
    assert not list(unsafe(tree))
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _imports(node)]
    assert not named or file.relative_to(ROOT).as_posix() in IMPORTING


def _imports(call: ast.Call) -> bool:
    """By a name that is computed."""
    if ast.unparse(call.func).rpartition(".")[2] != "import_module":
        return False
    return not (call.args and isinstance(call.args[0], ast.Constant))


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "pickle.loads(data)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "load(**{'trust_remote_code': True})",
        "subprocess.run(line, shell=True)",
    ],
)
def test_each_of_these_would_be_found(code: str) -> None:
    assert len(list(unsafe(ast.parse(code)))) == 1


def test_the_start_up_hook_runs_a_line_of_our_own_and_nothing_else() -> None:
    """Python runs a .pth line that begins with import: it is a constant, without anything that is filled in."""
    hook = importlib.import_module("tvbases_mergekit.hook")
    assert (
        f'import sys; exec("try:\\n import {hook.MODULE} as hook; hook.start()\\nexcept Exception: pass")\n'
        == hook.PTH_LINE
    )


# --- the network ------------------------------------------------------------------------------------------------------


def out(pair: Family, name: str = "out") -> list[object]:
    return ["--out", root(pair) / name]


def merging(pair: Family) -> list[object]:
    return [write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1)), root(pair) / "out"]


def mixing(pair: Family) -> list[object]:
    files = []
    for seed, name in enumerate("ab"):
        (root(pair) / name).mkdir()
        files += ["--style", f"{name}={write(root(pair) / name, style(seed, FLUX_MODULES))}"]
    return [*files, *out(pair, "mix.safetensors")]


def prose(pair: Family) -> str:
    text = root(pair) / "prose.txt"
    text.write_text("word1 word2 word3\n" * 20, encoding="utf-8")
    return f"text:{text}"


def evaluating(pair: Family) -> list[object]:
    return [pair.tasks["math"], "--base", pair.base, "--control", prose(pair), "--device", "cpu"]


def tuning(pair: Family) -> list[object]:
    """These models are worse on the text than their base, so that one step away from them is better."""
    config = write_config(root(pair) / "merge.yml", merge_config(pair, "task_arithmetic", weight=-1.0))
    return [config, root(pair) / "out", "--target", prose(pair), "--alphas", "0.1,0.2", "--device", "cpu"]


def negating(pair: Family) -> list[object]:
    return [*inputs(pair), "--forget", "math", "--alpha", 0.5, *out(pair)]


def adding(pair: Family) -> list[object]:
    planted = planted_adapters(root(pair) / "planted", 3)
    (name, path), *others = planted.tasks.items()
    compress(planted.base, dict(others), root(pair) / "library", method="library")
    return ["add", root(pair) / "library", "--base", planted.base, "--task", f"{name}={path}"]


Arguments = Callable[[Family], list[Any]]
LOCAL: dict[str, Arguments] = {
    "compress": lambda pair: [*inputs(pair), *out(pair)],
    "decompose": lambda pair: [*inputs(pair), *out(pair)],
    "doctor": lambda _: [],
    "evaluate": evaluating,
    "extract": lambda pair: [*inputs(pair), "--rank", 2, *out(pair)],
    "hook": lambda _: ["status"],
    "inspect": lambda pair: [*inputs(pair), "--layers"],
    "library": adding,
    "lm-eval-tasks": lambda _: [],
    "merge": merging,
    "mergekit-yaml": merging,
    "mix-styles": mixing,
    "negate": negating,
    "online": lambda pair: [*inputs(pair), "--num-bases", 2, *out(pair)],
    "plan": lambda pair: ["--base", pair.base, "--models", 4],
    "schema": lambda _: [],
    "tune": tuning,
}
# Brings its base model from the Hub where it is not installed as a package.
FROM_HUB = {"demo"}
# Serves a page until it is ended: tests/integrations/app looks at what it asks the network for.
SERVING = {"app"}


def test_every_command_is_tried_without_a_network() -> None:
    known: Any = typer.main.get_command(app)
    assert set(known.commands) - FROM_HUB - SERVING == set(LOCAL), "a command that is new needs a line in LOCAL"


@pytest.mark.parametrize("command", sorted(LOCAL))
def test_no_command_touches_the_network_when_all_paths_are_local(
    command: str, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("a connection was opened")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket.socket, "sendto")):
        monkeypatch.setattr(owner, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = tvbases(command, *LOCAL[command](pair))
    assert done.code == 0, done.err
    assert not asked
