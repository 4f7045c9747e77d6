"""``tvbases merge`` of adapters against mergekit's own merge of the same models in full."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from commands.command_line import tvbases
from oracles.merge_oracle import EPS, distance, run_stock
from tvbases_hf.bases import ae_bases
from tvbases_mergekit import register
from zoo.adapter_zoo import Zoo, config_of, make_zoo, merged_adapter, merged_checkpoint, relative, run_native, weighted
from zoo.hf_models import read_state

WEIGHTS = [0.7, -0.4, 1.1]  # negative ones forget
FILTERED = [
    [{"filter": "self_attn", "value": [0.2, 1.0, -0.5]}, {"filter": "down_proj", "value": 0.0}, {"value": 0.9}],
    [{"filter": "*", "value": [1.0, -1.0]}],
    0.3,
]
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "linear": ("linear", WEIGHTS, {}),
    "linear-sum": ("linear", WEIGHTS, {"normalize": False}),
    "linear-base": ("linear", WEIGHTS, {"weight": 0.5}),  # a base that is named is one of the models, and weighs .5
    "task_arithmetic": ("task_arithmetic", WEIGHTS, {"lambda_": 0.6}),
    "task_arithmetic-mean": ("task_arithmetic", WEIGHTS, {"normalize": True}),
    "task_arithmetic-gradients": ("task_arithmetic", FILTERED, {"lambda_": [0.5, 1.5]}),
    "ties": ("ties", WEIGHTS, {"density": 0.4}),
    "ties-sum": ("ties", FILTERED, {"density": [0.2, 0.9], "normalize": False, "lambda_": 1.7}),
    "dare_linear": ("dare_linear", WEIGHTS, {"density": 1.0}),
    "dare_ties": ("dare_ties", WEIGHTS, {"density": 1.0, "normalize": True}),
    "breadcrumbs": ("breadcrumbs", WEIGHTS, {"density": 0.6, "gamma": 0.05}),
    "tsv": ("tsv", WEIGHTS, {"lambda_": 0.8}),
    "tsv-sum": ("tsv", FILTERED, {"rank": 3, "orthogonalize": False}),
    "tsv_compress": ("tsv_compress", WEIGHTS, {"rank": 2}),
    "devec_unique": ("devec_unique", [-0.8, 0.0, 0.5], {"rank": "energy:1.0", "threshold": 0.3}),
    "devec_unique-pairs": ("devec_unique", WEIGHTS, {"rank": "energy:1.0", "pool": "pairs", "shared_weight": 0.5}),
    "ae_bases": ("ae_bases", None, {"num_bases": 2, "lambda_": 0.7}),
    "ae_bases-weights": ("ae_bases", WEIGHTS, {"num_bases": 2}),
    "ae_bases-free": ("ae_bases", None, {"num_bases": 2, "balance": False, "lambda_": [0.5, 1.0]}),
    "ae_bases-ties": ("ae_bases", None, {"num_bases": 2, "merge": "ties", "density": 0.3}),
    "ae_bases-tsv": ("ae_bases", None, {"num_bases": 2, "merge": "tsv", "rank": 2}),
    "pca_bases": ("pca_bases", None, {"num_bases": 2, "over": "reconstructions", "merge": "tsv_compress"}),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def configs(zoo: Zoo, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merge of the adapters, and of the same models in full."""
    method, weights, parameters = CASES[case]
    ours = config_of(zoo, method, weights, **parameters)
    whole = config_of(zoo, method, weights, models=zoo.full, **parameters) | {"dtype": "float32"}
    if method == "linear" and "weight" not in parameters:  # it needs no base, and would take one for another model
        models = {name: f"{zoo.base}+{path}" for name, path in zoo.adapters.items()}
        ours = config_of(zoo, method, weights, models=models, **parameters)
        del ours["base_model"], whole["base_model"]
    return ours, whole


@pytest.mark.parametrize("case", CASES)
def test_adapters_give_the_checkpoint_that_mergekit_makes_of_full_models(case: str, zoo: Zoo, tmp_path: Path) -> None:
    ours, whole = configs(zoo, case)
    found, expected = merged_checkpoint(ours, tmp_path / "ours"), run_stock(whole, tmp_path / "stock")
    assert distance(found, expected) < 1e-6
    assert distance(expected, zoo.origin) > 1e-3  # the merge moved the base by far more than that


