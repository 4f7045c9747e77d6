"""A basis of adapters: a stock LoRA of the merged tasks, and every single task, within a byte budget."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from commands.command_line import refused, tvbases
from oracles.matrices import gaussian
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import LoraBasis
from tvbases_hf.basis.adapters.verdict import verdict
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.adapter_families import (
    LLAMA,
    TASKS,
    Adapters,
    dense_changes,
    mean_square,
    measured_errors,
    random_adapter,
    random_adapters,
    related_adapters,
    stored_bytes,
    truncated_errors,
    write_lora,
)
from zoo.fake_hub import FakeHub, file_bytes
from zoo.peft_models import IDS, Case, load_adapter, load_base, make_base, outputs

EPS = torch.finfo(torch.float32).eps
# Products of factors that are rounded to float32, through two layers: a few dozen roundings.
SAME = 100 * EPS
DORA = replace(LLAMA, config={**LLAMA.config, "use_dora": True})
REQUESTS = {
    "joint": dict(method="joint", budget=0.6),
    "tsv": dict(method="tsv", budget=0.5),
    "tsv_rank": dict(method="tsv", rank=2),
    "ae": dict(method="ae", num_bases=2),
    "ae_budget": dict(method="ae", num_bases=2, budget=0.4),
    "ae_rank": dict(method="ae", num_bases=3, rank=2),
    "rand_select": dict(method="rand_select", num_bases=2),
    "cluster": dict(method="cluster"),
    "cluster_budget": dict(method="cluster", budget=0.5),
    "pca_positive": dict(method="pca_positive", num_bases=2),
    "nmf": dict(method="nmf", num_bases=2),
    "dictionary": dict(method="dictionary", num_bases=2),
    "best": dict(budget=0.6),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return related_adapters(tmp_path_factory.mktemp("related"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return related_adapters(tmp_path_factory.mktemp("unrelated"), near=100.0)


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("dora"), DORA, TASKS[:3])


def build(family: Adapters, request: dict[str, Any], **options: object) -> LoraBasis:
    return LoraBasis.build(family.vectors(), **request, **options)  # type: ignore[arg-type]


def saved(basis: LoraBasis, directory: Path) -> LoraBasis:
    basis.save_pretrained(directory)
    return LoraBasis.from_pretrained(directory)


def merged(family: Adapters, changes: dict[str, Tensor]) -> Tensor:
    """Logits of the base plus these changes, float64: the dense oracle."""
    model = load_base(family.base, family.case).double()
    state = model.state_dict()
    for name, change in changes.items():
        state[name] += change.reshape(state[name].shape)
    return outputs(model)


def close(found: Tensor, expected: Tensor, tolerance: float = SAME) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# What the directory is to PEFT alone


LOADER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tvbases"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, basis, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), basis).double().eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor(ids)).logits.tolist()))
assert not [name for name in sys.modules if name.startswith("tvbases_hf")]
"""


def stock_logits(base: Path, basis: Path, ids: Tensor) -> Tensor:
    """What PEFT alone computes, in a process where no import of this package succeeds."""
    arguments = [str(base), str(basis), json.dumps(ids.tolist())]
    done = subprocess.run([sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]), dtype=torch.float64)


def test_peft_loads_the_directory_where_this_package_cannot_be_imported(family: Adapters, tmp_path: Path) -> None:
    basis = build(family, dict(method="joint", budget=0.6, alpha=0.5))
    basis.save_pretrained(tmp_path / "basis")
    found = stock_logits(family.base, tmp_path / "basis", IDS)
    changes = {name: 0.5 * torch.stack([dense(part) for part in basis.deltas(name)]).sum(0) for name in basis.names}
    assert close(found, merged(family, changes))
    assert not close(found, merged(family, {}), 100 * SAME)


@pytest.mark.parametrize("alpha", [1.0, -0.25])
@pytest.mark.parametrize("how", sorted(REQUESTS))
def test_the_stock_adapter_is_the_base_plus_alpha_times_the_sum_of_the_bases(
    how: str, alpha: float, family: Adapters, tmp_path: Path
) -> None:
    basis = saved(build(family, REQUESTS[how], alpha=alpha), tmp_path / "basis")
    changes = {name: alpha * torch.stack([dense(part) for part in basis.deltas(name)]).sum(0) for name in basis.names}
    assert close(outputs(load_adapter(family.base, family.case, tmp_path / "basis")), merged(family, changes))


