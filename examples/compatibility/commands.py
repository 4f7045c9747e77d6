"""What every command should give for a family, and what it gives: one function per column of the table."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from tvbases_hf import Basis, InPlace, Vectors, merged
from tvbases_hf.cli import app
from tvbases_hf.errors import TvbasesError
from tvbases_hf.methods.devec import MIN_SIDE

from .family import EPS, Family, State, exact, load
from .small import VOCABULARY

WEIGHTS = {"a": 0.75, "b": -0.5}


class Wrong(Exception):
    """A result that is not the expected one."""


class Refused(Exception):
    """A refusal, with its reason."""


class Absent(Exception):
    """The command has no data for such a model."""


@dataclass(frozen=True)
class Place:
    """A family, and an empty directory for what is made of it."""

    family: Family
    root: Path

    @property
    def inputs(self) -> list[object]:
        tasks = [part for task, path in self.family.tasks.items() for part in ("--task", f"{task}={path}")]
        return ["--base", self.family.base, *tasks]

    def recipe(self, method: str, parameters: Mapping[str, object], weights: Mapping[str, float]) -> Path:
        models = [{"model": str(self.family.tasks[task]), "parameters": {"weight": w}} for task, w in weights.items()]
        config = {"merge_method": method, "base_model": str(self.family.base), "models": models, "dtype": "float32"}
        file = self.root / f"{method}.yml"
        file.write_text(yaml.safe_dump(config | {"parameters": dict(parameters)}), encoding="utf-8")
        return file


def tvbases(*arguments: object) -> None:
    """Run a command in this process; Refused for its message. Whatever else it raises is a crash."""
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            command().main([*map(str, arguments), "--quiet"], standalone_mode=False)
        except TvbasesError as refusal:
            raise Refused(str(refusal)) from None


@functools.cache
def command() -> Any:
    """The command line, built once."""
    return typer.main.get_command(app)


def inspect(place: Place) -> None:
    """Lengths and cosines."""
    report = place.root / "inspect.json"
    tvbases("inspect", *place.inputs, "--json", report)
    found = json.loads(report.read_text(encoding="utf-8"))
    tau = torch.stack([place.family.flat(task) for task in place.family.tasks])
    norms = tau.norm(dim=1)
    cosine = (tau @ tau.T) / norms / norms[:, None]
    near("norm", torch.tensor(found["norm"]), norms, 1e-6 * norms)
    near("cosine", torch.tensor(found["cosine"]), cosine, torch.full((2, 2), 1e-6))


def plan(place: Place) -> None:
    """Bytes that a merge reads and writes."""
    report = place.root / "plan.json"
    job = ("--models", 2, "--job", "task_arithmetic", "--bandwidth", "1GB")
    tvbases("plan", "--base", place.family.base, *job, "--json", report)
    found, size = json.loads(report.read_text(encoding="utf-8")), 0
    for name, tensor in load_file(place.family.base / "model.safetensors").items():
        size += tensor.nbytes * (3 if name in place.family.names() else 1)
    if found["read"] != size:
        raise Wrong(f"{found['read']} bytes read, not {size}")
    out = place.root / "task arithmetic"
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if out.is_dir() and abs(found["written"] - written) > 256:
        raise Wrong(f"{found['written']} bytes written, not {written}")


def task_arithmetic(place: Place) -> None:
    """The base plus weighted task vectors."""
    out = place.root / "task arithmetic"
    tvbases("merge", place.recipe("task_arithmetic", {}, WEIGHTS), out)
    compare_loaded(place.family, out, place.family.added(WEIGHTS))


def mergekit(place: Place) -> None:
    """The same by mergekit itself."""
    out = place.root / "mergekit"
    tvbases("mergekit-yaml", place.recipe("task_arithmetic", {}, WEIGHTS), out)
    compare_loaded(place.family, out, place.family.added(WEIGHTS))


def tsv(place: Place) -> None:
    """TSV-Merge: Algorithm 1 of every matrix, of each expert too, and the mean of all else."""
    family, out = place.family, place.root / "tsv"
    tvbases("merge", place.recipe("tsv", {}, dict.fromkeys(family.tasks, 1.0)), out)
    expected = {}
    for name, own in family.stored["base"].items():
        changes = [family.change(task, name) for task in family.tasks] if name in family.names() else None
        if changes is None:
            expected[name] = own
        elif family.is_stack(name):
            parts = zip(*(family.matrices(name, change) for change in changes), strict=True)
            expected[name] = own + torch.stack([tsv_merge(list(part)) for part in parts]).reshape(own.shape)
        else:
            matrix = family.is_matrix(name) and own.numel()
            expected[name] = own + (tsv_merge(changes) if matrix else sum(changes) / len(changes))
    compare_stored(family, out, expected, 1e-4)


def tsv_merge(changes: list[Tensor]) -> Tensor:
    """Algorithm 1 of Gargiulo et al., by full decompositions."""
    kept = max(1, min(changes[0].shape) // len(changes))
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left = torch.cat([U[:, :kept] for U, _, _ in parts], dim=1)
    values = torch.cat([S[:kept] for _, S, _ in parts])
    right = torch.cat([V[:kept] for _, _, V in parts])
    return procrustes(left) * values @ procrustes(right)


def procrustes(matrix: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    kept = 1e-6 * S[0] < S
    return U[:, kept] @ V[kept]


def negate(place: Place) -> None:
    """The base less half a task vector."""
    out = place.root / "negated"
    tvbases("negate", *place.inputs, "--forget", "a", "--alpha", 0.5, "--out", out)
    compare_loaded(place.family, out, place.family.added({"a": -0.5}))


def compress(place: Place) -> None:
    """One balanced basis for both: every task is projected on their sum."""
    out = place.root / "basis"
    tvbases("compress", *place.inputs, "--num-bases", 1, "--out", out)
    basis = Basis.from_pretrained(out)
    tau = {task: place.family.flat(task) for task in place.family.tasks}
    axis = sum(tau.values(), torch.zeros(()))
    axis = axis / axis.norm()
    for task, delta in tau.items():
        found = basis.reconstruct(task)
        flat = torch.cat([found[name].double().reshape(-1) for name in place.family.names()])
        expected = axis * (axis @ delta)
        if not (flat - expected).norm() <= 1e-5 * delta.norm():
            raise Wrong(f"{task}: off by {float((flat - expected).norm() / delta.norm()):.1e}")


def restore(place: Place) -> None:
    """Two bases for two tasks lose nothing: the models themselves come back."""
    basis = place.root / "whole"
    tvbases("compress", *place.inputs, "--num-bases", 2, "--out", basis)
    out = Basis.from_pretrained(basis).restore("b", place.family.base, place.root / "restored")
    compare_loaded(place.family, out, place.family.loaded["b"], 1e-5)


def online(place: Place) -> None:
    """One task after the other: both are kept whole while there is room."""
    out = place.root / "online"
    tvbases("online", "--base", place.family.base, "--task", f"a={place.family.tasks['a']}", "-m", 2, "--out", out)
    tvbases("online", "--task", f"b={place.family.tasks['b']}", "--out", out)
    restored = Basis.from_pretrained(out).restore("a", place.family.base, place.root / "of online")
    compare_loaded(place.family, restored, place.family.loaded["a"], 1e-5)


def decompose(place: Place) -> None:
    """Directions of both column spaces (the outputs of a layer) are shared; what is left of a task is its own."""
    family, out = place.family, place.root / "parts"
    tvbases("decompose", *place.inputs, "--rank", 0.5, "--threshold", 0.4, "--out", out)
    expected = dict(family.stored["base"])
    for name in family.names():
        first, second = (family.matrices(name, family.change(task, name)) for task in family.tasks)
        if first.ndim > 1 and family.is_transposed(name):
            first, second = (change.mT for change in (first, second))
        if family.is_stack(name):
            own = torch.stack([unique(*pair) for pair in zip(first, second, strict=True)])
        else:
            own = unique(first, second) if family.is_matrix(name) else first
        own = own.mT if own.ndim > 1 and family.is_transposed(name) else own
        expected[name] = expected[name] + own.reshape(expected[name].shape)
    compare_stored(family, out / "unique" / "a", expected, 1e-4)


def unique(first: Tensor, second: Tensor) -> Tensor:
    """Of the first: without directions whose squared cosine with the second's space is above the threshold."""
    kept = max(1, min(first.shape) // 2)
    if min(first.shape) < MIN_SIDE:
        return first
    spaces = [torch.linalg.svd(change, full_matrices=False)[0][:, :kept] for change in (first, second)]
    left, cosines, _ = torch.linalg.svd(spaces[0].T @ spaces[1])
    shared = spaces[0] @ left[:, cosines.square() > 0.4]
    return first - shared @ (shared.T @ first)


def in_place(place: Place) -> None:
    """The merge in the memory of a loaded model, as searches and evaluations have it; afterwards it is as before."""
    family = place.family
    vectors = Vectors.open(family.base, family.tasks)
    change = merged(vectors, "task_arithmetic", list(WEIGHTS.values()))
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    try:
        holder = InPlace(family.model, vectors.names)
    except TvbasesError as error:
        raise Refused(str(error)) from error
    with holder.changed(change):
        compare(exact(family.model.state_dict()), family.added(WEIGHTS))
    if any(not torch.equal(before[name], tensor) for name, tensor in family.model.state_dict().items()):
        raise Wrong("the model is not as it was before")


def evaluate(place: Place) -> None:
    """A causal language model's perplexity of a text, before and after a merge."""
    if not place.family.kind.is_causal:
        raise Absent
    text, report = place.root / "text.txt", place.root / "evaluate.json"
    text.write_text(" ".join(WORDS[7 * index % len(WORDS)] for index in range(40)), encoding="utf-8")
    models = {"base": place.family.base, "task arithmetic": place.root / "task arithmetic"}
    for path in models.values():
        save_tokenizer(path)
    ids = tokens(models["base"], text.read_text("utf-8"))
    try:
        expected = [perplexity(load(place.family.kind, path)[0], ids, text.stat().st_size) for path in models.values()]
    except Exception as error:  # sizes that were cut to what the class itself cannot compute with
        raise Absent from error
    options = ("--control", f"text:{text}", "--device", "cpu", "--json", report)
    tvbases("evaluate", models["task arithmetic"], "--base", models["base"], *options)
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    values = next(row["values"] for row in rows if row["metric"] == "byte_perplexity")
    found = torch.tensor([value["value"] for value in values.values()], dtype=torch.float64)
    near("perplexity", found, torch.tensor(expected, dtype=torch.float64), 1e-4 * torch.tensor(expected))


def tokens(directory: Path, text: str) -> list[int]:
    """Absent where transformers takes another kind of tokenizer for a type, which does not know these words."""
    try:
        ids = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
    except Exception:  # whatever that kind says to a file that is none of its own
        ids = []
    if not ids:
        raise Absent
    return ids


def perplexity(model: PreTrainedModel, ids: list[int], size: int) -> float:
    """Of each of ``size`` bytes, the text after the token that begins one."""
    given = torch.tensor([[SPECIAL.index("<s>"), *ids]])
    with torch.no_grad():
        likelihoods = model(given[:, :-1]).logits.double().log_softmax(-1)
    return math.exp(-float(likelihoods[0].gather(1, given[0, 1:, None]).sum()) / size)


SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = [f"w{index}" for index in range(VOCABULARY - len(SPECIAL))]


def save_tokenizer(directory: Path) -> None:
    """One that knows these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


COLUMNS: dict[str, Callable[[Place], None]] = {
    "inspect": inspect,
    "merge": task_arithmetic,
    "merge: tsv": tsv,
    "mergekit-yaml": mergekit,
    "compress": compress,
    "restore": restore,
    "online": online,
    "decompose": decompose,
    "negate": negate,
    "in place": in_place,
    "evaluate": evaluate,
    "plan": plan,
}


def compare_loaded(family: Family, out: Path, expected: State, tolerance: float = 8 * EPS) -> None:
    """The model of ``out``, with no name missing or unexpected that is not so of the base, has these numbers."""
    model, odd = load(family.kind, out)
    if odd != family.ignored:
        raise Wrong(f"missing or unexpected when it is loaded: {sorted(odd ^ family.ignored)[:2]}")
    compare(exact(model.state_dict()), expected, tolerance)


def compare_stored(family: Family, out: Path, expected: State, tolerance: float) -> None:
    """The files of ``out`` hold these numbers, and load as the base does."""
    _, odd = load(family.kind, out)
    if odd != family.ignored:
        raise Wrong(f"missing or unexpected when it is loaded: {sorted(odd ^ family.ignored)[:2]}")
    found = exact(load_file(out / "model.safetensors"))
    compare(found, {name: tensor for name, tensor in expected.items() if name in found}, tolerance)


def compare(found: State, expected: State, tolerance: float = 8 * EPS) -> None:
    if found.keys() != expected.keys():
        raise Wrong(f"other tensors than expected: {sorted(found.keys() ^ expected.keys())[:2]}")
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            finite = tensor[tensor.isfinite()].abs()
            size = finite.max() if finite.numel() else 0.0
            near(name, found[name], tensor, torch.full_like(tensor, tolerance) * (1 + size))
        elif not torch.equal(found[name], tensor):
            raise Wrong(f"{name} differs")


def near(name: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    off = (found.double() - expected).abs()
    off = torch.where(found == expected, torch.zeros_like(off), off)  # infinities too
    if found.shape != expected.shape or not bool((off <= bound).all()):
        raise Wrong(f"{name} is off by {float(off.max()):.1e}" if off.numel() else f"{name} has another shape")
