"""What vlora-dev and lorashare make of the same adapters; run by bench_library.py in an environment that has them.

    python rivals.py REQUEST.json    # {"package": name, "components": k, "adapters": {name: directory},
                                     #  "more": {name: directory}, "out": directory, "restored": directory or null}

Prints a line of JSON: bytes of what was saved; seconds to compress, to add ``more`` to what was saved, and to give one
adapter back; memory; and the mean over the adapters, of a hundred where there are more, of |B A - B' A'|^2 / |B A|^2
(both scaled alike). ``restored`` gets what comes back, as LoRAs of alpha = r.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
Factors = dict[str, dict[str, Tensor]]
# Each that comes back is a read of all that was saved.
SAMPLE = 100


def factors(tensors: Mapping[str, Tensor]) -> Factors:
    found: Factors = {}
    for name, tensor in tensors.items():
        if match := FACTOR.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensor.double()
    return found


def error(exact: Factors, kept: Factors) -> float:
    lost = whole = 0.0
    for module, own in exact.items():
        left = torch.cat([own["B"], -kept[module]["B"]], dim=1)
        right = torch.cat([own["A"], kept[module]["A"]])
        lost += float(((left.T @ left) * (right @ right.T)).sum())
        whole += float(((own["B"].T @ own["B"]) * (own["A"] @ own["A"].T)).sum())
    return lost / whole


class Vlora:
    """SharedSubspace as its guide uses it; ``nf4``: saved in 4 bits."""

    nf4 = False

    @classmethod
    def compress(cls, paths: Mapping[str, str], count: int, out: Path) -> None:
        from vlora.io import load_adapter
        from vlora.subspace import SharedSubspace

        adapters = [load_adapter(path) for path in paths.values()]
        cls.save(SharedSubspace.from_adapters(adapters, list(paths), num_components=count), out)

    @classmethod
    def save(cls, space: Any, out: Path) -> None:
        space.save_quantized(out) if cls.nf4 else space.save(out)

    @classmethod
    def add(cls, out: Path, name: str, path: str) -> None:
        from vlora.io import load_adapter
        from vlora.subspace import SharedSubspace

        space = SharedSubspace.load(out)
        space.absorb(load_adapter(path), name)
        cls.save(space, out)

    @staticmethod
    def restore(out: Path, task: str) -> Factors:
        from vlora.subspace import SharedSubspace

        found = SharedSubspace.load(out).reconstruct(task)
        return {n: {"A": found.lora_a[n].double(), "B": found.lora_b[n].double()} for n in found.layer_names}


class VloraInFourBits(Vlora):
    nf4 = True


class Lorashare:
    @staticmethod
    def compress(paths: Mapping[str, str], count: int, out: Path) -> None:
        from lorashare.model import SHAREModel

        SHAREModel.from_adapters(dict(paths), num_components=count).save_pretrained(str(out))

    @staticmethod
    def add(out: Path, name: str, path: str) -> None:
        from lorashare.model import SHAREModel

        model = SHAREModel.from_pretrained(str(out))
        model.add_adapter(path, name)
        model.save_pretrained(str(out))

    @staticmethod
    def restore(out: Path, task: str) -> Factors:
        from lorashare.model import SHAREModel

        return factors(SHAREModel.from_pretrained(str(out)).reconstruct(task))


PACKAGES = {"vlora-dev": Vlora, "vlora-dev nf4": VloraInFourBits, "lorashare": Lorashare}


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    package, paths, out = PACKAGES[request["package"]], request["adapters"], Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    row, start = {}, time.perf_counter()
    package.compress(paths, request["components"], out)
    row["seconds"] = time.perf_counter() - start
    row["bytes"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    row["memory"] = most_memory()
    lost = []
    asked = paths if request["restored"] else dict([*paths.items()][:: -(-len(paths) // SAMPLE)])
    for task, path in asked.items():
        start = time.perf_counter()
        kept = package.restore(out, task)
        row["restore_seconds"] = time.perf_counter() - start
        lost.append(error(factors(load_file(Path(path) / "adapter_model.safetensors")), kept))
        if request["restored"]:
            write(Path(request["restored"]) / task, Path(path), kept)
    row["error"] = sum(lost) / len(lost)
    for task, path in request["more"].items():
        start = time.perf_counter()
        package.add(out, task, path)
        row["add_seconds"] = time.perf_counter() - start
    return row


def most_memory() -> int:
    """Bytes in memory at most so far; getrusage would count the parent's, as exec keeps its number."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def write(directory: Path, original: Path, kept: Factors) -> None:
    """A LoRA of the original's scale: the factors carry it."""
    config = json.loads((original / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    config |= {"lora_alpha": config["r"], "alpha_pattern": {}}
    tensors = {}
    for module, own in kept.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = own["A"].float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = (scale * own["B"]).float().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    try:
        found = measure(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as problem:  # a rival's failure is a result
        found = {"failed": f"{type(problem).__name__}: {problem}"[:200]}
    print(json.dumps(found), flush=True)