@pytest.mark.parametrize("request_", [dict(method="ae", num_bases=2), dict(method="tsv", rank=3)], ids=["ae", "tsv"])
def test_without_truncation_the_stock_adapter_is_task_arithmetic_over_all_tasks(
    request_: dict[str, Any], family: Adapters, tmp_path: Path
) -> None:
    """Balanced bases weigh every task M / T; truncated task vectors weigh it once. Rank 16 cuts nothing off."""
    full = {**request_, "rank": 16}
    saved(build(family, full), tmp_path / "basis")
    weight = 2 / 4 if full["method"] == "ae" else 1.0
    vectors = family.vectors()
    changes = {name: weight * torch.stack(dense_changes(vectors, name)).sum(0) for name in vectors.names}
    assert close(outputs(load_adapter(family.base, family.case, tmp_path / "basis")), merged(family, changes))


def sum_of_doras(basis: LoraBasis, dora: Adapters) -> dict[str, Tensor]:
    """alpha * sum of diag(d) W + L R, float64."""
    vectors, base, changes = dora.vectors(), Checkpoint.open(dora.base), {}
    assert basis.info.adapters is not None
    for name in basis.names:
        low = torch.stack([dense(part) for part in basis.deltas(name)]).sum(0)
        scales = [delta.row_scale.double() for delta in vectors.deltas(name)]  # type: ignore[union-attr]
        shares = torch.tensor(basis.info.effective_weights, dtype=torch.float64)
        scale = (shares[:, None] * torch.stack(scales)).sum(0)
        changes[name] = basis.info.adapters.alpha * (low + scale[:, None] * base.read(name).double())
    return changes


@pytest.mark.parametrize("request_", [REQUESTS["joint"], REQUESTS["ae"]], ids=["joint", "ae"])
def test_a_merged_dora_is_exact_in_peft(request_: dict[str, Any], dora: Adapters, tmp_path: Path) -> None:
    """W + alpha (sum of diag(d) W + L R), as DoRA with magnitudes of its own."""
    basis = saved(build(dora, {**request_, "alpha": 0.5}), tmp_path / "basis")
    found = outputs(load_adapter(dora.base, dora.case, tmp_path / "basis"))
    assert close(found, merged(dora, sum_of_doras(basis, dora)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.5, None], ids=["usual", "rows that vanish"])
def test_the_error_of_the_stock_dora_is_measured_and_printed(
    alpha: float | None, dtype: str, dora: Adapters, tmp_path: Path
) -> None:
    """None: the alpha at which a row of the base is scaled to zero, which DoRA cannot do."""
    if alpha is None:
        scales: list = [delta.row_scale for delta in dora.vectors().deltas(dora.vectors().names[0])]
        alpha = -1 / float(torch.stack(scales).sum(0)[0].double())
    options: list[object] = ["--budget", 0.6, "--method", "tsv", "--alpha", alpha, "--dtype", dtype]
    options += ["--out", tmp_path / "basis"]
    printed = tvbases("compress", *dora.options(), *options)
    assert printed.code == 0, printed.err
    basis = LoraBasis.from_pretrained(tmp_path / "basis")
    assert basis.info.adapters is not None
    expected = sum_of_doras(basis, dora)
    stock = Adapter.open(tmp_path / "basis", Checkpoint.open(dora.base))
    lost = sum(float((dense(stock.delta(n)) - t).square().sum()) for n, t in expected.items())  # type: ignore[arg-type]
    error = (lost / sum(float(t.square().sum()) for t in expected.values())) ** 0.5
    assert 0 < error < 1e-6
    assert basis.info.adapters.stock_error == pytest.approx(error, rel=0.2)  # roundings of roundings
    said = f"as DoRA (relative error {basis.info.adapters.stock_error:.1e})"
    assert said in " ".join(printed.out.split())
    assert said in (tmp_path / "basis" / "README.md").read_text(encoding="utf-8")


def test_a_stock_lora_holds_the_very_same_numbers(family: Adapters) -> None:
    info = build(family, REQUESTS["joint"]).info
    assert info.adapters is not None and info.adapters.stock_error == 0.0
    assert not any("as DoRA" in line for line in verdict(info))


# The single tasks


@pytest.mark.parametrize("how", sorted(REQUESTS))
def test_the_reported_errors_are_those_of_the_dense_reconstructions(how: str, family: Adapters, tmp_path: Path) -> None:
    basis = saved(build(family, REQUESTS[how]), tmp_path / "basis")
    assert basis.info.task_error == pytest.approx(measured_errors(basis, family.vectors()), rel=1e-5, abs=SAME)
    assert basis.info.adapters is not None
    assert basis.info.adapters.error_before_rounding == pytest.approx(basis.info.task_error, rel=1e-3, abs=SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["joint", "ae", "tsv"])
