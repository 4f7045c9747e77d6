"""A basis on a model: selected tasks and mixed rows are the separately merged models, row by row."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands.command_line import snapshot
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.errors import MismatchError, MissingExtraError, ParameterError
from tvbases_hf.models.vectors import Vectors
from zoo.adapter_families import LLAMA, TASKS, Adapters, random_adapter, random_adapters, related_adapters
from zoo.peft_models import IDS, IMAGES, Case, load_adapter, load_base, make_base

EPS = torch.finfo(torch.float32).eps
# Factors in float32, layers in float64: a few dozen roundings of the factors through two layers.
SAME = 200 * EPS
DORA = replace(LLAMA, config={**LLAMA.config, "use_dora": True})
ROWS = torch.cat([IDS, IDS.flip(1)])
REQUESTS = {
    "joint": dict(method="joint", budget=0.6),
    "ae": dict(method="ae", num_bases=2),
    "tsv": dict(method="tsv", rank=2),
    "alpha": dict(method="joint", budget=0.6, alpha=0.5),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return related_adapters(tmp_path_factory.mktemp("related"))


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("dora"), DORA, TASKS[:3])


@pytest.fixture(scope="module")
def joint(family: Adapters) -> LoraBasis:
    return LoraBasis.build(family.vectors(), **REQUESTS["joint"])


def fresh(family: Adapters) -> Any:
    return load_base(family.base, family.case).eval()


def logits(model: Any, ids: Tensor = ROWS) -> Tensor:
    with torch.no_grad():
        return model.double().eval()(ids).logits


def task_model(basis: LoraBasis, family: Adapters, task: str | None) -> Any:
    """The base with one task's reconstruction (None: alpha times the sum) added to its weights, float64."""
    model = fresh(family).double()
    state = model.state_dict()
    from tvbases_hf.storage.checkpoint import Checkpoint

    base = Checkpoint.open(family.base)
    assert basis.info.adapters is not None
    for name in basis.names:
        if task is not None:
            change = sum(share * dense(part) for share, part in basis.terms(task, name, base))
        else:
            every = [dense(part) for part in basis.deltas(name)]
            own = [
                weight * dense(part)
                for index, weight in enumerate(basis.info.effective_weights)
                for part in basis._source.own(name, index, base)
            ]
            change = basis.info.adapters.alpha * torch.stack(every + own).sum(0)
        assert isinstance(change, Tensor)
        state[name] += change.reshape(state[name].shape)
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = SAME) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# Selecting


@pytest.mark.parametrize("how", sorted(REQUESTS))
def test_every_selection_is_the_separately_merged_model(how: str, family: Adapters) -> None:
    basis = LoraBasis.build(family.vectors(), **REQUESTS[how])
    model = basis.attach(fresh(family), "math")
    for task in ("math", "law", None, "code", "math"):
        basis.select(model, task)
        assert close(logits(model), logits(task_model(basis, family, task))), task


def test_every_selection_of_doras_is_the_separately_merged_model(dora: Adapters) -> None:
    basis = LoraBasis.build(dora.vectors(), method="joint", budget=0.6)
    model = basis.attach(fresh(dora))
    for task in (None, "math", "code"):
        basis.select(model, task)
        assert close(logits(model), logits(task_model(basis, dora, task))), task


def test_tasks_differ_so_that_the_comparison_can_fail(family: Adapters, joint: LoraBasis) -> None:
    outputs = [logits(task_model(joint, family, task)) for task in (*TASKS, None)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert not close(a, b, 1e-3)


def test_a_loaded_basis_selects_on_a_model_that_the_built_one_was_attached_to(
    family: Adapters, joint: LoraBasis, tmp_path: Path
) -> None:
    joint.save_pretrained(tmp_path / "basis")
    model = joint.attach(fresh(family))
    LoraBasis.from_pretrained(tmp_path / "basis").select(model, "chat")
    assert close(logits(model), logits(task_model(joint, family, "chat")))


def test_a_base_of_another_name_is_attached_to_without_a_warning(family: Adapters, joint: LoraBasis) -> None:
    """Its weights are compared; PEFT compares names, and says that the model may be wrong."""
    model = fresh(family)
    model.name_or_path = "moved/"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The PEFT config")
        attached = joint.attach(model, "math")
    assert attached.peft_config[attached.active_adapter].base_model_name_or_path == "moved/"


def test_a_copy_of_the_model_has_a_selection_of_its_own(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family), "math")
    other = copy.deepcopy(model)
    joint.select(other, "law")
    assert close(logits(model), logits(task_model(joint, family, "math")))
    assert close(logits(other), logits(task_model(joint, family, "law")))


