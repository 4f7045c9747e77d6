"""Where the Gram matrix comes from: memory or files, one pass per merge, never that of another merge."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import merge_state_dicts, merge_tensors, registry
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from torch import Tensor

import tvbases_mergekit
from commands.command_line import tvbases
from oracles.merge_oracle import (
    added,
    assert_within,
    balanced_reconstruction,
    family_vectors,
    merge_config,
    run_ours,
    run_stock,
    write_config,
)
from tvbases_hf.bases import CONSTRUCTIONS, ae_bases
from tvbases_hf.bases.registry import Construction
from tvbases_hf.errors import MissingExtraError, ParameterError
from tvbases_mergekit import methods, sources
from zoo.hf_models import Family, State, fine_tunes, make_family, read_state, save_state

pytest_plugins = ["zoo.hf_fixtures"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No Gram matrix and no open file from another test."""
    tvbases_mergekit.register()
    sources._CACHE.clear()
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


# In memory


@pytest.mark.parametrize("form", ["mapping", "sequence"])
def test_state_dicts_in_memory_merge_like_the_files_they_come_from(form: str, llama: Family, tmp_path: Path) -> None:
    states: dict[Any, State] = {
        path.name: read_state(path) for path in (*llama.tuned()[:2], llama.base, *llama.tuned()[2:])
    }
    parameters = {"num_bases": 2, "balance": False, "lambda": 0.6}
    if form == "mapping":
        found = merge_state_dicts(states, "ae_bases", base="base", parameters=parameters)
    else:
        found = merge_state_dicts(list(states.values()), "ae_bases", base=2, parameters=parameters)
    from_files = run_stock(merge_config(llama, num_bases=2, balance=False, lambda_=0.6), tmp_path / "out")
    vectors = family_vectors(llama)
    encoder = ae_bases(vectors.gram, 2, balance=False).encoder
    bound = vectors.rounding(encoder, 0.6)
    assert_within(found, added(vectors, encoder, 0.6), bound)
    assert_within(found, from_files, bound)


def test_weights_by_id_add_reconstructions_in_memory(llama: Family) -> None:
    states: dict[Any, State] = {"base": read_state(llama.base)}
    states |= {task: read_state(path) for task, path in llama.tasks.items()}
    weights = {"math": -1.0, "law": 0.5, "code": 0.0, "chat": 1.0}  # by name, in another order
    found = merge_state_dicts(states, "ae_bases", base="base", parameters={"num_bases": 3, "weight": weights})
    vectors = family_vectors(llama)
    mixing = balanced_reconstruction(vectors, 3) * torch.tensor([weights[task] for task in llama.tasks]).double()
    assert_within(found, added(vectors, mixing), vectors.rounding(mixing))


def test_modules_merge_and_their_gradients_reach_the_inputs() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 3)
    tuned = [torch.nn.Linear(5, 3) for _ in range(4)]
    found = merge_state_dicts([base, *tuned], "ae_bases", base=0, parameters={"num_bases": 2})
    mean = torch.stack([module.weight.double() for module in tuned]).mean(dim=0)
    expected = base.weight.double() + 2 * (mean - base.weight.double())
    assert (found["weight"].double() - expected).abs().max() < 32 * 2**-23 * expected.abs().max()
    found["weight"].sum().backward()
    for module in tuned:
        assert module.weight.grad is not None and bool((module.weight.grad - 0.5).abs().max() < 1e-6)


def test_one_tensor_merges_alone(llama: Family) -> None:
    """Its own Gram matrix, not that of a model it may have come from."""
    vectors = family_vectors(llama)
    name = "lm_head.weight"
    tensors = [vectors.base[name], *(vectors.base[name] + vectors.tau[name])]
    found = merge_tensors(tensors, "ae_bases", base_index=0, parameters={"num_bases": 2, "balance": False})
    flat = vectors.tau[name].reshape(4, -1)
    encoder = ae_bases(flat @ flat.T, 2, balance=False).encoder
    expected = vectors.base[name] + torch.tensordot(encoder.sum(dim=1), vectors.tau[name], dims=1)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-12
    whole = ae_bases(vectors.gram, 2, balance=False).encoder
    assert (encoder.sum(dim=1) - whole.sum(dim=1)).abs().max() > 1e-3