def test_errors_in_half_precision_are_those_of_the_rounded_numbers(
    how: str, dtype: torch.dtype, family: Adapters, tmp_path: Path
) -> None:
    basis = saved(build(family, REQUESTS[how], dtype=dtype), tmp_path / "basis")
    assert {info.dtype for info in basis.tensors.values()} == {dtype}
    assert basis.info.task_error == pytest.approx(measured_errors(basis, family.vectors()), rel=1e-5)
    assert basis.info.adapters is not None
    exact = mean_square(basis.info.adapters.error_before_rounding)
    # Roundings are independent of what was cut off: their squares add. Differences of sums cost a few of them.
    assert mean_square(basis.info.task_error) <= exact + (20 * torch.finfo(dtype).eps) ** 2


@pytest.mark.parametrize(
    "request_", [dict(method="tsv", rank=16), dict(method="ae", num_bases=4, rank=16), dict(budget=1.0)]
)
def test_every_task_comes_back_exactly_where_nothing_is_cut_off(
    request_: dict[str, Any], family: Adapters, tmp_path: Path
) -> None:
    basis = saved(build(family, request_), tmp_path / "basis")
    assert max(measured_errors(basis, family.vectors())) <= SAME


@pytest.mark.parametrize(
    "request_", [dict(method="tsv", rank=16), dict(method="ae", num_bases=3, rank=16)], ids=["tsv", "ae"]
)
def test_every_dora_comes_back_exactly_where_nothing_is_cut_off(
    request_: dict[str, Any], dora: Adapters, tmp_path: Path
) -> None:
    basis = saved(build(dora, request_), tmp_path / "basis")
    assert max(measured_errors(basis, dora.vectors(), dora.base)) <= SAME
    basis.adapter("code", base=dora.base).save_pretrained(tmp_path / "code")
    expected = outputs(load_adapter(dora.base, dora.case, dora.tasks["code"]))
    assert close(outputs(load_adapter(dora.base, dora.case, tmp_path / "code")), expected)


def test_the_row_scales_of_a_dora_are_exact_whatever_is_cut_off(dora: Adapters, tmp_path: Path) -> None:
    basis = saved(build(dora, dict(method="joint", budget=0.5)), tmp_path / "basis")
    errors = measured_errors(basis, dora.vectors(), dora.base)
    assert basis.info.task_error == pytest.approx(errors, rel=1e-5)
    assert min(errors) > 100 * SAME
    vectors, base = dora.vectors(), Checkpoint.open(dora.base)
    name = basis.names[0]
    found = basis.reconstruct("math", base=dora.base)[name].double()
    low = dense(basis.deltas(name)[0])
    delta = vectors.deltas(name)[0]
    expected = delta.row_scale.double()[:, None] * base.read(name).double() + low  # type: ignore[union-attr]
    assert close(found, expected)


def test_a_task_is_written_as_a_lora_of_its_own(family: Adapters, tmp_path: Path) -> None:
    for how in ("joint", "ae"):
        basis = saved(build(family, REQUESTS[how]), tmp_path / how)
        for task in ("math", "law"):
            basis.adapter(task).save_pretrained(tmp_path / "one")
            changes = {name: change.double() for name, change in basis.reconstruct(task).items()}
            found = outputs(load_adapter(family.base, family.case, tmp_path / "one"))
            assert close(found, merged(family, changes))


def test_a_task_is_negated(family: Adapters, tmp_path: Path) -> None:
    basis = saved(build(family, REQUESTS["joint"]), tmp_path / "basis")
    basis.negate("code", 0.5).save_pretrained(tmp_path / "clean")
    changes = {name: -0.5 * change.double() for name, change in basis.reconstruct("code").items()}
    assert close(outputs(load_adapter(family.base, family.case, tmp_path / "clean")), merged(family, changes))


def test_a_task_is_restored_as_a_checkpoint(family: Adapters, tmp_path: Path) -> None:
    basis = saved(build(family, REQUESTS["joint"]), tmp_path / "basis")
    basis.restore("chat", family.base, tmp_path / "chat")
    changes = {name: change.double() for name, change in basis.reconstruct("chat").items()}
    restored = load_base(tmp_path / "chat", family.case)
    assert close(outputs(restored), merged(family, changes))


