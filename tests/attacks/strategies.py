"""Files that a machine damages at random, so that hypothesis can shrink the damage: JSON, safetensors, YAML, names."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

from attacks.names import HOSTILE_NAMES


@dataclass(frozen=True)
class Raw:
    """Text that no writer would write in the place of a value."""

    text: str

    def __repr__(self) -> str:
        return self.text if len(self.text) < 40 else f"{self.text[:20]}...({len(self.text)} characters)"


# Values that have broken some reader of files before.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-30, 1e30, 1e300, 10**9, 10**18, 2**63, 10**100,
    float("nan"), float("inf"), float("-inf"), Raw("9" * 5000), Raw("1e999"), Raw('"\\ud800"'),
    "", " ", "x", ".", "..", "../x", "/etc/passwd", "a/b", "0", "1", "nan", "true", "\x1b[31m", "\n", "[v1]", "[/x]",
    "${x}", "\u202e", "a" * 300, "a" * 10_000, "(.*)*x", "(a|a)*$", "(", "((((", "x{1,99999}{1,99999}", "\\",
    "F32", "F64", "I64", "BOOL", "model.safetensors", "model.norm.weight", "llama", "bert", "cuda", "float16", "hf://x",
    "ties", "linear", "union", "base",
    [], {}, [[]], [None], [0], [1, 2], [-1, 4], [0, 2**62], ["x"], {"x": 1}, {"": None}, {"value": 1}, {"filter": "x"},
    [0.1] * 2000, Raw("[" * 50 + "]" * 50), Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 5000 + "1" + "}" * 5000),
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    st.sampled_from(HOSTILE_NAMES),
    st.integers(-5, 70),
    st.floats(allow_nan=True, width=32),
    st.text(max_size=8),
)
MARK = "\x00raw:"


@dataclass(frozen=True)
class Change:
    """One thing done to one of a document's values: the ``place``-th, counted from its root."""

    kind: str
    place: int
    value: Any = None


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(["replace", "remove", "double", "rename", "add", "scale", "swap"]),
        st.integers(0, 400),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


def changed(document: Any, changes: Sequence[Change]) -> Any:
    """A copy of the document with the changes made, one after the other."""
    found = json.loads(json.dumps(document))
    for change in changes:
        places = _places(found)
        if not places:
            return _written(change.value)
        parent, key = places[change.place % len(places)]
        _change(parent, key, change, places)
    return found


def _change(parent: Any, key: Any, change: Change, places: list[tuple[Any, Any]]) -> None:
    value, old = _written(change.value), parent[key]
    match change.kind:
        case "replace":
            parent[key] = value
        case "remove":
            del parent[key]
        case "double" if isinstance(parent, list):
            parent.insert(key, old)
        case "rename" if isinstance(parent, dict):
            parent[value if isinstance(value, str) else "other"] = parent.pop(key)
        case "add" if isinstance(old, dict):
            old["extra"] = value
        case "add" if isinstance(old, list):
            old.append(value)
        case "scale" if isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = old * (value if isinstance(value, (int, float)) and abs(value) < 1e12 else -1)
        case "swap":
            other, place = places[(change.place * 7 + 1) % len(places)]
            parent[key] = json.loads(json.dumps(other[place]))
        case _:
            parent[key] = value


def _places(part: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document, the outer before the inner."""
    found: list[tuple[Any, Any]] = []
    level = [part]
    while level:
        inside = [(c, key) for c in level for key in (list(c) if isinstance(c, dict) else range(len(c)))]
        found += inside
        level = [c[key] for c, key in inside if isinstance(c[key], (dict, list))]
    return found


def _written(value: Any) -> Any:
    """A copy: a list that stood in two places, or in itself, would change with every later change."""
    return f"{MARK}{HOSTILE.index(value)}" if isinstance(value, Raw) else copy.deepcopy(value)


def as_json(document: Any) -> bytes:
    """JSON, with raw texts as they are."""
    text = json.dumps(document)
    for index, value in enumerate(HOSTILE):
        if isinstance(value, Raw):
            text = text.replace(json.dumps(f"{MARK}{index}"), value.text)
    return text.encode()


def as_yaml(document: Any) -> bytes:
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    for index, value in enumerate(HOSTILE):
        if isinstance(value, Raw):
            text = text.replace(f'"\\0raw:{index}"', value.text)
    return text.encode("utf-8", "surrogatepass")


# What happens to the bytes of any file: cut off, overwritten, inserted.
BYTES = st.tuples(
    st.sampled_from(["cut", "put", "insert"]),
    st.floats(0, 1),
    st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\xef\xbb\xbf", b"\x00", b"{", b"[" * 5000, b"&a [*a]", b"\xff\xff"])
    ),
)


def damaged(content: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, share, new = damage
    start = int(share * len(content))
    if kind == "cut":
        return content[:start]
    return content[:start] + new + content[start + (len(new) if kind == "put" else 0) :]


Mutation = Callable[[bytes], bytes]


def of_json(content: bytes) -> st.SearchStrategy[bytes]:
    document = json.loads(content)
    return st.one_of(CHANGES.map(lambda c: as_json(changed(document, c))), BYTES.map(lambda b: damaged(content, b)))


def of_yaml(content: bytes) -> st.SearchStrategy[bytes]:
    """One of the file's documents changed, they in any number and order, or any bytes."""
    documents = list(yaml.safe_load_all(content))
    each = st.builds(lambda d, c: as_yaml(changed(d, c)), st.sampled_from(documents), CHANGES)
    several = st.lists(st.one_of(each, st.sampled_from([as_yaml(d) for d in documents])), min_size=1, max_size=3)
    text = st.builds(bytes.join, st.sampled_from([b"---\n", b"...\n---\n", b"\n--- \n", b"...\n"]), several)
    change = each if len(documents) == 1 else text
    return st.one_of(change, BYTES.map(lambda b: damaged(content, b)))


def of_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """The header changed (with its length right, or a lie), or any bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    lengths = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 8, size - 1, 10**8, 2**40, 2**64 - 1]))

    def made(changes: Sequence[Change], length: int | None) -> bytes:
        text = as_json(changed(header, changes))
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    numbers = st.tuples(
        st.integers(0, max(0, len(data) // 4 - 1)),
        st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]),
    )

    def poisoned(drawn: tuple[int, bytes]) -> bytes:
        start = 8 + size + 4 * drawn[0]
        return content[:start] + drawn[1] + content[start + 4 :]

    return st.one_of(st.builds(made, CHANGES, lengths), numbers.map(poisoned), BYTES.map(lambda b: damaged(content, b)))
