"""What becomes of every method and option of the installed PEFT, here and by PEFT's own add_weighted_adapter.

Trains nothing: adapters of random numbers on small models. Writes PEFT.md beside this file:

    python examples/compatibility/peft_table.py
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compatibility.peft_variants import VARIANTS, Variant, load_base, make_adapter, make_base
from tvbases_hf.algebra.delta import dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import TvbasesError
from tvbases_hf.merging.fit import Limits
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_files import adapter_tensors, write_adapter
from tvbases_hf.models.lora_template import Template
from tvbases_hf.models.vectors import Vectors
from tvbases_peft import add_weighted_adapter, task_vectors

# Of logits, relative to the largest: what rounding the weights to float32 costs. They are computed in float64, since
# in float32 some of PEFT's layers are rounded more than that themselves (RandLora: 2.3e-6).
EXACT = 1e-6
WEIGHTS = (0.7, -0.4)
IDS = torch.arange(14).reshape(2, 7) * 5 % 40
REFUSED = "refused"


@dataclass(frozen=True)
class Made:
    """A base and two adapters ``a`` and ``b`` of one variant, in ``root``."""

    root: Path
    variant: Variant

    @classmethod
    def of(cls, root: Path, variant: Variant) -> Made:
        base = make_base(root / "base", variant.model)
        for seed, name in enumerate("ab", start=1):
            make_adapter(root / name, base, variant, seed)
        return cls(root, variant)

    @property
    def base(self) -> Path:
        return self.root / "base"

    def model(self, *names: str) -> Any:
        """The model as PEFT loads it with adapters."""
        loaded: Any = load_base(self.base, self.variant.model)
        loaded = peft.PeftModel.from_pretrained(loaded, str(self.root / names[0]), adapter_name=names[0])
        for name in names[1:]:
            loaded.load_adapter(str(self.root / name), adapter_name=name)
        return loaded.eval()


def logits(model: Any) -> Tensor:
    """Of a copy in float64, or as it is where PEFT's code needs that."""
    with torch.no_grad():
        try:
            return copy.deepcopy(model).double().eval()(input_ids=IDS).logits
        except RuntimeError:  # float32 is written into the code of some methods
            return model.eval()(input_ids=IDS).logits.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def from_files(made: Made) -> tuple[float, float]:
    """Errors of one adapter, and of a sum of two, as changes of the checkpoint that transformers then loads."""
    vectors = Vectors.open(made.base, {name: made.root / name for name in "ab"})
    one = relative(logits(changed(made, vectors, (1.0, 0.0))), logits(made.model("a")))
    return one, relative(logits(changed(made, vectors, WEIGHTS)), logits(summed(made)))


def changed(made: Made, vectors: Vectors, weights: tuple[float, ...]) -> Any:
    state = load_file(made.base / "model.safetensors")
    vectors.base.check_storable()
    for name in vectors.names:
        change = dense(total(vectors.deltas(name), weights))
        state[name] = (state[name].double() + change.reshape(state[name].shape)).to(state[name].dtype)
    return _loaded(made, state)


def summed(made: Made) -> Any:
    """The base plus the weighted changes that PEFT itself merges into it, adapter by adapter."""
    model = load_base(made.base, made.variant.model)
    origin = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state = dict(origin)
    for name, weight in zip("ab", WEIGHTS, strict=True):
        merged = made.model(name).double().merge_and_unload().state_dict()
        state = {own: tensor + weight * (merged[own] - origin[own]) for own, tensor in state.items()}
    model.load_state_dict(state)
    return model


def in_a_loaded_model(made: Made) -> float:
    """How far the changes of loaded adapters are from those of the model that PEFT merges."""
    model = made.model("a")
    vectors = task_vectors(model)
    expected = logits(model)
    plain = load_base(made.base, made.variant.model)
    with torch.no_grad():
        for name in vectors.names:
            owner, _, leaf = name.rpartition(".")
            module = plain.get_submodule(owner)
            own = vectors.base.read(name)  # replaced, since an embedding and an output may be one parameter
            change = dense(vectors.deltas(name)[0]).reshape(own.shape)
            setattr(module, leaf, nn.Parameter((own.double() + change).to(own.dtype)))
    return relative(logits(plain), expected)


