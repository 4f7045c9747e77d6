"""Check a wheel: valid metadata, and the commands that need no extra run without one. Called by `make package`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.metadata import Metadata

# Runs a program from the unpacked wheel while whatever only an extra brings cannot be found.
ALONE = """
import sys
hidden, finders = set(sys.argv[2].split(",")), list(sys.meta_path)
class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in hidden:
            return None
        return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
    @staticmethod
    def find_distributions(*asked, **named):
        found = (finder.find_distributions for finder in finders if hasattr(finder, "find_distributions"))
        return [distribution for find in found for distribution in find(*asked, **named)]
sys.meta_path[:] = [Hide]
sys.path.insert(0, sys.argv[1])
sys.argv = ["tvbases", *sys.argv[3:]]
import tvbases_hf.cli
assert tvbases_hf.cli.__file__.startswith(sys.path[0]), tvbases_hf.cli.__file__
tvbases_hf.cli.main()
"""
HIDDEN = (
    "mergekit,peft,diffusers,accelerate,lm_eval,transformers,datasets,matplotlib,sklearn,PIL,profanity_check,gradio"
)
MODELS = """
import sys, torch
from safetensors.torch import save_file
from pathlib import Path
for seed, name in enumerate(("base", "math", "code")):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    change = 0.1 * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    save_file({"layer.weight": weight + (change if seed else 0)}, folder / "model.safetensors")
"""
# What a command says that an extra is missing for, by the extra.
MISSING = {
    "mergekit": ["merge", "{place}/merge.yml", "{place}/merged"],
    "plot": ["inspect", "--plot", "{place}/a.png"],
    "eval": ["evaluate", "{place}/math", "--base", "{place}/base", "--target", "gsm8k"],
    "app": ["app"],
}


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as place:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(file), validate=True)
        assert metadata.description_content_type == "text/markdown" and metadata.project_urls
        assert len(str(message_from_bytes(archive.read(file)).get_payload())) > 1000, "the README is missing"
        unpacked = Path(place) / "wheel"
        archive.extractall(unpacked)
        run_commands(unpacked, place)
    print(f"{wheel.name}: metadata valid; --help, inspect, compress and plan run alone, and missing extras are named")


def run_commands(wheel: Path, place: str) -> None:
    subprocess.run([sys.executable, "-c", MODELS, place], check=True)
    (Path(place) / "merge.yml").write_text("merge_method: ae_bases\n", encoding="utf-8")
    models = ["--base", f"{place}/base", "--task", f"math={place}/math", "--task", f"code={place}/code"]
    for command in (
        ["--help"],
        ["inspect", *models],
        ["compress", *models, "-m", "1", "--out", f"{place}/basis"],
        ["plan", "--base", f"{place}/base", "--models", "8"],
    ):
        done = alone(wheel, command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    for extra, command in MISSING.items():
        given = [part.format(place=place) for part in command] + (models if command[0] == "inspect" else [])
        done = alone(wheel, given)
        assert done.returncode == 2 and f'pip install "tvbases-hf[{extra}]"' in done.stderr, (command, done.stderr)


def alone(wheel: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", ALONE, str(wheel), HIDDEN, *command]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