@pytest.mark.parametrize(
    "case", ["linear", "task_arithmetic-gradients", "ties", "tsv", "devec_unique", "ae_bases-ties"]
)
def test_checkpoints_give_the_checkpoint_that_mergekit_makes(case: str, zoo: Zoo, tmp_path: Path) -> None:
    _, whole = configs(zoo, case)
    found, expected = merged_checkpoint(whole, tmp_path / "ours"), run_stock(whole, tmp_path / "stock")
    assert distance(found, expected) < 1e-6
    assert distance(expected, zoo.origin) > 1e-3


def test_adapters_and_checkpoints_mix(zoo: Zoo, tmp_path: Path) -> None:
    names = list(zoo.full)
    mixed = {name: zoo.full[name] if name == "code" else zoo.adapters[name] for name in names}
    found = merged_checkpoint(config_of(zoo, "ties", WEIGHTS, models=mixed, density=0.5), tmp_path / "mixed")
    whole = config_of(zoo, "ties", WEIGHTS, models=zoo.full, density=0.5)
    assert distance(found, run_stock(whole, tmp_path / "stock")) < 1e-6


LOW_RANK = [case for case in CASES if CASES[case][0] not in ("ties", "dare_linear", "dare_ties", "breadcrumbs")]


@pytest.mark.parametrize("case", [case for case in LOW_RANK if case not in ("linear-sum", "ae_bases-ties")])
def test_low_rank_methods_give_the_same_change_as_adapter_and_as_checkpoint(
    case: str, zoo: Zoo, tmp_path: Path
) -> None:
    ours, _ = configs(zoo, case)
    state = merged_checkpoint(ours, tmp_path / "checkpoint", "--dtype", "float32")
    written = {name: state[name].double() - tensor for name, tensor in zoo.origin.items()}
    # The checkpoint rounds base + change, of which the change is a small part.
    part = sum(float(t.square().sum()) for t in written.values()) ** 0.5
    whole = sum(float(t.square().sum()) for t in zoo.origin.values()) ** 0.5
    assert relative(merged_adapter(zoo, ours, tmp_path / "adapter"), written) < EPS * whole / part


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS])
def test_task_arithmetic_is_the_weighted_sum(weights: list[float], zoo: Zoo, tmp_path: Path) -> None:
    expected = weighted(zoo, weights)
    found = merged_adapter(zoo, config_of(zoo, "task_arithmetic", weights), tmp_path / "out")
    assert relative(found, expected) < 4 * EPS
    assert found.keys() == {name for name, tensor in expected.items() if tensor.any()}


def test_a_mean_of_models_needs_no_base_and_adds_no_more_than_their_share(zoo: Zoo, tmp_path: Path) -> None:
    ours, _ = configs(zoo, "linear")
    expected = weighted(zoo, [weight / sum(WEIGHTS) for weight in WEIGHTS])
    assert relative(merged_adapter(zoo, ours, tmp_path / "out"), expected) < 8 * EPS


def test_balanced_bases_add_up_to_the_task_vectors_whatever_their_number(zoo: Zoo, tmp_path: Path) -> None:
    for count in (1, 2):
        expected = weighted(zoo, [count / 3] * 3)
        found = merged_adapter(zoo, config_of(zoo, "ae_bases", num_bases=count), tmp_path / f"{count}")
        assert relative(found, expected) < 16 * EPS


def test_bases_of_adapters_are_chosen_from_their_inner_products(zoo: Zoo, tmp_path: Path) -> None:
    matrix = torch.cat([tau.reshape(3, -1) for tau in zoo.tau.values()], dim=1).T
    weights = ae_bases(matrix.T @ matrix, 2, balance=False).effective_weights
    expected = weighted(zoo, weights)
    found = merged_adapter(zoo, config_of(zoo, "ae_bases", num_bases=2, balance=False), tmp_path / "out")
    assert relative(found, expected) < 16 * EPS
    assert float((weights - 2 / 3).abs().max()) > 0.01  # not what balanced ones would give


@pytest.mark.parametrize(("method", "density"), [("dare_linear", 0.5), ("dare_ties", 0.3), ("della", 0.5)])
def test_random_methods_draw_what_mergekit_draws_from_the_same_seed(
    method: str, density: float, zoo: Zoo, tmp_path: Path
) -> None:
    register()
    parameters = {"weight": WEIGHTS, "density": [density] * 3}
    found = merged_checkpoint(config_of(zoo, method, WEIGHTS, density=density), tmp_path / "out", "--seed", "5")
    models = [read_state(path) for path in zoo.full.values()]
    for name, base in read_state(zoo.base).items():
        entries = [TensorEntry("base", base, is_base=True)]
        entries += [TensorEntry(index, model[name]) for index, model in enumerate(models)]
        torch.manual_seed(zlib.crc32(f"5 {name}".encode()))
        (expected,) = registry.get(method)((TensorGroup(tuple(entries)),), parameters=parameters)
        assert (found[name] - expected).abs().max() <= 4 * EPS * expected.abs().max()