def test_the_stand_alone_lora_has_the_rank_of_the_reconstruction(family: Adapters) -> None:
    basis = build(family, dict(method="tsv", rank=2))
    ranks = {tensor.shape[0] for name, tensor in basis.adapter("math").tensors.items() if "lora_A" in name}
    assert ranks == {2}


# The decoder and the errors


def test_the_decoder_is_the_least_squares_optimum_for_the_stored_vectors(family: Adapters, tmp_path: Path) -> None:
    basis = saved(build(family, REQUESTS["ae_rank"], dtype=torch.bfloat16), tmp_path / "basis")
    vectors = family.vectors()
    stored = torch.cat([torch.stack([dense(p).reshape(-1) for p in basis.deltas(n)]) for n in basis.names], dim=1)
    tasks = torch.cat([torch.stack([c.reshape(-1) for c in dense_changes(vectors, n)]) for n in basis.names], dim=1)
    optimum = torch.linalg.lstsq(stored.T, tasks.T).solution
    assert (basis.decoder - optimum).abs().max() <= 1e-9 * optimum.abs().max()


def test_balanced_bases_weigh_every_task_alike(family: Adapters) -> None:
    assert build(family, dict(method="ae", num_bases=2)).info.effective_weights == pytest.approx([0.5] * 4)


# The budget


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("kin", ["family", "strangers"])
@pytest.mark.parametrize("method", [None, "joint"])
def test_the_budget_is_kept_and_never_loses_to_truncation_at_the_same_bytes(
    method: str | None, kin: str, budget: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    adapters: Adapters = request.getfixturevalue(kin)
    basis = saved(build(adapters, dict(method=method, budget=budget)), tmp_path / "basis")
    originals = sum(stored_bytes(path) for path in adapters.tasks.values())
    used = stored_bytes(tmp_path / "basis")
    assert used <= budget * originals
    assert used == sum(info.nbytes for info in basis.tensors.values())
    trivial = truncated_errors(adapters.vectors(), budget * originals / 4)
    assert mean_square(basis.info.task_error) <= mean_square(trivial) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_budget_is_counted_in_the_adapters_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = related_adapters(tmp_path, dtype=dtype)
    build(adapters, dict(budget=0.5)).save_pretrained(tmp_path / "basis")
    originals = sum(stored_bytes(path) for path in adapters.tasks.values())
    assert 0.45 * originals <= stored_bytes(tmp_path / "basis") <= 0.5 * originals
    assert {tensor.dtype for tensor in load_file(tmp_path / "basis" / "adapter_model.safetensors").values()} == {dtype}


def test_the_budget_of_doras_includes_their_scales_and_magnitudes(dora: Adapters, tmp_path: Path) -> None:
    build(dora, dict(budget=0.6)).save_pretrained(tmp_path / "basis")
    originals = sum(stored_bytes(path) for path in dora.tasks.values())
    assert stored_bytes(tmp_path / "basis") <= 0.6 * originals


def test_the_alternative_that_is_reported_is_truncation_at_the_same_bytes(family: Adapters, tmp_path: Path) -> None:
    basis = build(family, dict(method="ae", num_bases=2))
    basis.save_pretrained(tmp_path / "basis")
    trivial = truncated_errors(family.vectors(), stored_bytes(tmp_path / "basis") / 4)
    assert basis.info.adapters is not None
    found = basis.info.adapters.truncation_error
    assert mean_square(found) <= mean_square(trivial) * (1 + 1e-6)  # ours also fills what is left of the bytes
    assert mean_square(found) == pytest.approx(mean_square(trivial), rel=0.05)


def test_adapters_near_one_right_factor_share_it_and_strangers_are_truncated(
    family: Adapters, strangers: Adapters
) -> None:
    near, far = build(family, dict(budget=0.6)), build(strangers, dict(budget=0.6))
    assert near.info.method == "joint" and far.info.method == "tsv"
    assert near.info.adapters is not None and far.info.adapters is not None
    assert mean_square(near.info.task_error) < 0.7 * mean_square(near.info.adapters.truncation_error)
    assert any(spec.shared == "right" for spec in near.info.adapters.modules.values())
    assert "No method beats truncating each adapter alone" in verdict(far.info)[0]
    assert far.info.task_error == far.info.adapters.truncation_error


def test_near_duplicates_are_left_to_common_bases(tmp_path: Path) -> None:
    """Four tasks that are two, up to a little noise: neither side is common to all, but two bases are enough."""
    base = related_adapters(tmp_path / "like").base
    modules = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(2)}
    paths = {}
    for index, task in enumerate(TASKS):
        twin = index // 2
        factors = {
            module: (
                (gaussian(twin + 10 * i, rows, 4) + 0.01 * gaussian(50 + index, rows, 4)).float(),
                (gaussian(twin + 20 + 10 * i, 4, columns) + 0.01 * gaussian(70 + index, 4, columns)).float(),
            )
            for i, (module, (rows, columns)) in enumerate(modules.items())
        }
        paths[task] = write_lora(tmp_path / task, factors)
    basis = build(Adapters(LLAMA, base, paths), dict(budget=0.5))
    assert basis.info.method == "ae" and basis.info.num_bases == 2
    assert max(basis.info.task_error) < 0.05
    assert basis.info.adapters is not None
    assert min(basis.info.adapters.truncation_error) > 0.2