def test_a_bad_parameter_in_memory_is_our_error_and_not_a_wrong_merge() -> None:
    tensors = [torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)]
    for parameters in (
        {"num_bases": 3},
        {"over": "both"},
        {"merge": "linear"},
        {"merge": "model_stock", "density": 0.5},
    ):
        with pytest.raises(ParameterError):
            merge_tensors(tensors, "ae_bases", base_index=0, parameters=parameters)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_default_device_of_the_thread_changes_nothing(where: str, llama: Family) -> None:
    """--multi-gpu makes a GPU the default device of its threads; here a device that holds no numbers stands for it."""
    vectors = family_vectors(llama)
    groups = file_groups(llama) if where == "files" else memory_groups(llama)
    method = registry.get("ae_bases")
    parameters = {"num_bases": 2, "merge": "ties", "density": 0.5}
    expected = method(groups, parameters=parameters)
    sources._CACHE.clear()
    with torch.device("meta"):
        found = method(groups, parameters=parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(found) == len(vectors.base)


# From files


def memory_groups(family: Family) -> list[TensorGroup]:
    states = [read_state(path) for path in (family.base, *family.tuned())]
    return [TensorGroup.from_tensors([s[name] for s in states], base_index=0, name=name) for name in states[0]]


def file_groups(family: Family) -> list[TensorGroup]:
    """What mergekit hands to a method for every tensor of a merge of directories."""
    paths = [family.base, *family.tuned()]
    references = [ModelReference.parse(str(path)) for path in paths]
    states = [read_state(path) for path in paths]
    return [
        TensorGroup(
            tuple(TensorEntry(ref, s[name], ref == references[0]) for ref, s in zip(references, states, strict=True)),
            TensorMetadata(name=name),
        )
        for name in states[0]
    ]


class Counted:
    """A function that counts its calls, and takes its time so that other threads come along meanwhile."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        time.sleep(0.05)
        return self.function(*args, **kwargs)


def test_threads_that_start_together_share_one_gram_matrix_and_one_encoder(
    llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram, solver = Counted(sources.gram_matrix), Counted(CONSTRUCTIONS["ae"].solve)
    monkeypatch.setattr(sources, "gram_matrix", gram)
    monkeypatch.setattr(Construction, "solve", lambda self, *given, **options: solver(*given, **options))
    method, groups = registry.get("ae_bases"), file_groups(llama)
    start = threading.Barrier(len(groups))

    def merge(group: TensorGroup) -> Tensor:
        start.wait()
        return method((group,), parameters={"num_bases": 2, "balance": False, "seed": 3})[0]

    with ThreadPoolExecutor(len(groups)) as pool:
        results = list(pool.map(merge, groups))
    assert (gram.calls, solver.calls) == (1, 1)
    vectors = family_vectors(llama)
    encoder = ae_bases(vectors.gram, 2, balance=False, seed=3).encoder
    found = {str(group.metadata.name): tensor for group, tensor in zip(groups, results, strict=True)}
    assert_within(found, added(vectors, encoder), vectors.rounding(encoder))


def test_other_options_solve_again_on_the_same_gram_matrix(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    gram, solver = Counted(sources.gram_matrix), Counted(CONSTRUCTIONS["ae"].solve)
    monkeypatch.setattr(sources, "gram_matrix", gram)
    monkeypatch.setattr(Construction, "solve", lambda self, *given, **options: solver(*given, **options))
    (group, *_) = file_groups(llama)
    method = registry.get("ae_bases")
    for num_bases in (1, 2, 2, 3):
        method((group,), parameters={"num_bases": num_bases})
    assert (gram.calls, solver.calls) == (1, 3)


def test_two_merges_in_one_process_use_their_own_gram_matrices(llama: Family, llama_base: Path, tmp_path: Path) -> None:
    other = make_family(tmp_path / "other", llama_base, ["math", "code", "chat", "law"], seed=77)
    fewer = Family(llama.base, dict(list(llama.tasks.items())[1:]))
    turned = Family(llama.base, dict(reversed(llama.tasks.items())))
    for index, family in enumerate([llama, other, fewer, turned, llama]):
        vectors = family_vectors(family)
        merged = run_ours(merge_config(family, num_bases=2, balance=False), tmp_path / f"out{index}")
        encoder = ae_bases(vectors.gram, 2, balance=False).encoder
        assert_within(merged, added(vectors, encoder), vectors.rounding(encoder))


def test_a_direct_call_uses_its_own_models_whatever_was_merged_before(llama: Family, tmp_path: Path) -> None:
    run_ours(merge_config(llama, num_bases=2), tmp_path / "planned")
    fewer = Family(llama.base, dict(list(llama.tasks.items())[:3]))
    vectors = family_vectors(fewer)
    method, parameters = registry.get("ae_bases"), {"num_bases": 2, "balance": False}
    encoder = ae_bases(vectors.gram, 2, balance=False).encoder
    for groups in (file_groups(fewer), memory_groups(fewer), file_groups(fewer)):
        merged = dict(zip(vectors.base, method(groups, parameters=parameters), strict=True))
        assert_within(merged, added(vectors, encoder), vectors.rounding(encoder))


def test_a_model_that_changed_on_disk_is_read_again(llama_base: Path, tmp_path: Path) -> None:
    family = make_family(tmp_path / "m", llama_base, ["math", "code", "chat"], seed=8)
    config = merge_config(family, num_bases=2, balance=False)
    before = family_vectors(family)
    run_ours(config, tmp_path / "before")
    state = fine_tunes(read_state(family.base), 1, seed=1000, size=0.03)[0]
    save_state(family.tasks["code"], state, family.base)
    LoaderCache.loaders.clear()  # mergekit itself keeps files open for as long as the process lives
    after = family_vectors(family)
    merged = run_ours(config, tmp_path / "after")
    encoder = ae_bases(after.gram, 2, balance=False).encoder
    assert_within(merged, added(after, encoder), after.rounding(encoder))
    stale = ae_bases(before.gram, 2, balance=False).encoder
    assert (stale.sum(dim=1) - encoder.sum(dim=1)).abs().max() > 1e-3


# Registration


def test_registering_again_changes_nothing() -> None:
    before = registry.registered_methods()
    names = [method.spec.name for method in before]
    assert {"ae_bases", "pca_bases", "task_arithmetic"} <= set(names) and len(set(names)) == len(names)
    tvbases_mergekit.register()
    assert registry.registered_methods() == before


def test_every_parameter_of_an_inner_method_is_declared() -> None:
    """mergekit would drop an undeclared one without a word."""
    declared = {spec.name for spec in registry.get("ae_bases").spec.parameters}
    for method in registry.registered_methods():
        if methods._takes_base(method) and not isinstance(method, methods.BasisMerge):
            assert {spec.name for spec in method.spec.parameters} <= declared, method.spec.name


@pytest.mark.parametrize("state", ["absent", "old"])
def test_another_mergekit_is_an_error_that_names_the_extra(
    state: str, tmp_path: Path, llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "absent":
        monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    else:  # 0.1.4 has the module, and another class in it
        monkeypatch.delattr("mergekit.merge_methods.base.GroupMergeMethod")
    with pytest.raises(MissingExtraError, match=r'pip install "tvbases-hf\[mergekit\]"'):
        tvbases_mergekit.register()
    file = write_config(tmp_path / "merge.yml", merge_config(llama))
    outcome = tvbases("mergekit-yaml", file, tmp_path / "out")
    assert outcome.code == 2 and outcome.err.startswith("error: mergekit 0.1.5 or later is needed")
    assert len(outcome.err.splitlines()) == 1