def test_random_methods_repeat_themselves_and_follow_the_seed(zoo: Zoo, tmp_path: Path) -> None:
    config = config_of(zoo, "dare_linear", WEIGHTS, density=0.5)
    torch.manual_seed(1)
    first = merged_checkpoint(config, tmp_path / "a")
    after = torch.rand(1)
    again = merged_checkpoint(config, tmp_path / "b")
    other = merged_checkpoint(config, tmp_path / "c", "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert distance(other, first) > 1e-3
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the caller's own draws are left alone


@pytest.mark.parametrize(("named", "option", "expected"), [
    ({}, "auto", torch.float32),
    ({"dtype": "bfloat16"}, "auto", torch.bfloat16),
    ({"dtype": "float32", "out_dtype": "float16"}, "auto", torch.float16),
    ({"out_dtype": "bfloat16"}, "float32", torch.float32),
])  # fmt: skip
def test_the_checkpoint_is_stored_as_asked_and_rounded_once(
    named: dict[str, str], option: str, expected: torch.dtype, zoo: Zoo, tmp_path: Path
) -> None:
    found = merged_checkpoint(config_of(zoo, "task_arithmetic", WEIGHTS) | named, tmp_path / "out", "--dtype", option)
    sums = weighted(zoo, WEIGHTS)
    for name, tensor in found.items():
        exact = zoo.origin[name] + sums[name]
        assert tensor.dtype == expected
        # Half a unit in the last place, and the rounding of the float32 factors.
        bound = torch.finfo(expected).eps / 2 * exact.abs() + 4 * EPS * sums[name].abs().max() + 2**-24
        assert ((tensor.double() - exact).abs() <= bound).all()
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert (str(expected).removeprefix("torch.") in text) == (bool(named) or expected == torch.float32)


def test_parameters_are_resolved_as_mergekit_plans_them(zoo: Zoo) -> None:
    """Filters, gradients, defaults and precedence, for every tensor and model."""
    from mergekit.config import MergeConfiguration

    from tvbases_mergekit.configuration import find_method
    from tvbases_mergekit.inputs import open_inputs
    from tvbases_mergekit.native import resolve
    from tvbases_mergekit.preflight import _bound, _plan

    register()
    settings: list[Any] = [0.5, [0.0, 1.0], [1.0, 2.0, -1.0, 0.5], [{"filter": "mlp", "value": [0, 1]}, {"value": 3}]]
    for method, weight, density in itertools.product(["ties", "linear"], settings, settings):
        config = config_of(zoo, method, [weight, settings[1], None], models=zoo.full)
        config["models"][2].pop("parameters")
        config["parameters"] = {"weight": settings[3], **({"density": density} if method == "ties" else {})}
        parsed, rule = MergeConfiguration.model_validate(config), find_method(method)
        from mergekit.options import MergeOptions

        planned = {task.output_weight.name: _bound(task) for task in _plan(parsed, MergeOptions())}
        inputs = open_inputs(parsed, Path("nowhere"))
        assert resolve(parsed, rule, inputs, inputs.floating) == planned


def test_the_report_counts_what_an_adapter_leaves_unchanged(zoo: Zoo, tmp_path: Path) -> None:
    outcome = run_native(
        config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "out", "--json", str(tmp_path / "r.json")
    )
    report = (tmp_path / "r.json").read_text(encoding="utf-8")
    lacking = 9  # code has no MLP: 3 modules in each of 3 layers
    assert f'"{zoo.adapters["code"]}": {lacking} tensors' in outcome.err and "counted as unchanged" in outcome.err
    assert f'"{zoo.adapters["code"]}": {lacking}' in report


EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "configs" / "adapters").glob("*.yml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_for_adapters_merges(
    example: Path, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo.base.parent)
    assert tvbases("merge", example, tmp_path / "out", "--adapter", "--quiet").code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_there_are_examples_for_adapters() -> None:
    assert EXAMPLES
