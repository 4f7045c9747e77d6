"""What merges of quantised models have in memory, at every piece that they write, is what --memory allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from commands.command_line import tvbases
from tvbases_hf.storage import parallel
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import save_checkpoint

SHAPE, LAYERS, THREADS = (1024, 2048), 6, 4
WEIGHT = SHAPE[0] * SHAPE[1] * 4
# The base twice (as what is changed, and as what changes are measured from), two models, and pieces of all.
NEED = 4 * WEIGHT + (1 << 24)


# In a process of its own, as the heap of one that ran other tests has holes. Bytes that are no mapped files count.
MEASURED = """
import gc, sys
from pathlib import Path
from commands.command_line import tvbases
from tvbases_hf.storage.tensor_files import TensorFiles

def allocated():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

recipe, first, out, allowed, threads = sys.argv[1:]
write, seen = TensorFiles.write, []

def noted(*arguments):
    seen.append(allocated())
    write(*arguments)

assert tvbases("merge", recipe, first, "--quiet").code == 0  # what is imported once is in memory
TensorFiles.write = noted
gc.collect()
start = allocated()
outcome = tvbases("merge", recipe, out, "--memory", f"{allowed}B", "--threads", threads, "--quiet")
assert outcome.code == 0, outcome
print(max(seen) - start)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Int8 rows, as bitsandbytes stores them: dequantised, four times their size."""
    root, generator = tmp_path_factory.mktemp("int8"), torch.Generator().manual_seed(0)
    paths = []
    for name in ("base", "a", "b"):
        state = {}
        for layer in range(LAYERS):
            module = f"model.layers.{layer}.mlp.up_proj"
            state[f"{module}.weight"] = torch.randint(-127, 128, SHAPE, generator=generator, dtype=torch.int8)
            state[f"{module}.SCB"] = torch.rand(SHAPE[0], generator=generator)
        method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        paths.append(save_checkpoint(root / name, state, config={"quantization_config": method}))
    return paths


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_what_is_allocated_stays_within_what_is_allowed(method: str, models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    listed = [{"model": str(path), "parameters": {"weight": 0.5, "density": 0.5}} for path in tuned]
    if method == "linear":
        listed = [{"model": str(path), "parameters": {"weight": 0.5}} for path in models]
    recipe = tmp_path / "merge.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": method, "base_model": str(base), "models": listed}))
    allowed = int(1.3 * NEED)
    given = [str(part) for part in (recipe, tmp_path / "first", tmp_path / "out", allowed, THREADS)]
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", MEASURED, *given], cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert WEIGHT < int(done.stdout) <= allowed < THREADS * NEED


def test_a_base_is_dequantised_once_for_a_linear_merge_and_once_to_be_changed(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = models
    listed = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (base, *tuned)]
    recipe, read, asked = tmp_path / "merge.yml", Checkpoint.read, []
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "base_model": str(base), "models": listed}))

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        asked.append((self.label, name))
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    outcome = tvbases("merge", recipe, tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome
    assert {asked.count((str(base), name)) for _, name in asked} == {2}


def test_freed_memory_goes_back_only_where_a_limit_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvbases_hf.storage.run import Run, using

    called: list[bool] = []
    monkeypatch.setattr(parallel, "_give_back_freed", lambda: called.append(True))
    for memory in (None, 1 << 30):
        with using(Run(memory=memory, quiet=True)):
            list(parallel.each(["x"], lambda item: item, "", lambda _: 1))
    assert called == [True]
