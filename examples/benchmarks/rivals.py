"""What vlora-dev and lorashare make of the same adapters; run by bench_library.py in an environment that has them.

    python rivals.py REQUEST.json    # {"adapters": {name: directory}, "components": [k, ...], "work": directory}

Prints a line of JSON for every package and number of components: bytes of what it saved, seconds to compress and to
give one adapter back, and the mean over the adapters of |B A - B' A'|^2 / |B A|^2 (both scaled alike).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
Factors = dict[str, dict[str, Tensor]]


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


def vlora(paths: Mapping[str, str], count: int, out: Path) -> Callable[[str], Factors]:
    from vlora.io import load_adapter
    from vlora.subspace import SharedSubspace

    space = SharedSubspace.from_adapters(
        [load_adapter(path) for path in paths.values()], list(paths), num_components=count
    )
    space.save(out)
    return lambda task: _of_vlora(SharedSubspace.load(out).reconstruct(task))


def vlora_nf4(paths: Mapping[str, str], count: int, out: Path) -> Callable[[str], Factors]:
    from vlora.io import load_adapter
    from vlora.subspace import SharedSubspace

    space = SharedSubspace.from_adapters(
        [load_adapter(path) for path in paths.values()], list(paths), num_components=count
    )
    space.save_quantized(out)
    return lambda task: _of_vlora(SharedSubspace.load(out).reconstruct(task))


def _of_vlora(weights: Any) -> Factors:
    return {
        module: {"A": weights.lora_a[module].double(), "B": weights.lora_b[module].double()}
        for module in weights.layer_names
    }


def lorashare(paths: Mapping[str, str], count: int, out: Path) -> Callable[[str], Factors]:
    from lorashare.model import SHAREModel

    SHAREModel.from_adapters(dict(paths), num_components=count).save_pretrained(str(out))
    return lambda task: factors(SHAREModel.from_pretrained(str(out)).reconstruct(task))


def measured(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    paths = request["adapters"]
    for name, compress in (("vlora-dev", vlora), ("vlora-dev nf4", vlora_nf4), ("lorashare", lorashare)):
        for count in request["components"]:
            out = Path(request["work"]) / "rival"
            shutil.rmtree(out, ignore_errors=True)
            row: dict[str, Any] = {"package": name, "components": count}
            try:
                start = time.perf_counter()
                restore = compress(paths, count, out)
                row["seconds"] = time.perf_counter() - start
                row["bytes"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                lost = []
                for task, path in paths.items():
                    start = time.perf_counter()
                    kept = restore(task)
                    row["restore_seconds"] = time.perf_counter() - start
                    lost.append(error(factors(load_file(Path(path) / "adapter_model.safetensors")), kept))
                row["error"] = sum(lost) / len(lost)
            except Exception as problem:  # a rival's failure is a result
                row["failed"] = f"{type(problem).__name__}: {problem}"[:200]
            yield row


if __name__ == "__main__":
    for found in measured(json.loads(Path(sys.argv[1]).read_text())):
        print(json.dumps(found), flush=True)