# Files


@pytest.mark.parametrize("how", ["joint", "ae_budget", "tsv"])
def test_saving_what_was_loaded_gives_the_same_bytes(how: str, family: Adapters, tmp_path: Path) -> None:
    saved(build(family, REQUESTS[how]), tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / d).iterdir()} for d in ("first", "second"))
    assert first == second
    assert {"adapter_config.json", "adapter_model.safetensors", "basis_config.json", "README.md"} <= set(first)


def test_a_loaded_basis_is_the_one_that_was_built(dora: Adapters, tmp_path: Path) -> None:
    built = build(dora, dict(method="joint", budget=0.6, alpha=0.5))
    loaded = saved(built, tmp_path / "basis")
    assert loaded.info == built.info and loaded.names == built.names
    for name in built.names:
        for a, b in zip(built.deltas(name), loaded.deltas(name), strict=True):
            assert close(dense(b), dense(a), 4 * EPS)


def test_no_number_is_in_both_files(family: Adapters, tmp_path: Path) -> None:
    build(family, REQUESTS["joint"]).save_pretrained(tmp_path / "basis")
    stock = load_file(tmp_path / "basis" / "adapter_model.safetensors")
    beside = load_file(tmp_path / "basis" / "basis.safetensors")
    seen = torch.cat([tensor.flatten() for tensor in stock.values()])
    others = torch.cat([tensor.flatten() for tensor in beside.values()])
    assert not set(others.tolist()) & set(seen.tolist()) - {0.0}


