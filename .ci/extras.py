"""The wheel with the core's dependencies alone, and with every extra alone, each in an environment of its own.

Called by `make extras`. Environments of extras see that of the core, so that torch is installed once; what one extra
brings, the others do not see.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

from check_wheel import MISSING, MODELS

# What is not for users, or is made of the others.
SKIPPED = {"all", "docs", "llm", "test"}
INSPECT = ["inspect", "--base", "{place}/base", "--task", "math={place}/math", "--task", "code={place}/code"]
COMPRESS = ["compress", *INSPECT[1:], "--method", "cluster", "--out", "{place}/clusters-{extra}"]
# What works with an extra alone: a command, or Python.
USES: dict[str, list[str] | str] = {
    "mergekit": ["merge", "{place}/merge.yml", "{place}/merged"],
    "peft": "import tvbases_peft, peft",
    "diffusers": "import diffusers; from tvbases_diffusers import mix_styles",
    "accelerate": "import accelerate, tvbases_accelerate",
    "eval": "import lm_eval; from tvbases_lm_eval.evaluate import evaluate_model; from tvbases_lm_eval import scorers",
    "plot": [*INSPECT, "--plot", "{place}/a.png"],
    "cluster": COMPRESS,
    "images": "import PIL; from transformers import AutoImageProcessor; import tvbases_hf.learning.images",
    "demo": "from tvbases_demo import run_demo; import matplotlib, transformers, mergekit",
    "app": "from tvbases_app import build; build()",
}
CONFIG = """merge_method: task_arithmetic
base_model: {place}/base
models: [{{model: {place}/math, parameters: {{weight: 0.5}}}}, {{model: {place}/code, parameters: {{weight: 0.5}}}}]
dtype: float32
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--place", type=Path, default=Path("build/extras"))
    parser.add_argument("--only", default="", help="some of the extras, with commas")
    parser.add_argument("--pip", default=os.environ.get("PIP_FLAGS", ""), help="more options of pip")
    given = parser.parse_args()
    place, how = given.place.absolute(), given.pip.split()
    place.mkdir(parents=True, exist_ok=True)
    wheel = str(given.wheel.absolute())
    core = environment(place / "core", None)
    install(core, [wheel, *how])
    models(core, place)
    report("core", core, lambda: check_core(core, place))
    extras = [extra for extra in declared(given.wheel) if extra not in SKIPPED]
    assert set(extras) == set(USES), f"what has no line in USES: {sorted(set(extras) ^ set(USES))}"
    for extra in given.only.split(",") if given.only else extras:
        python = environment(place / extra, core)
        install(python, [f"{wheel}[{extra}]", *how])
        report(extra, python, lambda python=python, extra=extra: check_extra(python, extra, place))


def declared(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(file)).get_all("Provides-Extra", [])


def environment(place: Path, below: Path | None) -> Path:
    """A new environment, which sees another one's packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    if below is not None:
        link = next((place / "lib").glob("python*/site-packages")) / "core.pth"
        link.write_text(f"{next((below.parents[1] / 'lib').glob('python*/site-packages'))}\n", encoding="utf-8")
    return place / "bin" / "python"


def install(python: Path, what: list[str]) -> None:
    constraints = Path(__file__).parents[1] / "constraints.txt"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*command, *what], check=True, stderr=subprocess.DEVNULL)


def models(python: Path, place: Path) -> None:
    for name in ("base", "math", "code"):
        if (place / name).exists():
            return
    subprocess.run([str(python), "-c", MODELS, str(place)], check=True)
    (place / "merge.yml").write_text(CONFIG.format(place=place), encoding="utf-8")


def run(python: Path, use: list[str] | str, **named: object) -> subprocess.CompletedProcess[str]:
    """A command, or Python, in an empty directory and without the paths of the one who calls."""
    named_in = [part.format(**named) for part in use] if isinstance(use, list) else []
    command = [str(python), "-c", use] if isinstance(use, str) else [str(python), "-m", "tvbases_hf", *named_in]
    words = {word: value for word, value in os.environ.items() if word != "PYTHONPATH"}
    empty = python.parents[1] / "empty"
    empty.mkdir(exist_ok=True)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=words, cwd=empty)


def check_core(python: Path, place: Path) -> None:
    """The commands that need no extra work, and whatever needs one names it in one line."""
    for command in (["--help"], INSPECT, [*COMPRESS[:-4], "-m", "1", "--out", "{place}/basis"], ["doctor"]):
        done = run(python, command, place=place, extra="")
        assert done.returncode == 0, (command, done.stderr)
    done = run(python, ["plan", "--base", "{place}/base", "--models", "8"], place=place)
    assert done.returncode == 0, done.stderr
    for extra, command in {**MISSING, "demo": ["demo"]}.items():
        done = run(python, command + (INSPECT[1:] if command[0] == "inspect" else []), place=place)
        assert done.returncode == 2 and f'pip install "tvbases-hf[{extra}]"' in done.stderr, (command, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def check_extra(python: Path, extra: str, place: Path) -> None:
    """What the extra is for works, nothing that is installed contradicts itself, and torch is the core's."""
    done = run(python, USES[extra], place=place, extra=extra)
    assert done.returncode == 0, (extra, done.stderr)
    done = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (extra, done.stdout)
    own = list((python.parents[1] / "lib").glob("python*/site-packages/torch"))
    assert not own, f"{extra} brings another torch"


def report(name: str, python: Path, check: Callable[[], None]) -> None:
    begun = time.monotonic()
    check()
    size = sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file())
    print(f"{name}: works alone; {size / 1e6:,.0f} MB, checked in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