def test_the_adapter_is_frozen_and_can_be_disabled(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family), "math")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.disable_adapter():
        assert close(logits(model), logits(fresh(family)))


# Mixed rows


@pytest.mark.parametrize("how", sorted(REQUESTS))
def test_each_row_of_a_mixed_batch_is_its_own_tasks(how: str, family: Adapters) -> None:
    basis = LoraBasis.build(family.vectors(), **REQUESTS[how])
    model = basis.attach(fresh(family), "chat")
    tasks = ["math", "code", None, "math"]
    with basis.mixed(model, tasks):
        found = logits(model)
    for row, task in enumerate(tasks):
        assert close(found[row], logits(task_model(basis, family, task))[row]), task
    assert close(logits(model), logits(task_model(basis, family, "chat")))  # what was selected is selected again


def test_rows_of_doras_are_mixed(dora: Adapters) -> None:
    basis = LoraBasis.build(dora.vectors(), method="joint", budget=0.6)
    model = basis.attach(fresh(dora))
    tasks = ["code", "math", None, "chat"]
    with basis.mixed(model, tasks):
        found = logits(model)
    for row, task in enumerate(tasks):
        assert close(found[row], logits(task_model(basis, dora, task))[row]), task


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_generation_of_mixed_rows_is_that_of_the_merged_models(
    beams: int, family: Adapters, joint: LoraBasis
) -> None:
    tasks = ["math", "code", "chat", "law"]
    model = joint.attach(fresh(family))
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    with joint.mixed(model, tasks, repeat=beams):
        found = model.generate(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), **how)
    for row, task in enumerate(tasks):
        ids = ROWS[row : row + 1]
        alone = task_model(joint, family, task).float()
        expected = alone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        assert found[row].tolist() == expected[0].tolist(), task
        joint.select(model, task)
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how).tolist() == expected.tolist()


def test_a_batch_of_another_length_is_refused_before_it_is_computed(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family))
    with joint.mixed(model, ["math", "code"]), pytest.raises(ParameterError, match="the batch has 4 rows but mixed"):
        logits(model)
    with joint.mixed(model, ["math"] * 4):
        assert close(logits(model), logits(task_model(joint, family, "math")))
    with pytest.raises(ParameterError, match="repeat="), joint.mixed(model, ["math", "code"]):
        model.generate(input_ids=IDS, num_beams=2, max_new_tokens=2, pad_token_id=0)


def test_a_failure_inside_mixed_leaves_the_selection_as_it_was(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family), "law")
    with pytest.raises(RuntimeError, match="mine"), joint.mixed(model, ["math"] * 4):
        raise RuntimeError("mine")
    assert close(logits(model), logits(task_model(joint, family, "law")))


# PEFT's own operations


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["family", "dora"])
def test_merge_and_unload_gives_the_selected_tasks_model(kind: str, safe: bool, request: pytest.FixtureRequest) -> None:
    adapters: Adapters = request.getfixturevalue(kind)
    basis = LoraBasis.build(adapters.vectors(), method="joint", budget=0.6)
    model = basis.attach(fresh(adapters).double(), "math")
    basis.select(model, "code")
    plain = model.merge_and_unload(safe_merge=safe)
    assert not any("lora" in name for name, _ in plain.named_modules())
    assert close(logits(plain), logits(task_model(basis, adapters, "code")))