def test_the_card_says_what_peft_needs_and_how_good_each_task_is(family: Adapters, tmp_path: Path) -> None:
    basis = saved(build(family, dict(budget=0.6)), tmp_path / "basis")
    card = (tmp_path / "basis" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "base_model: some/base" in card
    assert "PeftModel.from_pretrained" in card and "basis.select" in card
    for task, error in zip(TASKS, basis.info.task_error, strict=True):
        assert f"| {task} | 1.000 | {error:.1%} |" in card


def test_the_directory_of_another_program_is_not_replaced(family: Adapters, tmp_path: Path) -> None:
    (tmp_path / "basis").mkdir()
    (tmp_path / "basis" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(Exception, match=r"mine\.txt"):
        build(family, REQUESTS["joint"]).save_pretrained(tmp_path / "basis")
    assert (tmp_path / "basis" / "mine.txt").read_text(encoding="utf-8") == "keep"


# Mixtures


def test_adapters_of_different_ranks_and_targets_are_compressed_together(tmp_path: Path) -> None:
    small = replace(LLAMA, config={"target_modules": ["q_proj", "up_proj"], "r": 2, "task_type": "CAUSAL_LM"})
    adapters = random_adapters(tmp_path, LLAMA, TASKS[:2])
    random_adapter(tmp_path / "small", adapters.base, small, seed=9)
    adapters = replace(adapters, tasks={**adapters.tasks, "small": tmp_path / "small"})
    for request in (
        dict(method="joint", budget=0.8),
        dict(method="ae", num_bases=2, rank=8),
        dict(method="tsv", rank=16),
    ):
        basis = saved(build(adapters, request), tmp_path / "basis")
        assert basis.info.task_error == pytest.approx(measured_errors(basis, adapters.vectors()), rel=1e-5, abs=SAME)
        changes = {n: torch.stack([dense(part) for part in basis.deltas(n)]).sum(0) for n in basis.names}
        found = outputs(load_adapter(adapters.base, adapters.case, tmp_path / "basis"))
        assert close(found, merged(adapters, changes))
    basis.adapter("small").save_pretrained(tmp_path / "one")
    expected = outputs(load_adapter(adapters.base, small, adapters.tasks["small"]))
    assert close(outputs(load_adapter(adapters.base, adapters.case, tmp_path / "one")), expected)


def test_convolutions_and_embeddings_are_compressed(tmp_path: Path) -> None:
    case = Case("vision", {"target_modules": ["wide", "point", "line", "table", "out"]})
    adapters = random_adapters(tmp_path, case, TASKS[:3])
    for request in (dict(method="joint", budget=0.7), dict(method="ae", num_bases=2)):
        basis = saved(build(adapters, request), tmp_path / "basis")
        assert basis.info.task_error == pytest.approx(measured_errors(basis, adapters.vectors()), rel=1e-5, abs=SAME)
        changes = {n: torch.stack([dense(part) for part in basis.deltas(n)]).sum(0) for n in basis.names}
        found = outputs(load_adapter(adapters.base, case, tmp_path / "basis"))
        assert close(found, merged(adapters, changes))
        basis.adapter("math").save_pretrained(tmp_path / "one")
        changes = {name: change.double() for name, change in basis.reconstruct("math").items()}
        assert close(outputs(load_adapter(adapters.base, case, tmp_path / "one")), merged(adapters, changes))


def test_weights_stored_transposed_are_compressed(tmp_path: Path) -> None:
    case = Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"})
    adapters = random_adapters(tmp_path, case, TASKS[:3])
    basis = saved(build(adapters, dict(method="joint", budget=0.7)), tmp_path / "basis")
    changes = {n: torch.stack([dense(part) for part in basis.deltas(n)]).sum(0) for n in basis.names}
    found = outputs(load_adapter(adapters.base, case, tmp_path / "basis"))
    assert close(found, merged(adapters, changes))


@pytest.mark.parametrize("words", [{"modules_to_save": ["classifier"]}, {"lora_bias": True}], ids=str)
def test_saved_modules_and_biases_are_kept_whole_and_merged(words: dict[str, object], tmp_path: Path) -> None:
    case = Case("bert", {"target_modules": ["query", "value"], **words})
    adapters = random_adapters(tmp_path, case, TASKS[:3])
    basis = saved(build(adapters, dict(method="joint", budget=0.9)), tmp_path / "basis")
    originals = sum(stored_bytes(path) for path in adapters.tasks.values())
    assert stored_bytes(tmp_path / "basis") <= 0.9 * originals
    assert basis.info.task_error == pytest.approx(measured_errors(basis, adapters.vectors()), rel=1e-5, abs=SAME)
    vectors = adapters.vectors()
    changes = {}
    for name in basis.names:
        parts = [dense(part) for part in basis.deltas(name)]
        changes[name] = torch.stack(parts or [dense(delta) for delta in vectors.deltas(name)]).sum(0)
    found = outputs(load_adapter(adapters.base, case, tmp_path / "basis"))
    assert close(found, merged(adapters, changes))
    basis.adapter("code", base=adapters.base).save_pretrained(tmp_path / "one")
    changes = {name: change.double() for name, change in basis.reconstruct("code").items()}
    assert close(outputs(load_adapter(adapters.base, case, tmp_path / "one")), merged(adapters, changes))


@pytest.mark.parametrize("budget", [0.75, 0.8, 0.85])
def test_a_module_may_keep_its_bias_and_no_component(budget: float, tmp_path: Path) -> None:
    case = Case("bert", {"target_modules": ["query", "value"], "bias": "all"})
    adapters = random_adapters(tmp_path, case, TASKS[:2])
    basis = saved(build(adapters, dict(budget=budget)), tmp_path / "basis")
    assert basis.info.adapters is not None
    assert budget > 0.8 or any(not spec.width for spec in basis.info.adapters.modules.values())
    assert basis.info.task_error == pytest.approx(measured_errors(basis, adapters.vectors()), rel=1e-5, abs=SAME)


def test_one_adapter_is_a_basis_of_one(family: Adapters, tmp_path: Path) -> None:
    alone = replace(family, tasks={"math": family.tasks["math"]})
    basis = saved(build(alone, dict(budget=0.5)), tmp_path / "basis")
    assert basis.info.task_error == pytest.approx(measured_errors(basis, alone.vectors()), rel=1e-5)


def test_an_adapter_that_changes_nothing_has_no_error(family: Adapters, tmp_path: Path) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (torch.zeros(16, 2), torch.ones(2, 16))}
    write_lora(tmp_path / "zero", factors, base_model_name_or_path="some/base")
    adapters = replace(family, tasks={**family.tasks, "zero": tmp_path / "zero"})
    basis = saved(build(adapters, dict(budget=0.6)), tmp_path / "basis")
    assert basis.info.task_error[-1] == pytest.approx(0, abs=SAME)
    assert max(float(change.abs().max()) for change in basis.reconstruct("zero").values()) <= SAME


def test_build_gives_bases_of_adapters(family: Adapters) -> None:
    assert LoraBasis.build(family.vectors(), 2).info.adapters is not None
    assert LoraBasis.build(family.vectors(), method="tsv", budget=0.5).info.method == "tsv"


# Refusals


def test_a_request_that_cannot_be_is_refused(family: Adapters) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(method="pca"), "pca of adapters"),
        (dict(method="best"), "unknown method 'best'"),
        (dict(method="joint", num_bases=2), "num_bases goes with ae"),
        (dict(method="joint", rank=4), "give one of them"),
        (dict(method="ae", rank=4, budget=0.5), "give one of them"),
        (dict(budget=1.5), "between 0 and 1"),
        (dict(budget=0.5, alpha=0.0), "a number other than 0"),
        (dict(method="ae", num_bases=9), "there are only 4 tasks"),
        (dict(budget=0.001), "the budget holds no component"),
        (dict(method="tsv", num_bases=2), "tsv keeps every task"),
        (dict(method="pca_positive", num_bases=2, balanc=False), "balanc is no option of pca_positive"),
        (dict(method="pca_positive", num_bases=2, balance=False), "balance is an option of method ae, not of pca"),
        (dict(method="rand_select", num_bases=2, sed=1), "did you mean seed"),
        (dict(method="cluster", innr="sum"), "did you mean inner"),
        (dict(method="joint", foo=1), "foo is no option of joint"),
        (dict(method="tsv", foo=1), "foo is no option of tsv"),
        (dict(method="ae", num_bases=2, steps=0), "steps of ae"),
        (dict(method="ae", num_bases=2, even_errors=True, balance=False), "balanced bases"),
        (dict(budget=0.5, balance=False), "without a method"),
    ]
    for request, message in wrong:
        with pytest.raises(ParameterError, match=message):
            build(family, request)


