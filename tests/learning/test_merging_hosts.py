"""Every method that needs data, on transformers' models: it runs, leaves the model as it was, and is what it claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from tvbases_hf import Basis, Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import MismatchError, ParameterError
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.inplace import InPlace, Reparametrised
from tvbases_hf.learning.with_data import DATA_METHODS
from tvbases_hf.merging.changes import Edit
from tvbases_hf.merging.write import write
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import fine_tunes, make_llama, save_state
from zoo.merging_models import NAMES, bits, changes, labelled_data, one_hot, random_states, unchanged, vectors_of

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "localize": {"epochs": 2, "sparsity": 0.05, "lr": 100.0},
    "adamerging": {"steps": 2},
    "adamerging_task": {"steps": 2},
    "atlas": {"epochs": 1},
    "atlas_nonnegative": {"epochs": 1},
    "devec": {"epochs": 1},
}
EPS = torch.finfo(torch.float32).eps


def llama() -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=13, tie_word_embeddings=True, **SMALL))  # type: ignore[arg-type]
    return model, lambda seed: _with_labels({"input_ids": torch.randint(0, 13, (2, 6), generator=seed)})  # type: ignore[arg-type]


def bert() -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
    model = BertForSequenceClassification(BertConfig(vocab_size=13, num_labels=3, **SMALL))  # type: ignore[arg-type]
    return model, lambda seed: {
        "input_ids": torch.randint(0, 13, (2, 6), generator=seed),  # type: ignore[arg-type]
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "labels": torch.randint(0, 3, (2,), generator=seed),  # type: ignore[arg-type]
    }


def vit() -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)  # type: ignore[arg-type]
    return ViTForImageClassification(config), lambda seed: {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=seed),  # type: ignore[arg-type]
        "labels": torch.randint(0, 3, (2,), generator=seed),  # type: ignore[arg-type]
    }


def _with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"]}


@pytest.fixture(params=[llama, bert, vit], ids=["llama", "bert", "vit"], scope="module")
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, list[TaskData]]:
    torch.manual_seed(0)
    model, make = request.param()
    seed = torch.Generator().manual_seed(0)
    data = [TaskData(name, [make(seed), make(seed)]) for name in NAMES]
    states = random_states(model, 3, size=0.05)
    return model, vectors_of(model, states), data


@pytest.fixture(params=list(DATA_METHODS))
def method(request: pytest.FixtureRequest) -> Callable[..., Any]:
    chosen = DATA_METHODS[request.param]
    return lambda *given, **named: chosen(*given, **{**OPTIONS.get(request.param, {}), **named})


def test_every_method_runs_on_every_host_and_changes_nothing_in_the_model(host, method) -> None:
    model, task_vectors, data = host
    vectors = task_vectors
    model.train()
    before = bits(model)
    found = method(vectors, model, data)
    assert unchanged(model, before) and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert found.names == vectors.names
    merged = changes(found)
    assert all(value.shape == model.state_dict()[name].shape for name, value in merged.items())
    assert all(torch.isfinite(value).all() for value in merged.values())
    assert sum(float(value.abs().sum()) for value in merged.values()) > 0
    model.eval()
    with InPlace(model, found.names).changed(found.change) as changed:
        inside = data[0].logits(changed, data[0].batches[0])  # type: ignore[index]
    assert not torch.equal(inside, data[0].logits(model, data[0].batches[0]))  # type: ignore[index]
    assert unchanged(model, before)


def test_a_model_asked_with_its_own_weights_has_its_own_loss(host) -> None:
    """A language model that is asked with other weights still shifts its labels."""
    model, _, data = host
    batch = data[0].batches[0]
    asked = Reparametrised(model.eval(), dict(model.named_parameters()))
    assert torch.allclose(data[0].loss(asked, batch), model(**batch).loss, rtol=1e-6)


def test_over_one_hot_bases_every_method_equals_its_task_vector_version(method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    task_vectors, data = vectors_of(model, random_states(model, 3)), labelled_data(5, 3)
    plain = changes(method(task_vectors, model, data))
    bases = changes(method(one_hot(task_vectors), model, data))
    for name, value in plain.items():
        # Bases are stored in float32: one rounding, which a few steps of a learner may carry on.
        assert torch.allclose(bases[name], value, rtol=0, atol=1e2 * EPS * float(value.abs().max()))
    other = task_vectors.selected([0, 1])
    assert not torch.allclose(changes(method(other, model, data))["0.weight"], plain["0.weight"], rtol=1e-2)


def test_a_seed_gives_one_result(method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    vectors, data = vectors_of(model, random_states(model, 3)), labelled_data(5, 3)
    first, second = changes(method(vectors, model, data)), changes(method(vectors, model, data))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_the_merged_model_is_written_as_it_was_evaluated(method, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    task_vectors, data = vectors_of(model, random_states(model, 3)), labelled_data(5, 3)
    found = method(task_vectors, model, data)
    report = write(found, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    with InPlace(model, found.names).changed(found.change) as changed:
        assert all(torch.equal(written[name], value) for name, value in changed.state_dict().items())
    assert (
        json.loads((tmp_path / "out" / "tvbases_merge.json").read_text())["method"] == report["method"] == found.method
    )
    write(Edit.of(task_vectors, found.change, "half of it", 0.5), tmp_path / "half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    with InPlace(model, found.names).changed(found.change, 0.5) as changed:
        assert all(torch.equal(half[name], value) for name, value in changed.state_dict().items())


def test_data_that_does_not_fit_is_refused_by_name(method, request: pytest.FixtureRequest) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    vectors, data = vectors_of(model, random_states(model, 3)), labelled_data(5, 3)
    name = request.node.callspec.params["method"]
    if not name.startswith(("atlas", "devec")):  # which learns from data of any task
        with pytest.raises(ParameterError, match=r"1 of 3 tasks have no data \(first: chat\)"):
            method(vectors, model, data[:2])
        with pytest.raises(
            ParameterError, match=r"1 of 4 data sets belong to no task \(first: law\).*math, code, chat"
        ):
            method(vectors, model, [*data, TaskData("law", data[0].batches, data[0].readout)])
        with pytest.raises(ParameterError, match='2 data sets are named "math"'):
            method(vectors, model, [*data, data[0]])
    bare = [TaskData(t.name, t.batches, lambda m, b: (m(b[0]), None)) for t in data]
    if name in ("localize", "atlas", "atlas_nonnegative", "devec", "fisher_empirical"):
        with pytest.raises(ParameterError, match='"math" has no labels, which this needs'):
            method(vectors, model, bare)
    else:
        method(vectors, model, bare)
    before = bits(model)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    with pytest.raises(MismatchError, match=r"1 of 4 weights of the model are not those of the base .*0\.weight"):
        method(vectors, model, data)
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(before[0])
    with pytest.raises(MismatchError, match="load the class of model"):
        method(vectors, nn.Linear(5, 3), data)


def test_a_weight_with_two_names_is_refused_where_the_base_has_it_twice(method) -> None:
    model, make = llama()
    seed = torch.Generator().manual_seed(0)
    base = Checkpoint.from_state_dict(model.state_dict())
    vectors = Vectors.of_models(base, {"math": base, "code": base})
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight and lm_head\.weight are one weight in the model"):
        method(vectors, model, [TaskData(task, [make(seed)]) for task in vectors.tasks])  # type: ignore[arg-type]


def test_a_task_without_a_share_needs_no_data(method) -> None:
    """RandSelect: two of three tasks are kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    vectors, data = vectors_of(model, random_states(model, 3)), labelled_data(5, 3)
    kept = vectors.selected([0, 2])
    found = changes(method(kept, model, [data[0], data[2]]))
    direct = vectors_of(model, [random_states(model, 3)[i] for i in (0, 2)])
    renamed = [data[0], TaskData("code", data[2].batches, data[2].readout)]
    expected = changes(method(direct, model, renamed))
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_stitched_masks_are_zero_outside(host) -> None:
    model, task_vectors, data = host
    found = DATA_METHODS["localize"](task_vectors, model, data, epochs=0, sparsity=0.1)
    kept = sum(int((value != 0).sum()) for value in changes(found).values())
    total = sum(dense(d).numel() for name in task_vectors.names for d in task_vectors.deltas(name)[:1])
    assert 0.1 * total <= kept <= 3 * 0.1 * total + 3


def test_directories_in_and_a_directory_out_that_transformers_loads(tmp_path: Path) -> None:
    """As in the README: data sets of text, over the task vectors and over a basis directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_llama(tmp_path / "base")
    tuned = fine_tunes(load_file(base / "model.safetensors"), 3, seed=0)
    paths = {name: save_state(tmp_path / name, state, base) for name, state in zip(NAMES, tuned, strict=True)}
    task_vectors = Vectors.open(base, paths)
    Basis.build(task_vectors, 2).save_pretrained(tmp_path / "basis")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = {name: [{"text": f"word{i} word{i + 3} word{5 * i}"} for i in range(6)] for name in NAMES}
    data = [TaskData.of_dataset(name, rows[name], tokenizer=tokenizer, batch_size=2) for name in NAMES]

    found = DATA_METHODS["regmean"](task_vectors, model, data)
    write(found, tmp_path / "merged")
    bases = Basis.from_pretrained(tmp_path / "basis").vectors(base)
    write(DATA_METHODS["regmean"](bases, model, data), tmp_path / "fewer")
    before = model.state_dict()
    for out in ("merged", "fewer"):
        state = AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict()
        assert not any(torch.equal(state[name], before[name]) for name in found.names)