@pytest.mark.parametrize("kind", ["family", "dora"])
def test_unmerging_restores_the_base_and_only_then_another_task_can_be_selected(
    kind: str, request: pytest.FixtureRequest
) -> None:
    adapters: Adapters = request.getfixturevalue(kind)
    basis = LoraBasis.build(adapters.vectors(), method="joint", budget=0.6)
    model = basis.attach(fresh(adapters).double(), "math")
    model.merge_adapter()
    assert close(logits(model), logits(task_model(basis, adapters, "math")))
    with pytest.raises(ParameterError, match="unmerge_adapter"):
        basis.select(model, "code")
    model.unmerge_adapter()
    basis.select(model, "code")
    assert close(logits(model), logits(task_model(basis, adapters, "code")))


def test_rows_of_different_tasks_cannot_be_merged(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family))
    with joint.mixed(model, ["math", "code"]), pytest.raises(ParameterError, match="cannot be merged into one weight"):
        model.merge_adapter()


def test_saving_after_a_selection_saves_the_whole_basis(family: Adapters, joint: LoraBasis, tmp_path: Path) -> None:
    joint.save_pretrained(tmp_path / "basis")
    before = snapshot(tmp_path / "basis")
    basis = LoraBasis.from_pretrained(tmp_path / "basis")
    model = basis.attach(fresh(family), "math")
    basis.select(model, "code")
    basis.save_pretrained(tmp_path / "basis")
    assert snapshot(tmp_path / "basis") == before
    model.save_pretrained(str(tmp_path / "peft"))  # PEFT's own: the sum of the vectors, as the stock file
    found = load_adapter(family.base, family.case, tmp_path / "peft")
    assert close(logits(found), logits(task_model(basis, family, None)))


def test_a_basis_stands_next_to_another_adapter(family: Adapters, joint: LoraBasis, tmp_path: Path) -> None:
    random_adapter(tmp_path / "other", family.base, LLAMA, seed=5)
    alone = logits(load_adapter(family.base, family.case, tmp_path / "other"))
    model = joint.attach(load_adapter(family.base, family.case, tmp_path / "other"), "code")
    assert close(logits(model), logits(task_model(joint, family, "code")))
    model.set_adapter("default")
    assert close(logits(model), alone)
    model.set_adapter("basis")
    joint.select(model, "law")
    assert close(logits(model), logits(task_model(joint, family, "law")))


def test_two_bases_stand_on_one_model_each_with_its_own_selection(family: Adapters, joint: LoraBasis) -> None:
    sums = LoraBasis.build(family.vectors(), **REQUESTS["ae"])
    model = joint.attach(fresh(family), "math")
    model = sums.attach(model, "code", adapter_name="sums")
    assert close(logits(model), logits(task_model(sums, family, "code")))
    model.set_adapter("default")
    assert close(logits(model), logits(task_model(joint, family, "math")))
    sums.select(model, "law")
    assert close(logits(model), logits(task_model(joint, family, "math")))