def test_a_budget_below_what_is_kept_as_it_is_is_refused(dora: Adapters) -> None:
    with pytest.raises(ParameterError, match="row scales, biases and saved modules"):
        build(dora, dict(budget=0.05))


def test_checkpoints_among_the_adapters_are_refused_by_the_adapters_methods(family: Adapters) -> None:
    vectors = Vectors.open(family.base, {**family.tasks, "full": family.base})
    with pytest.raises(ParameterError, match="adapters only"):
        LoraBasis.build(vectors, method="joint", budget=0.5)


def test_an_unknown_task_and_a_missing_base_are_refused(family: Adapters, dora: Adapters) -> None:
    basis = build(family, REQUESTS["joint"])
    with pytest.raises(ParameterError, match='no task "poetry" in this basis; it has math, code, chat, law'):
        basis.adapter("poetry")
    scaled = build(dora, dict(method="joint", budget=0.7))
    with pytest.raises(ParameterError, match="give base="):
        scaled.adapter("math")
    with pytest.raises(ParameterError, match="give base="):
        scaled.reconstruct("math")[scaled.names[0]]


def test_another_base_is_refused(dora: Adapters, tmp_path: Path) -> None:
    scaled = build(dora, dict(method="joint", budget=0.7))
    other = make_base(tmp_path / "other", LLAMA, seed=1)
    with pytest.raises(MismatchError, match="not the model this basis was built on"):
        scaled.adapter("math", base=other)
    with pytest.raises(MismatchError, match="not the model this basis was built on"):
        scaled.restore("math", other, tmp_path / "out")


