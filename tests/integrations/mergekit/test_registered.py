"""The methods of tvbases_hf in YAML: the same options, defaults and results as in Python, by either command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope
from torch import Tensor

from commands.command_line import refused, tvbases
from oracles.merge_oracle import (
    distance,
    merge_config,
    run_stock,
    write_config,
)
from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import dense
from tvbases_hf.bases import CONSTRUCTIONS
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.version import library_version
from tvbases_mergekit import register
from tvbases_mergekit.constructions import RENAMED
from tvbases_mergekit.methods import BasisMerge
from tvbases_mergekit.native import merge
from tvbases_mergekit.registered import RegisteredMerge
from tvbases_mergekit.registration import MERGEKITS
from tvbases_mergekit.schema import yaml_schema
from zoo.hf_models import Family, read_state

pytest_plugins = ["zoo.hf_fixtures"]
OWN = sorted(set(METHODS) - MERGEKITS)
EPS = torch.finfo(torch.float32).eps
OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"density": 0.3, "overlap": "shared"},
    "devec_unique": {"rank": 0.25, "threshold": 0.1},
    "tsv_compress": {"rank": 3},
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def ours(name: str) -> RegisteredMerge:
    found = registry.get(name)
    assert isinstance(found, RegisteredMerge)
    return found


def opened(family: Family) -> Vectors:
    return Vectors.open(family.base, family.tasks)


def native(config: dict[str, Any], out: Path) -> dict[str, Tensor]:
    merge(write_config(out.parent / f"{out.name}.yml", config), out)
    return read_state(out)


def in_python(vectors: Vectors, name: str, alpha: float, weights: list[float] | None = None) -> dict[str, Tensor]:
    change = merged(vectors, name, weights, alpha=alpha, **OPTIONS.get(name, {}))
    return {n: vectors.base.read(n).double() + dense(change(n)) for n in vectors.names}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert (found[name].double() - tensor).norm() <= 4 * EPS * tensor.norm(), name


# Declared once


def test_python_and_yaml_know_the_same_methods() -> None:
    known = {method.spec.name for method in registry.registered_methods()}
    assert set(METHODS) <= known
    assert {m.spec.name for m in registry.registered_methods() if isinstance(m, RegisteredMerge)} == set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_python_and_yaml_know_the_same_options_and_defaults(name: str) -> None:
    spec, declared = ours(name).spec, METHODS[name]
    parameters = {p.name: p for p in spec.parameters if p.name not in ("lambda", "weight")}
    assert {key: p.default for key, p in parameters.items()} == declared.defaults
    assert all(p.description == declared.options[key].help for key, p in parameters.items())
    assert all(p.scope == ParameterScope.SHARED for p in parameters.values())
    assert (spec.pretty_name, spec.reference_url) == (declared.title, declared.source)


def test_help_knows_the_same_methods_options_and_defaults() -> None:
    entries = re.split(r"\n {2}(?=\w)", tvbases("merge", "--help").out)
    shown = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    for name in OWN:
        options = METHODS[name].own_options.items()
        words = [METHODS[name].summary]
        words += [f"{key}: {o.help}, default: {'none' if o.default is None else o.default}" for key, o in options]
        assert all(text in shown[name] for text in words), shown[name]
        common = METHODS[name].options.keys() - METHODS[name].own_options.keys()
        assert all(f"{METHODS[name].options[key].help}, default:" in shown[key] for key in common)
    assert not MERGEKITS & shown.keys()
    squeezed = {key: entry.replace(" ", "") for key, entry in shown.items()}  # a line may end after a hyphen
    assert all(c.summary.replace(" ", "") in squeezed[c.yaml] for c in CONSTRUCTIONS.values())


def test_every_own_method_is_an_inner_method_of_the_bases() -> None:
    for method in registry.registered_methods():
        if isinstance(method, BasisMerge):
            for name in OWN:
                assert method.inner({"merge": name}) is registry.get(name)


def test_python_and_yaml_know_the_same_constructions_options_and_defaults() -> None:
    """But for the weights by task, which a YAML cannot hold in one parameter."""
    for construction in CONSTRUCTIONS.values():
        method = registry.get(construction.yaml)
        assert isinstance(method, BasisMerge)
        declared = {spec.name: spec.default for spec in method.spec.parameters}
        options = {o.name: o.default for o in construction.options.values() if o.name != "target_weights"}
        options["num_bases"] = construction.num_bases
        assert options == {name: declared[RENAMED.get(name, name)] for name in options}
        assert (method.spec.pretty_name, method.spec.reference_url) == (construction.title, construction.paper)


@pytest.mark.parametrize(
    ("name", "options"),
    [("pca_positive", {}), ("rand_select", {"seed": 3}), ("nmf", {"steps": 20}), ("dictionary", {})],
)
def test_other_bases_can_be_asked_for_in_yaml(
    name: str, options: dict[str, Any], llama: Family, tmp_path: Path
) -> None:
    config = merge_config(llama, CONSTRUCTIONS[name].yaml, num_bases=2, lambda_=0.6, **options)
    tasks = opened(llama)
    bases = tasks.mixed(CONSTRUCTIONS[name].solve(gram_matrix(tasks).matrix, 2, **options))
    expected = in_python(bases, "task_arithmetic", 0.6)
    assert_same(run_stock(config, tmp_path / "stock"), expected)
    assert_same(native(config, tmp_path / "native"), expected)


@pytest.mark.parametrize("consensus", ["mean", "sum"])
def test_ties_over_bases_takes_the_papers_sum(consensus: str, llama: Family, tmp_path: Path) -> None:
    """mergekit's ties keeps exactly density * size entries and adds up in float32; with all entries kept it is ours."""
    config = merge_config(llama, "ae_bases", num_bases=2, merge="ties", lambda_=0.6, density=1.0, consensus=consensus)
    tasks = opened(llama)
    bases = tasks.mixed(ae_bases(gram_matrix(tasks).matrix, 2))
    change = merged(bases, "ties", alpha=0.6, density=1.0, consensus=consensus)
    found = native(config, tmp_path / "native")
    assert_same(run_stock(config, tmp_path / "stock"), {name: tensor.double() for name, tensor in found.items()})
    for name in tasks.names:
        assert torch.allclose(found[name].double(), tasks.base.read(name).double() + dense(change(name)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "ties", "density": 0.5, "consensus": "max"}, "must be mean or sum"),
        ({"merge": "tsv", "consensus": "sum"}, "merge: tsv has none"),
        ({"merge": "ties", "density": 0.5, "consensus": "sum", "normalize": True}, "give one of the two"),
    ],
)
def test_a_consensus_that_cannot_be_is_refused(
    options: dict[str, Any], message: str, llama: Family, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match=message):
        native(merge_config(llama, "ae_bases", num_bases=2, **options), tmp_path / "refused")


