"""Sums and inner products of adapters in factor space, and merged adapters written for stock PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, Dora, LowRank, dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.fit import Limits
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.models.layouts import Layout
from tvbases_hf.models.lora_files import adapter_tensors, write_adapter
from tvbases_hf.models.lora_template import Template
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.peft_models import (
    VOCABULARY,
    Case,
    load_adapter,
    load_base,
    make_adapter,
    make_base,
    outputs,
    relative,
)

TOLERANCE = 1e-5
WEIGHTS = [0.7, -1.3, 0.4]
LORAS = [
    {"target_modules": ["q_proj", "k_proj"], "r": 3, "lora_alpha": 5},
    {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_rslora": True, "alpha_pattern": {"down_proj": 9}},
    {"target_modules": ["k_proj", "q_proj"], "r": 5, "rank_pattern": {"layers.1.self_attn.q_proj": 1}},
]
DORAS = [LORAS[0], LORAS[1] | {"use_dora": True}, {"target_modules": ["q_proj"], "r": 1, "use_dora": True}]


def adapters(root: Path, base: Path, model: str, configs: Sequence[dict[str, Any]]) -> dict[str, Path]:
    return {
        f"task{i}": make_adapter(root / f"task{i}", base, Case(model, config), seed=i)
        for i, config in enumerate(configs)
    }


def peft_sum(base: Path, model: str, paths: Sequence[Path], configs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """sum_i w_i get_delta_weight of PEFT's own layers, float64, by the name of the weight."""
    summed: dict[str, Tensor] = {}
    for weight, path, config in zip(WEIGHTS, paths, configs, strict=True):
        loaded: Any = load_adapter(base, Case(model, config), path).double()
        for name, module in loaded.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = weight * module.get_delta_weight("default").detach()
                summed[f"{name}.weight"] = summed.get(f"{name}.weight", 0) + delta
    return summed


def flattened(vectors: Vectors) -> Tensor:
    """[T, d] the dense task vectors, float64."""
    deltas = [vectors.deltas(name) for name in vectors.names]
    return torch.stack([torch.cat([dense(row[i]).reshape(-1) for row in deltas]) for i in range(len(vectors))])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("sums") / "base", Case("llama", {}))


