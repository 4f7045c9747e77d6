"""Restore a task of a basis directory of adapters, DoRA apart, without this package: see guides/basis_format.md."""

import json
from pathlib import Path

import numpy as np
from safetensors import deserialize

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I16": "<i2", "U8": "u1"}


def read(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; bfloat16 as float32."""
    found = {}
    for name, entry in deserialize(file.read_bytes()):
        if entry["dtype"] == "BF16":
            data = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            data = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        found[name] = data.reshape(entry["shape"])
    return found


def rows(codes: np.ndarray, scales: np.ndarray, size: int, bits: int) -> np.ndarray:
    """[K, bytes] codes and [K, groups] scales as [K, size] numbers."""
    if bits == 4:
        numbers = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)[:, :size].astype(np.float32) - 8
    else:
        numbers = codes.view("<i2" if bits == 16 else "i1").astype(np.float32)
    return numbers * np.repeat(scales, 64, axis=1)[:, :size]


def stacks(file: Path, sizes: list[list[int]]) -> list[list[np.ndarray]]:
    """By weight the stacks of rows of a library's file; ``sizes`` are the lengths of their rows, 0 for none."""
    tensors, found, at, scale_at = read(file), [], 0, 0
    for counts, lengths in zip(tensors["counts"], sizes, strict=True):
        own = []
        for place, size in enumerate(lengths):
            parts = [np.empty((0, size), np.float32)]
            for count, bits in zip(counts[place * 2 // len(lengths)], (16, 8, 4), strict=True):
                if not (size and count):
                    continue
                wide, groups = -(-size * bits // 8), -(-size // 64)
                code = tensors["codes"][at : at + count * wide].reshape(count, wide).copy()
                scale = tensors["scales"][scale_at : scale_at + count * groups].reshape(count, groups)
                parts.append(rows(code, scale, size, bits))
                at, scale_at = at + count * wide, scale_at + count * groups
            own.append(np.concatenate(parts))
        found.append(own)
    return found


def of_library(directory: Path, config: dict, place: int) -> dict[str, np.ndarray]:
    modules, library = config["adapters"]["modules"], config["library"]
    member, shapes = library["members"][place], [spec["shape"] for spec in modules.values()]
    shared = [[np.empty((0, n)), np.empty((0, m))] for n, m in shapes]
    if member["cluster"] >= 0:
        shared = stacks(directory / library["clusters"][member["cluster"]]["file"], shapes)
    sizes = [
        [0 if len(left) and len(right) else len(left) or n, len(right) or m, n, m]
        for (n, m), (left, right) in zip(shapes, shared, strict=True)
    ]
    found = {}
    own_stacks = stacks(directory / member["file"], sizes)
    for name, (left, right), (p, q, own, beside) in zip(modules, shared, own_stacks, strict=True):
        outer = left[: len(q)].T if len(left) and len(right) else left.T @ p.T if len(left) else p.T
        found[name] = outer @ (q @ right if len(right) else q) + own.T @ beside
    return found


def of_vectors(directory: Path, config: dict, place: int) -> dict[str, np.ndarray]:
    stock, beside, found = read(directory / "adapter_model.safetensors"), {}, {}
    if (directory / "basis.safetensors").exists():
        beside = read(directory / "basis.safetensors")
    for name, spec in config["adapters"]["modules"].items():
        total, prefix = sum(spec["ranks"]), f"base_model.model.{spec['module']}"
        width = len(spec["pivots"]) if spec["shared"] else total
        found[name] = np.zeros(spec["shape"], np.float32)
        if not width:
            continue
        left, right = stock[f"{prefix}.lora_B.weight"][:, :width], stock[f"{prefix}.lora_A.weight"][:width]
        if spec["shared"]:
            turned, rest, mix = spec["shared"] == "left", beside[f"{name}.rest"], beside[f"{name}.mix"]
            left, right, rest = (right.T, left.T, rest.T) if turned else (left, right, rest)
            others = [k for k in range(total) if k not in spec["pivots"]]
            lefts, rights = np.zeros((len(left), total)), np.zeros((total, right.shape[1]))
            lefts[:, others], lefts[:, spec["pivots"]] = rest, left - rest @ mix
            rights[others], rights[spec["pivots"]] = mix @ right, right
            left, right = (rights.T, lefts.T) if turned else (lefts, rights)
        shares = np.repeat([row[place] for row in config["decoder"]], spec["ranks"])
        found[name] = (left * shares) @ right
    return found


def changes(directory: str | Path, task: str) -> dict[str, np.ndarray]:
    directory = Path(directory)
    config = json.loads((directory / "basis_config.json").read_text(encoding="utf-8"))
    place = config["tasks"].index(task)
    return (of_library if config.get("library") else of_vectors)(directory, config, place)
