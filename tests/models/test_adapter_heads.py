"""Classifiers that adapters bring along and the base lacks, as after training from a model without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config
from tvbases_hf.basis import LoraBasis
from tvbases_hf.errors import MismatchError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.output import write_json
from zoo.adapter_families import Adapters, stored_bytes
from zoo.adapter_zoo import run_native
from zoo.peft_models import Case, edit_tensors, load_adapter, load_base, make_adapter, make_base, outputs, relative

TOLERANCE = 1e-5
TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 4}
HEADS = {"bert": Case("bert", TARGETS), "roberta": Case("roberta", TARGETS)}


def make_trunk(root: Path, case: Case) -> Path:
    """The base as it is shared: the model of the adapters without its classifier."""
    whole = make_base(root / "whole", case)
    checkpoint = Checkpoint.open(whole)
    trunk = {name: checkpoint.read(name) for name in checkpoint.tensors if not name.startswith("classifier")}
    (root / "base").mkdir()
    save_file(trunk, root / "base" / "model.safetensors", {"format": "pt"})
    write_json(root / "base" / "config.json", dict(checkpoint.config))
    return root / "base"


def copy_head(source: Path, target: Path) -> Path:
    """Give one adapter the classifier of another."""
    stored = Checkpoint.open(source / "adapter_model.safetensors")
    head = {name: stored.read(name) for name in stored.tensors if "classifier" in name}
    return edit_tensors(target, lambda old: old | head)


def with_trunk(base: Path, case: Case, adapter: Path) -> Tensor:
    """PEFT's logits: a model with a random head over the trunk, and the adapter's own head in its place."""
    torch.manual_seed(11)
    return outputs(load_adapter(base, case, adapter))


@pytest.fixture(scope="module", params=sorted(HEADS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Three adapters of one classifier over a trunk."""
    root, case = tmp_path_factory.mktemp("heads"), HEADS[request.param]
    base = make_trunk(root, case)
    paths = {task: make_adapter(root / task, base, case, seed=i) for i, task in enumerate(("math", "code", "law"))}
    for task in ("code", "law"):
        copy_head(paths["math"], paths[task])
    return Adapters(case, base, paths)


def addition(family: Adapters, weights: dict[str, float]) -> dict[str, Any]:
    models = [{"model": str(family.tasks[task]), "parameters": {"weight": weight}} for task, weight in weights.items()]
    return {"merge_method": "task_arithmetic", "base_model": str(family.base), "models": models}


def test_the_head_is_no_change_of_the_base_and_is_read_as_it_is(family: Adapters) -> None:
    adapter = Adapter.open(family.tasks["math"], Checkpoint.open(family.base))
    stored = Checkpoint.open(family.tasks["math"] / "adapter_model.safetensors")
    assert adapter.head and not any("classifier" in name for name in adapter.names)
    for name, tensor in adapter.head.items():
        assert torch.equal(tensor, stored.read(f"base_model.model.{name}"))


def test_one_adapter_merged_with_weight_one_is_that_adapter_with_its_head(family: Adapters, tmp_path: Path) -> None:
    expected = with_trunk(family.base, family.case, family.tasks["math"])
    outcome = run_native(addition(family, {"math": 1.0}), tmp_path / "out", "--adapter")
    assert relative(with_trunk(family.base, family.case, tmp_path / "out"), expected) <= TOLERANCE
    assert "tensors are not in the base (first: classifier." in outcome.err


def test_a_head_that_only_one_of_the_adapters_brings_is_kept(family: Adapters, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    make_adapter(headless, family.base, Case(family.case.model, {"target_modules": ["query"], "r": 2}), seed=9)
    models = Adapters(family.case, family.base, {"headless": headless, "code": family.tasks["code"]})
    run_native(addition(models, {"headless": 0.0, "code": 1.0}), tmp_path / "out", "--adapter")
    expected = with_trunk(family.base, family.case, family.tasks["code"])
    assert relative(with_trunk(family.base, family.case, tmp_path / "out"), expected) <= TOLERANCE


def test_a_basis_of_adapters_with_one_head_gives_every_task_back_with_it(family: Adapters, tmp_path: Path) -> None:
    LoraBasis.build(family.vectors(), method="tsv", rank=4).save_pretrained(tmp_path / "basis")
    basis = LoraBasis.from_pretrained(tmp_path / "basis")
    torch.manual_seed(5)
    model = basis.attach(load_base(family.base, family.case))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for task, path in family.tasks.items():
        expected = with_trunk(family.base, family.case, path)
        basis.adapter(task).save_pretrained(tmp_path / "one")
        assert relative(with_trunk(family.base, family.case, tmp_path / "one"), expected) <= TOLERANCE
        basis.select(model, task)
        assert relative(outputs(model), expected) <= TOLERANCE
    assert relative(outputs(model.merge_and_unload()), expected) <= TOLERANCE  # of the last task
    ones = {task: 1.0 for task in family.tasks}
    run_native(addition(family, ones), tmp_path / "sum", "--adapter")
    expected = with_trunk(family.base, family.case, tmp_path / "sum")
    assert relative(with_trunk(family.base, family.case, tmp_path / "basis"), expected) <= TOLERANCE


def test_the_bytes_of_the_head_are_part_of_the_budget(family: Adapters, tmp_path: Path) -> None:
    LoraBasis.build(family.vectors(), budget=0.7).save_pretrained(tmp_path / "basis")
    assert stored_bytes(tmp_path / "basis") <= 0.7 * sum(stored_bytes(path) for path in family.tasks.values())


def test_a_checkpoint_leaves_the_head_out_and_says_so(family: Adapters, tmp_path: Path) -> None:
    file = write_config(tmp_path / "merge.yml", addition(family, {"math": 1.0}))
    outcome = tvbases("merge", file, tmp_path / "out", "--quiet")
    assert outcome.code == 0 and "a checkpoint leaves them out" in " ".join(outcome.err.split())
    assert set(Checkpoint.open(tmp_path / "out").tensors) == set(Checkpoint.open(family.base).tensors)


def test_different_heads_are_refused_where_one_adapter_would_have_to_hold_them(
    family: Adapters, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", family.base, family.case, seed=8)
    models = Adapters(family.case, family.base, {"math": family.tasks["math"], "other": other})
    file = write_config(tmp_path / "merge.yml", addition(models, {"math": 1.0, "other": 1.0}))
    message = "each bring a head of their own (classifier."
    assert message in refused(tmp_path, "merge", file, tmp_path / "out", "--adapter", "--quiet")
    outcome = tvbases("compress", *models.options(), "--out", tmp_path / "out", "--quiet")
    assert outcome.code == 2 and message in outcome.err and not (tmp_path / "out").exists()
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0  # a checkpoint has none


def test_a_module_with_factors_that_the_base_lacks_is_no_head(family: Adapters, tmp_path: Path) -> None:
    output = {"bert": "classifier", "roberta": "out_proj"}[family.case.model]
    case = Case(family.case.model, {"target_modules": ["query", output]})
    adapter = make_adapter(tmp_path / "a", family.base, case)
    with pytest.raises(MismatchError, match="does not have"):
        Vectors.open(family.base, {"a": adapter})