def test_the_same_basis_twice_needs_a_name(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(joint.attach(fresh(family)), adapter_name="again")
    with pytest.raises(ParameterError, match="attached 2 times"):
        joint.select(model, "math")
    joint.select(model, "math", adapter_name="again")
    assert close(logits(model), logits(task_model(joint, family, "math")))


def test_a_base_in_half_precision_takes_a_basis(family: Adapters, joint: LoraBasis) -> None:
    model = joint.attach(fresh(family).bfloat16(), "math")
    with torch.no_grad():
        found = model(ROWS).logits.double()
    expected = logits(task_model(joint, family, "math"))
    assert (found - expected).norm() <= 10 * torch.finfo(torch.bfloat16).eps * expected.norm()


# Other kinds of layers


def test_convolutions_and_embeddings_switch_tasks(tmp_path: Path) -> None:
    case = Case("vision", {"target_modules": ["wide", "point", "line", "cube", "table", "out"]})
    adapters = random_adapters(tmp_path, case, TASKS[:3])
    basis = LoraBasis.build(adapters.vectors(), method="joint", budget=0.8)
    model = basis.attach(fresh(adapters), "math").double()
    images, ids = IMAGES, IDS

    def run(each: Any) -> Tensor:
        with torch.no_grad():
            return each.double()(images, ids)

    for task in ("math", "chat", None):
        basis.select(model, task)
        assert close(run(model), run(task_model(basis, adapters, task))), task
    with basis.mixed(model, ["code", "math"]):
        found = run(model)
    for row, task in enumerate(["code", "math"]):
        assert close(found[row], run(task_model(basis, adapters, task))[row]), task
    basis.select(model, "code")
    assert close(run(model.merge_and_unload()), run(task_model(basis, adapters, "code")))


def test_layers_stored_transposed_switch_tasks(tmp_path: Path) -> None:
    case = Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"})
    adapters = random_adapters(tmp_path, case, TASKS[:3])
    basis = LoraBasis.build(adapters.vectors(), method="joint", budget=0.7)
    model = basis.attach(fresh(adapters))
    tasks = ["math", "chat", "code", None]
    with basis.mixed(model, tasks):
        found = logits(model)
    for row, task in enumerate(tasks):
        assert close(found[row], logits(task_model(basis, adapters, task))[row]), task
    basis.select(model, "chat")
    assert close(logits(model.merge_and_unload()), logits(task_model(basis, adapters, "chat")))


# Refusals


def test_an_unknown_task_is_refused_and_the_model_stays_as_it_was(family: Adapters, joint: LoraBasis) -> None:
    model = fresh(family)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ParameterError, match='no task "poetry"'):
        joint.attach(model, "poetry")
    assert [name for name, _ in model.named_modules()] == names
    attached = joint.attach(model)
    with pytest.raises(ParameterError, match='no task "poetry"'):
        joint.select(attached, "poetry")
    with pytest.raises(ParameterError, match='no task "poetry"'), joint.mixed(attached, ["math", "poetry"]):
        pass


def test_a_model_that_is_not_the_base_is_refused_and_stays_as_it_was(
    family: Adapters, joint: LoraBasis, tmp_path: Path
) -> None:
    narrow = load_base(make_base(tmp_path / "a", replace(LLAMA, options={"hidden_size": 32})), LLAMA)
    shallow = load_base(make_base(tmp_path / "b", replace(LLAMA, options={"num_hidden_layers": 1})), LLAMA)
    other = load_base(make_base(tmp_path / "c", LLAMA, seed=5), LLAMA)
    for model, message in ((narrow, "attach it to that model"), (shallow, "lacks 4 of the 8"), (other, "not those of")):
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(MismatchError, match=message):
            joint.attach(model)
        assert [name for name, _ in model.named_modules()] == names


def test_a_basis_of_checkpoints_is_not_attached(family: Adapters) -> None:
    vectors = Vectors.open(family.base, {"a": family.base, "b": family.base})
    with pytest.raises(ParameterError, match="of full checkpoints, not of adapters; use Basis"):
        LoraBasis.build(vectors, 1)
    assert not {"attach", "select", "mixed", "adapter", "negate"} & set(dir(Basis.build(vectors, 1)))


def test_saved_modules_cannot_be_switched(tmp_path: Path) -> None:
    case = Case("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]})
    adapters = random_adapters(tmp_path, case, TASKS[:2])
    basis = LoraBasis.build(adapters.vectors(), method="tsv", rank=2)
    with pytest.raises(ParameterError, match=r"as a whole .*classifier.*use adapter\(task, base="):
        basis.attach(fresh(adapters))


def test_names_that_are_taken_and_bases_that_are_not_attached_are_refused(family: Adapters, joint: LoraBasis) -> None:
    with pytest.raises(ParameterError, match="not attached"):
        joint.select(fresh(family), "math")
    model = joint.attach(fresh(family))
    with pytest.raises(ParameterError, match='has an adapter "default" already'):
        joint.attach(model, adapter_name="default")
    model.delete_adapter("default")
    with pytest.raises(ParameterError, match="not attached"):
        joint.select(model, "math")


def test_without_peft_the_error_names_the_extra(
    family: Adapters, joint: LoraBasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[peft\]"):
        joint.attach(fresh(family))