def as_an_adapter(made: Made) -> float:
    """The LoRA that is written of 1 a + 0 b from files, as stock PEFT loads it, against a."""
    vectors = Vectors.open(made.base, {name: made.root / name for name in "ab"})
    template = Template.of([model for model in vectors.models.values() if isinstance(model, Adapter)], str(made.base))
    changes = {}
    for name in vectors.names:
        inputs = vectors.deltas(name)
        changes[name] = Limits().fit(name, total(inputs, (1.0, 0.0)), inputs, vectors.base, template)
    (made.root / "sum").mkdir(exist_ok=True)
    write_adapter(made.root / "sum", *adapter_tensors(changes, template, vectors.base))
    return relative(logits(made.model("sum")), logits(made.model("a")))


def added(made: Made) -> float:
    """The new adapter 1 a + 0 b of a loaded model, against a."""
    model = made.model("a", "b")
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.0], "sum")
    return _against(model, "sum")


def by_peft(made: Made) -> float:
    model = made.model("a", "b")
    model.add_weighted_adapter(["a"], [1.0], "theirs", combination_type="linear")
    return _against(model, "theirs")


def _against(model: Any, name: str) -> float:
    model.set_adapter("a")
    expected = logits(model)
    model.set_adapter(name)
    return relative(logits(model), expected)


def _loaded(made: Made, state: dict[str, Tensor]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "changed"
        directory.mkdir()
        for file in made.base.glob("*.json"):
            (directory / file.name).write_bytes(file.read_bytes())
        own = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(own, directory / "model.safetensors", {"format": "pt"})
        return load_base(directory, made.variant.model)


def cell(measure: Callable[[Made], Any], made: Made) -> str:
    """An error, or that it is refused (here by name, by PEFT with whatever it raises)."""
    try:
        found = measure(made)
    except TvbasesError:
        return REFUSED
    except Exception as error:  # PEFT's own method is asked for more than it can do
        if measure is not by_peft:
            raise
        return f"raises {type(error).__name__}"
    worst = max(found) if isinstance(found, tuple) else found
    return "exact" if worst <= EXACT else f"{worst:.2g}"


COLUMNS: dict[str, Callable[[Made], Any]] = {
    "files → checkpoint": from_files,
    "loaded model": in_a_loaded_model,
    "files → adapter": as_an_adapter,
    "add_weighted_adapter": added,
    "PEFT's add_weighted_adapter": by_peft,
}


def row(variant: Variant, root: Path) -> dict[str, str]:
    made = Made.of(root, variant)
    return {name: cell(measure, made) for name, measure in COLUMNS.items()}


def table(rows: dict[str, dict[str, str]]) -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells.values()) + " |" for name, cells in rows.items())])


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = {}
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as root:
            rows[name] = row(variant, Path(root))
        print(f"{name}: {', '.join(rows[name].values())}", flush=True)
    text = f"""# PEFT's methods and options

Errors of the logits of small models, relative to the largest logit, of adapters whose numbers are all random; up to
{EXACT:g} is "exact". Weights are stored in float32, and the logits computed in float64, or as they are where the code
of PEFT or transformers needs float32. Written by `python examples/compatibility/peft_table.py` with peft
{peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}.

* files → checkpoint: one adapter, and {WEIGHTS[0]} a {WEIGHTS[1]} b, added to the checkpoint, against PEFT's own merge.
* loaded model: `tvbases_peft.task_vectors` of a loaded adapter, against what it computes.
* files → adapter: the LoRA that is written of 1 a + 0 b, as PEFT loads it, against a.
* add_weighted_adapter: `tvbases_peft.add_weighted_adapter` of 1 a + 0 b in a loaded model, against a. PEFT keeps
  adapters of one method in a model, so that no LoRA can be put beside another method.
* PEFT's own `add_weighted_adapter` (linear) of 1 a, against a. It says nothing where it is wrong.

{table(rows)}
"""
    (Path(__file__).parent / "PEFT.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