def test_the_papers_recipe_takes_its_steps_and_its_annealing(llama: Family, tmp_path: Path) -> None:
    options: dict[str, Any] = {"solver": "adam", "balance": False, "steps": 30, "anneal": 0.5, "temperature": 2.0}
    config = merge_config(llama, "ae_bases", num_bases=2, lambda_=0.6, **options)
    tasks = opened(llama)
    bases = tasks.mixed(ae_bases(gram_matrix(tasks).matrix, 2, **options))
    assert_same(native(config, tmp_path / "native"), in_python(bases, "task_arithmetic", 0.6))


# The same by every way


@pytest.mark.parametrize("name", OWN)
def test_python_and_both_commands_give_the_same_merge(name: str, llama: Family, tmp_path: Path) -> None:
    weights = [1.0, -0.5, 2.0, 1.0]
    options = OPTIONS.get(name, {})
    config = merge_config(llama, name, lambda_=0.6, **options)
    for model, weight in zip(config["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    expected = in_python(opened(llama), name, 0.6, weights)
    assert_same(run_stock(config, tmp_path / "stock"), expected)
    assert_same(native(config, tmp_path / "native"), expected)


@pytest.mark.parametrize("over", ["bases", "reconstructions"])
@pytest.mark.parametrize("name", OWN)
def test_over_bases_too(name: str, over: str, llama: Family, tmp_path: Path) -> None:
    options = OPTIONS.get(name, {})
    config = merge_config(llama, "ae_bases", num_bases=2, merge=name, over=over, lambda_=0.6, **options)
    tasks = opened(llama)
    bases = tasks.mixed(ae_bases(gram_matrix(tasks).matrix, 2), over)
    expected = in_python(bases, name, 0.6)
    assert_same(run_stock(config, tmp_path / "stock"), expected)
    assert_same(native(config, tmp_path / "native"), expected)


def test_the_largest_entries_are_the_models_unless_they_are_to_be_each_tensors(llama: Family, tmp_path: Path) -> None:
    states = [
        run_stock(merge_config(llama, "top_k", density=0.1, scope=scope), tmp_path / scope)
        for scope in ("model", "tensor")
    ]
    assert distance(*states) > 1e-4
    base = read_state(llama.base)
    kept = [{n: float((state[n] != base[n]).float().mean()) for n in base} for state in states]
    assert max(kept[0].values()) > 2 * min(kept[0].values())  # where the large entries are


# The last bits of sums


def test_what_the_last_bits_of_a_sum_of_four_bfloat16_models_are(llama_bf16: Family, tmp_path: Path) -> None:
    """Python: the exact sum, rounded once. `tvbases merge`: of a float32 sum. mergekit: of sums in the YAML's dtype."""
    vectors = opened(llama_bf16)
    sums = {n: 0.3 * torch.stack([dense(d) for d in vectors.deltas(n)]).sum(0) for n in vectors.names}
    exact = {n: (vectors.base.read(n).double() + change).bfloat16() for n, change in sums.items()}
    python = {n: tensor.bfloat16() for n, tensor in in_python(vectors, "task_arithmetic", 0.3).items()}
    assert all(torch.equal(python[n], tensor) for n, tensor in exact.items())

    config = merge_config(llama_bf16, "task_arithmetic", dtype=None, lambda_=0.3, weight=1.0)
    wide = config | {"dtype": "float32", "out_dtype": "bfloat16"}
    found = {
        "tvbases": native(config, tmp_path / "native"),
        "mergekit, float32": run_stock(wide, tmp_path / "wide"),
        "mergekit": run_stock(config, tmp_path / "stock"),
    }
    size = sum(tensor.numel() for tensor in exact.values())
    off = {way: sum(int((state[n] != exact[n]).sum()) for n in exact) / size for way, state in found.items()}
    assert off["tvbases"] < 1e-3 and off["mergekit, float32"] < 1e-3 < off["mergekit"] < 0.1
    for name, tensor in exact.items():
        unit = tensor.double().abs() * torch.finfo(torch.bfloat16).eps
        assert ((found["tvbases"][name].double() - tensor.double()).abs() <= unit).all()


# Schema


def test_the_schema_holds_every_method_with_its_parameters() -> None:
    schema = yaml_schema()
    names = [method.spec.name for method in registry.registered_methods()]
    assert schema["properties"]["merge_method"]["enum"] == sorted(names)
    rules = {rule["if"]["properties"]["merge_method"]["const"]: rule["then"] for rule in schema["allOf"]}
    for method in registry.registered_methods():
        whole = rules[method.spec.name]["properties"]["parameters"]
        assert list(whole["properties"]) == [spec.name for spec in method.spec.parameters]
        assert whole["additionalProperties"] is False
    top_k = rules["top_k"]["properties"]["parameters"]["properties"]
    assert top_k["density"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert top_k["density"]["default"] == METHODS["top_k"].options["density"].default
    assert top_k["overlap"]["anyOf"][0]["enum"] == list(get_args(METHODS["top_k"].options["overlap"].kind))
    of_model = rules["top_k"]["properties"]["models"]["items"]["properties"]["parameters"]
    assert list(of_model["properties"]) == ["weight"]


def test_the_command_prints_the_schema_or_writes_it(tmp_path: Path) -> None:
    printed = tvbases("schema")
    assert printed.code == 0 and json.loads(printed.out) == json.loads(json.dumps(yaml_schema()))
    written = tvbases("schema", "--json", tmp_path / "schema.json")
    assert written.code == 0 and json.loads((tmp_path / "schema.json").read_text()) == {
        "tvbases_report": library_version(),
        **json.loads(printed.out),
    }


# Refusals


@pytest.mark.parametrize("command", ["merge", "mergekit-yaml"])
@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("top_k", {"density": 0}, "density is 0; give a number above 0 and at most 1"),
        ("top_k", {"overlap": "al"}, "must be all or shared (did you mean all?)"),
        ("magmax", {"density": 0.5}, "magmax has no parameter 'density'"),
        ("ae_bases", {"merge": "top_k", "density": 2}, "density is 2; give a number above 0 and at most 1"),
        ("ae_bases", {"steps": 0}, "steps of ae (with adam, how many) must be a whole number, at least 1"),
        ("pca_positive", {"temperature": 1.0}, "pca_positive has no parameter 'temperature'"),
        ("ae_bases", {"merge": "magmax", "scope": "model"}, "scope is not a parameter of merge: magmax"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(
    method: str, parameters: dict[str, Any], message: str, command: str, llama: Family, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "merge.yml", merge_config(llama, method, **parameters))
    assert message in refused(tmp_path, command, file, tmp_path / "out")