@pytest.fixture(scope="module", params=["lora", "dora"])
def vectors(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    paths = adapters(tmp_path_factory.mktemp("sums"), base, "llama", LORAS if request.param == "lora" else DORAS)
    return Vectors.open(base, paths)


def test_a_sum_of_adapters_is_the_sum_of_pefts_delta_weights(base: Path, tmp_path: Path) -> None:
    paths = adapters(tmp_path, base, "llama", LORAS)
    vectors = Vectors.open(base, paths)
    expected = peft_sum(base, "llama", list(paths.values()), LORAS)
    assert set(vectors.names) == set(expected)
    for name in vectors.names:
        found = total(vectors.deltas(name), WEIGHTS)
        assert isinstance(found, LowRank)
        assert float((dense(found) - expected[name]).norm() / expected[name].norm()) <= 1e-6
    changes = {name: total(vectors.deltas(name), WEIGHTS) for name in vectors.names}
    sources = [Adapter.open(path, vectors.base) for path in paths.values()]
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", *adapter_tensors(changes, Template.of(sources, str(base)), vectors.base))
    loaded: Any = load_adapter(base, Case("llama", {}), tmp_path / "out").double()
    for name, change in expected.items():
        found = loaded.base_model.model.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
        assert float((found - change).norm() / change.norm()) <= 1e-6


def test_gram_matrices_in_factor_space_are_those_of_the_dense_changes(vectors: Vectors) -> None:
    stacked = flattened(vectors)
    expected = stacked @ stacked.T
    assert relative(gram_matrix(vectors).matrix, expected) <= 1e-12


def test_gram_matrices_of_adapters_beside_checkpoints_are_those_of_the_dense_changes(
    base: Path, tmp_path: Path
) -> None:
    """A checkpoint into which an adapter was merged is the same task vector as the adapter, DoRA included."""
    paths: dict[str, Path] = adapters(tmp_path, base, "llama", DORAS)
    merged: Any = load_adapter(base, Case("llama", DORAS[1]), paths["task1"])
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    vectors = Vectors.open(base, {**paths, "merged": tmp_path / "merged"})
    gram = gram_matrix(vectors).matrix
    stacked = flattened(vectors)
    assert relative(gram, stacked @ stacked.T) <= 1e-12
    # The merged weights were rounded to float32, a change of which is about a tenth of the weight.
    assert relative(gram[3, :3], gram[1, :3]) <= 1e-5


MERGES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "ranks, alphas and targets": ("llama", LORAS, {}),
    "lora and dora": ("llama", DORAS, {}),
    "dora and an embedding": (
        "llama", [DORAS[1], {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]}], {},
    ),
    "conv1d and linear": (
        "gpt2",
        [{"target_modules": ["c_proj"]}, {"target_modules": ["lm_head", "c_attn"]}, {"target_modules": ["wpe"]}],
        {"tie_word_embeddings": False},
    ),
    "dora, convolutions and an embedding": (
        "vision",
        [{"target_modules": ["wide", "line", "out"], "use_dora": True}, {"target_modules": ["point", "table"]},
         {"target_modules": ["wide", "cube"], "r": 2}],
        {},
    ),
    "lora_bias and none": (
        "bert",
        [{"target_modules": ["query"], "lora_bias": True, "use_rslora": True}, {"target_modules": ["dense"]},
         {"target_modules": ["dense"], "lora_bias": True}],
        {},
    ),
    "lora_bias and dora": (
        "bert",
        [{"target_modules": ["query"], "lora_bias": True}, {"target_modules": ["dense"], "use_dora": True},
         {"target_modules": ["query"], "bias": "all"}],
        {},
    ),
    "a module with factors here and saved whole there": (
        "llama",
        [{"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
         {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MERGES))
def test_stock_peft_loads_a_merged_adapter_as_base_plus_the_sum(name: str, tmp_path: Path) -> None:
    model, configs, options = MERGES[name]
    case = Case(model, {}, options)
    base = make_base(tmp_path / "base", case)
    checkpoint = Checkpoint.open(base)
    sources = [
        Adapter.open(make_adapter(tmp_path / f"task{i}", base, Case(model, config, options), seed=i), checkpoint)
        for i, config in enumerate(configs)
    ]
    vectors = Vectors.of_models(checkpoint, {f"task{i}": source for i, source in enumerate(sources)})
    changes = {own: total(vectors.deltas(own), WEIGHTS) for own in vectors.names}
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", *adapter_tensors(changes, Template.of(sources, str(base)), checkpoint))
    expected: Any = load_base(base, case).double()
    state = {own: expected.state_dict()[own] + dense(delta).reshape(expected.state_dict()[own].shape)
             for own, delta in changes.items()}  # fmt: skip
    expected.load_state_dict(state, strict=False)
    assert relative(outputs(load_adapter(base, case, tmp_path / "out")), outputs(expected)) <= TOLERANCE


# Writing


def written(changes: dict[str, Delta], base: Path, adapter: Path, out: Path) -> Path:
    checkpoint = Checkpoint.open(base)
    template = Template.of([Adapter.open(adapter, checkpoint)], str(base))
    out.mkdir()
    write_adapter(out, *adapter_tensors(changes, template, checkpoint))
    return out


def test_dora_can_scale_rows_to_zero_and_below(base: Path, tmp_path: Path) -> None:
    case = Case("llama", DORAS[2])
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = Adapter.open(make_adapter(tmp_path / "a", base, case), Checkpoint.open(base))
    delta = adapter.delta(name)
    assert isinstance(delta, Dora)
    rows = delta.row_scale.clone()
    rows[:4] = torch.tensor([-1.0, -2.5, -1 - 1e-7, -1 + 1e-7])
    change = Dora(rows, delta.base, delta.low)
    out = written({name: change}, base, tmp_path / "a", tmp_path / "out")
    found = Adapter.open(out, Checkpoint.open(base)).delta(name)
    assert found is not None
    assert float((dense(found) - dense(change)).norm() / delta.base.norm()) <= 1e-6
    expected: Any = load_base(base, case).double()
    expected.load_state_dict({name: expected.state_dict()[name] + dense(change)}, strict=False)
    assert relative(outputs(load_adapter(base, case, out)), outputs(expected)) <= TOLERANCE


def test_a_change_of_rank_zero_is_written_as_one_that_changes_nothing(base: Path, tmp_path: Path) -> None:
    case = Case("llama", LORAS[0])
    adapter = make_adapter(tmp_path / "a", base, case)
    nothing = LowRank(torch.zeros(16, 0), torch.zeros(0, 16))
    out = written({"model.layers.0.self_attn.q_proj.weight": nothing}, base, adapter, tmp_path / "out")
    assert torch.equal(outputs(load_adapter(base, case, out)), outputs(load_base(base, case)))


def test_saved_modules_alone_make_an_adapter_that_peft_loads(base: Path, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    adapter = make_adapter(tmp_path / "a", base, case)
    change = Dense(torch.randn(VOCABULARY, 16))
    out = written({"lm_head.weight": change}, base, adapter, tmp_path / "out")
    expected: Any = load_base(base, case).double()
    expected.lm_head.weight.data += change.tuned
    assert relative(outputs(load_adapter(base, case, out)), outputs(expected)) <= TOLERANCE


def test_a_dense_change_of_a_module_with_factors_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, Case("llama", LORAS[0]))
    with pytest.raises(ParameterError, match=r"q_proj.weight is not low-rank"):
        change = Dense(torch.ones(16, 16))
        written({"model.layers.0.self_attn.q_proj.weight": change}, base, adapter, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_patterns_of_ranks_do_not_reach_longer_names(tmp_path: Path) -> None:
    """PEFT matches the ends of names; ``out`` must not give its rank to ``inner.out``."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4)})
            self.out = torch.nn.Linear(4, 4)
            self.last = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.out(self.inner["out"](x)))

    from peft import PeftModel

    model: Any = Model()
    base = Checkpoint.from_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    ranks = {"inner.out": 2, "out": 1, "last": 2}
    changes: dict[str, Delta] = {f"{m}.weight": LowRank(torch.randn(4, r), torch.randn(r, 4)) for m, r in ranks.items()}
    template = Template({f"{m}.weight": Layout(m, "linear") for m in ranks}, {})
    write_adapter(tmp_path, *adapter_tensors(changes, template, base))
    loaded: Any = PeftModel.from_pretrained(model, str(tmp_path))
    for module in ranks:
        found = loaded.base_model.model.get_submodule(module).get_delta_weight("default")
        assert relative(found.double(), dense(changes[f"{module}.weight"])) <= 1e-6


def test_a_dora_whose_rows_vanish_is_rounded_to_finite_numbers() -> None:
    low = LowRank(torch.ones(4, 1), torch.ones(1, 6))
    change = Dora(torch.tensor([-1.0, 0.0, 1.0, -2.0]), torch.ones(4, 6), low)
    template = Template({"w.weight": Layout("w", "linear")}, {})
    base = Checkpoint.from_state_dict({"w.weight": torch.ones(4, 6)})
    fitted = Limits(dtype=torch.bfloat16).fit("w.weight", change, [change], base, template)
    assert torch.equal(dense(fitted), dense(change))  # all of these numbers are short