def test_a_basis_that_lost_a_file_is_refused_by_name(family: Adapters, tmp_path: Path) -> None:
    build(family, REQUESTS["joint"]).save_pretrained(tmp_path / "basis")
    (tmp_path / "basis" / "basis.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not hold the vectors"):
        LoraBasis.from_pretrained(tmp_path / "basis")
    (tmp_path / "basis" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is absent"):
        LoraBasis.from_pretrained(tmp_path / "basis")


# The command line


def test_the_command_compresses_and_reports_both_errors_beside_truncation(family: Adapters, tmp_path: Path) -> None:
    out, file = tmp_path / "basis", tmp_path / "report.json"
    found = tvbases("compress", *family.options(), "--budget", 0.6, "--out", out, "--json", file)
    assert found.code == 0, found.err
    report = json.loads(file.read_text(encoding="utf-8"))
    basis = LoraBasis.from_pretrained(out)
    assert basis.info.adapters is not None
    assert report["method"] == basis.info.method == "joint"
    assert report["task_error"] == basis.info.task_error
    assert report["truncation_error"] == basis.info.adapters.truncation_error
    assert set(report["candidates"]) == {"tsv", "joint", "ae"}
    assert report["bytes"] == stored_bytes(out)
    assert report["bytes_of_task_vectors"] == sum(stored_bytes(path) for path in family.tasks.values())
    assert "truncated alone, same bytes" in found.out and "one seed" in found.out.replace("\n", " ")


def test_the_command_counts_the_modules_that_an_adapter_lacks(family: Adapters, tmp_path: Path) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (gaussian(1, 16, 2).float(), gaussian(2, 2, 16).float())}
    write_lora(tmp_path / "small", factors, base_model_name_or_path="some/base")
    adapters = replace(family, tasks={**family.tasks, "small": tmp_path / "small"})
    found = tvbases("compress", *adapters.options(), "--out", tmp_path / "basis", "--quiet")
    assert found.code == 0, found.err
    assert '"small": 7 tensors of the base are absent' in found.err and "counted as unchanged" in found.err


@pytest.mark.parametrize("state", ["built", "loaded"])
def test_pushing_uploads_the_directory_that_saving_writes(
    state: str, dora: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files of the basis and both of the stock adapter."""
    hub = FakeHub(monkeypatch)
    basis = build(dora, REQUESTS["joint"])
    basis.save_pretrained(tmp_path / "basis")
    basis = basis if state == "built" else LoraBasis.from_pretrained(tmp_path / "basis")
    assert str(basis.push_to_hub("me/skills")) == "https://example.org/me/skills"
    assert hub.files == file_bytes(tmp_path / "basis")
    assert {"adapter_config.json", "adapter_model.safetensors", "basis_config.json", "basis.safetensors"} < set(
        hub.files
    )


def test_the_command_says_where_truncation_is_as_good_and_uses_it(strangers: Adapters, tmp_path: Path) -> None:
    found = tvbases("compress", *strangers.options(), "--budget", 0.6, "--out", tmp_path / "basis")
    assert found.code == 0, found.err
    said = " ".join(found.out.split())
    assert "No method beats truncating each adapter alone at these bytes" in said
    assert LoraBasis.from_pretrained(tmp_path / "basis").info.method == "tsv"


def test_the_command_without_options_takes_half_of_the_bytes(family: Adapters, tmp_path: Path) -> None:
    assert tvbases("compress", *family.options(), "--out", tmp_path / "basis", "--quiet").code == 0
    originals = sum(stored_bytes(path) for path in family.tasks.values())
    assert stored_bytes(tmp_path / "basis") <= 0.5 * originals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", 0.0001], "the budget holds no component"),
        (["--method", "joint", "--num-bases", 2], "num_bases goes with ae"),
        (["--method", "pca"], "pca of adapters"),
        (["--alpha", 0], "a number other than 0"),
    ],
)
def test_the_command_refuses_with_one_message(
    options: list[object], message: str, family: Adapters, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, "compress", *family.options(), *options, "--out", tmp_path / "basis", "--quiet")


def test_a_task_whose_bias_changes_where_only_another_has_factors_comes_back(tmp_path: Path) -> None:
    """One trains all biases, the other has LoRA biases: PEFT has these beside factors only."""
    cases = {"math": {"target_modules": ["value"], "bias": "all"}, "code": {"target_modules": ["query"]}}
    cases["code"]["lora_bias"] = True
    base = make_base(tmp_path / "base", Case("bert", {}))
    paths = {
        task: random_adapter(tmp_path / task, base, Case("bert", words), seed)
        for seed, (task, words) in enumerate(cases.items(), start=1)
    }
    basis = saved(build(Adapters(Case("bert", {}), base, paths), dict(method="tsv", rank=8)), tmp_path / "basis")
    for task, path in paths.items():
        basis.adapter(task, base=base).save_pretrained(tmp_path / f"{task}-again")
        again, own = (outputs(load_adapter(base, Case("bert", {}), p)) for p in (tmp_path / f"{task}-again", path))
        assert close(again, own)
