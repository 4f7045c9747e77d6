"""Everything that mergekit's YAML offers works for our methods as for mergekit's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from oracles.merge_oracle import (
    Vectors,
    added,
    assert_within,
    balanced_reconstruction,
    distance,
    family_vectors,
    merge_config,
    read_vectors,
    run_ours,
    run_stock,
)
from tvbases_hf.bases import ae_bases
from zoo.hf_models import WORDS, Family, State, read_state, save_state, save_tokenizer

pytest_plugins = ["zoo.hf_fixtures"]

Config = dict[str, Any]
LAST_LAYER = "model.layers.1."


def expected_by_tensor(vectors: Vectors, mixing: Callable[[str], torch.Tensor]) -> tuple[State, State]:
    """theta_0 + the sum of the vectors mixed for each tensor, and the rounding that a float32 merge may show."""
    expected, bound = {}, {}
    for name, base in vectors.base.items():
        part = Vectors({name: base}, {name: vectors.tau[name]})
        expected |= added(part, mixing(name))
        bound |= part.rounding(mixing(name).expand(-1, 4) if mixing(name).shape[1] == 1 else mixing(name))
    return expected, bound


def every_model(config: Config, values: list[Any], name: str = "weight") -> Config:
    models = [
        m | ({"parameters": {name: v}} if v is not None else {}) for m, v in zip(config["models"], values, strict=True)
    ]
    return config | {"models": models}


def test_a_gradient_of_lambda_grows_from_the_first_to_the_last_layer(llama: Family, tmp_path: Path) -> None:
    """Layers run from 0 to 1; what stands before and after them counts as 0, as for mergekit's methods."""
    vectors = family_vectors(llama)
    merged = run_stock(merge_config(llama, num_bases=2, lambda_=[0.2, 1.0]), tmp_path / "out")
    scale = lambda name: 1.0 if name.startswith(LAST_LAYER) else 0.2  # noqa: E731
    expected, bound = expected_by_tensor(vectors, lambda n: torch.full((4, 1), scale(n) * 2 / 4).double())
    assert_within(merged, expected, bound)
    plain = every_model(merge_config(llama, "task_arithmetic", lambda_=[0.2 * 2 / 4, 1.0 * 2 / 4]), [1.0] * 4)
    assert distance(merged, run_stock(plain, tmp_path / "plain")) < 1e-6


def test_a_gradient_of_weight_grows_from_the_first_to_the_last_layer(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    config = every_model(merge_config(llama, num_bases=3), [[0.0, 1.0], [-0.5, 0.5], 1.0, 0.25])
    merged = run_stock(config, tmp_path / "out")
    reconstruction = balanced_reconstruction(vectors, 3)
    first, last = torch.tensor([0.0, -0.5, 1.0, 0.25]).double(), torch.tensor([1.0, 0.5, 1.0, 0.25]).double()
    mixing = lambda name: reconstruction * (last if name.startswith(LAST_LAYER) else first)  # noqa: E731
    expected, bound = expected_by_tensor(vectors, mixing)
    assert_within(merged, expected, bound)


def test_filters_choose_the_value_by_the_tensors_name(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    filtered = [{"filter": "mlp", "value": 0.1}, {"filter": "self_attn", "value": 0.5}, {"value": 0.9}]
    merged = run_stock(merge_config(llama, num_bases=2, lambda_=filtered), tmp_path / "out")
    scale = lambda name: 0.1 if "mlp" in name else 0.5 if "self_attn" in name else 0.9  # noqa: E731
    expected, bound = expected_by_tensor(vectors, lambda n: torch.full((4, 1), scale(n) * 2 / 4).double())
    assert_within(merged, expected, bound)


def test_filters_choose_the_weight_of_each_model(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    filtered = [{"filter": "mlp", "value": -1.0}, {"value": 0.5}]
    merged = run_stock(every_model(merge_config(llama, num_bases=2), [filtered, 1.0, 1.0, 0.0]), tmp_path / "out")
    reconstruction = balanced_reconstruction(vectors, 2)

    def mixing(name: str) -> torch.Tensor:
        return reconstruction * torch.tensor([-1.0 if "mlp" in name else 0.5, 1.0, 1.0, 0.0], dtype=torch.float64)

    assert_within(merged, *expected_by_tensor(vectors, mixing))


def test_the_number_of_bases_may_differ_between_tensors(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    filtered = [{"filter": "mlp", "value": 1}, {"value": 3}]
    merged = run_stock(merge_config(llama, num_bases=filtered, balance=False), tmp_path / "out")
    encoders = {m: ae_bases(vectors.gram, m, balance=False).encoder for m in (1, 3)}
    assert_within(merged, *expected_by_tensor(vectors, lambda name: encoders[1 if "mlp" in name else 3]))


def test_a_density_for_some_models_leaves_the_others_at_the_default(llama: Family, tmp_path: Path) -> None:
    densities = [0.3, None, None, 0.6]
    ours = every_model(merge_config(llama, num_bases=4, merge="ties"), densities, "density")
    plain = merge_config(llama, "ties", weight=1.0)
    stock = run_stock(every_model(plain, densities, "density"), tmp_path / "stock")
    merged = run_stock(ours, tmp_path / "ours")
    assert distance(merged, stock) < 1e-7
    assert distance(merged, run_stock(plain, tmp_path / "dense")) > 1e-4


def test_a_density_of_a_basis_is_the_mean_of_its_tasks_by_their_shares(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    encoder = ae_bases(vectors.gram, 2).encoder
    shares = encoder / encoder.sum(dim=0)
    densities = [0.2, 0.4, 0.6, 0.8]
    of_bases = (torch.tensor(densities).double() @ shares).tolist()
    assert abs(of_bases[0] - of_bases[1]) > 0.01
    config = merge_config(llama, num_bases=2, merge="breadcrumbs", gamma=0.0)
    merged = run_stock(every_model(config, densities, "density"), tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = (merged[name].double() - vectors.base[name]).abs() > 0
    bases = torch.tensordot(encoder.T, vectors.tau[name], dims=1).reshape(2, -1).abs()
    kept = torch.stack(
        [row >= row.sort().values[len(row) - int(d * len(row))] for row, d in zip(bases, of_bases, strict=True)]
    )
    assert torch.equal(changed.reshape(-1), kept.any(dim=0))


def test_slices_of_equal_layers_merge_like_whole_models(llama: Family, tmp_path: Path) -> None:
    whole = merge_config(llama, num_bases=2, balance=False)
    paths = [whole["base_model"], *(item["model"] for item in whole["models"])]
    sliced = {key: value for key, value in whole.items() if key != "models"}
    sliced["slices"] = [
        {"sources": [{"model": path, "layer_range": [layer, layer + 1]} for path in paths]} for layer in range(2)
    ]
    merged, expected = run_ours(sliced, tmp_path / "sliced"), run_stock(whole, tmp_path / "whole")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_slice_may_have_its_own_lambda_and_leave_layers_out(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    config = merge_config(llama, num_bases=2, lambda_=0.5)
    paths = [config["base_model"], *(item["model"] for item in config.pop("models"))]
    sources = [{"model": path, "layer_range": [1, 2]} for path in paths]
    config["slices"] = [{"sources": sources, "parameters": {"lambda": 0.25}}]
    merged = run_ours(config, tmp_path / "out")
    name = LAST_LAYER + "mlp.up_proj.weight"
    expected = vectors.base[name] + 0.25 * 2 / 4 * vectors.tau[name].sum(dim=0)
    found = merged.pop("model.layers.0.mlp.up_proj.weight")
    assert (found - expected).abs().max() < 16 * 2**-23 * expected.abs().max()
    assert not any(key.startswith(LAST_LAYER) for key in merged)


def test_modules_merge_like_a_plain_list_of_models(llama: Family, tmp_path: Path) -> None:
    whole = merge_config(llama, num_bases=2, balance=False)
    nested = {key: value for key, value in whole.items() if key != "models"}
    nested["modules"] = {"default": {"models": whole["models"]}}
    merged, expected = run_ours(nested, tmp_path / "nested"), run_stock(whole, tmp_path / "whole")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("setting", [{"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}])
def test_a_grown_vocabulary_is_cut_to_the_bases(setting: Config, llama: Family, tmp_path: Path) -> None:
    """One fine-tune has two more tokens, in front of the others: rows are matched by token, not by number."""
    shutil.copytree(llama.base.parent, tmp_path / "models")
    place = Family(tmp_path / "models" / "base", {task: tmp_path / "models" / task for task in llama.tasks})
    grown = read_state(place.tasks["chat"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = grown[name]
        grown[name] = torch.cat([rows[:4], torch.full((2, rows.shape[1]), 7.0), rows[4:]])
    save_state(place.tasks["chat"], grown, place.base)
    save_tokenizer(place.tasks["chat"], ["new1", "new2", *WORDS])
    text = (place.tasks["chat"] / "config.json").read_text().replace('"vocab_size": 64', '"vocab_size": 66')
    (place.tasks["chat"] / "config.json").write_text(text)

    merged = run_ours(merge_config(place, num_bases=2) | setting, tmp_path / "out")
    vectors = family_vectors(llama)
    equal = torch.full((4, 2), 0.25, dtype=torch.float64)
    assert_within(merged, added(vectors, equal), vectors.rounding(equal))


def test_integer_buffers_are_copied(bert: Family, tmp_path: Path) -> None:
    positions = torch.arange(64)[None]
    assert positions.dtype == torch.int64
    for model in (bert.base, *bert.tuned()):
        state = read_state(model) | {"embeddings.position_ids": positions}
        save_state(tmp_path / "models" / model.name, state, bert.base)
    place = Family(tmp_path / "models" / "base", {task: tmp_path / "models" / task for task in bert.tasks})
    merged = run_ours(merge_config(place, num_bases=2), tmp_path / "out")
    found = merged.pop("embeddings.position_ids")
    assert found.dtype == torch.int64 and torch.equal(found, positions)
    vectors = family_vectors(bert)
    equal = torch.full((3, 2), 1 / 3, dtype=torch.float64)
    assert_within(merged, added(vectors, equal), vectors.rounding(equal))


def flat_files(root: Path) -> tuple[Config, list[Path]]:
    """A base and three models as single files; the second lacks a tensor and the third two."""
    root.mkdir()
    generator = torch.Generator().manual_seed(11)
    shapes = {"a": (5, 7), "b": (12,), "c": (6, 6), "d": (3, 4, 2)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    missing = {1: {"a"}, 2: {"a", "d"}}
    save_file(base, root / "base.safetensors")
    for index in range(3):
        steps = {n: 0.02 * (index + 1) * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        tuned = {n: base[n] + step for n, step in steps.items() if n not in missing.get(index, set())}
        save_file(tuned, root / f"m{index}.safetensors")
    files = [root / f"m{index}.safetensors" for index in range(3)]
    config = {
        "merge_method": "ae_bases",
        "base_model": str(root / "base.safetensors"),
        "models": [{"model": str(file)} for file in files],
        "parameters": {"num_bases": 2, "balance": False},
        "dtype": "float32",
    }
    return config, files


def flat_vectors(root: Path, files: list[Path]) -> Vectors:
    """As directories, for the reader of the oracle."""
    for file in [root / "base.safetensors", *files]:
        directory = root / "directories" / file.stem
        directory.mkdir(parents=True)
        shutil.copyfile(file, directory / "model.safetensors")
    return read_vectors(root / "directories" / "base", [root / "directories" / file.stem for file in files])


@pytest.mark.parametrize("over", ["bases", "reconstructions"])
def test_single_files_merge_and_a_missing_tensor_counts_as_unchanged(over: str, tmp_path: Path) -> None:
    from mergekit.scripts.merge_raw_pytorch import main

    from tvbases_mergekit import register

    register()
    config, files = flat_files(tmp_path / "models")
    config["parameters"]["over"] = over
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    main.main([str(tmp_path / "merge.yml"), str(out), "--tensor-union", "--quiet"], standalone_mode=False)
    vectors = flat_vectors(tmp_path / "models", files)
    assert bool((vectors.tau["a"][1:] == 0).all()) and bool((vectors.tau["a"][0] != 0).any())
    solved = ae_bases(vectors.gram, 2, balance=False)
    mixing = solved.encoder if over == "bases" else solved.reconstruction
    assert_within(read_state(out), added(vectors, mixing), vectors.rounding(mixing))


def test_an_incomplete_tensor_that_comes_first_uses_the_gram_matrix_of_all_models(tmp_path: Path) -> None:
    from mergekit.graph import Executor
    from mergekit.io.tasks import SaveTensor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    from tvbases_mergekit import register

    register()
    config, files = flat_files(tmp_path / "models")
    tasks = plan_flat_merge(
        RawPyTorchMergeConfig.model_validate(config), str(tmp_path / "out"), True, False, MergeOptions()
    )
    first = next(task for task in tasks if isinstance(task, SaveTensor) and task.tensor_name == "d")
    ((_, merged),) = Executor([first.tensor_task]).run()
    vectors = flat_vectors(tmp_path / "models", files)
    encoder = ae_bases(vectors.gram, 2, balance=False).encoder
    only = Vectors({"d": vectors.base["d"]}, {"d": vectors.tau["d"]})
    assert_within({"d": merged}, added(only, encoder), only.rounding(encoder))
    two = Vectors(vectors.base, {name: tau[:2] for name, tau in vectors.tau.items()})
    wrong = ae_bases(two.gram, 2, balance=False).encoder.sum(dim=1)
    assert (wrong - encoder.sum(dim=1)[:2]).abs().max() > 0.01  # those that have the tensor weigh differently alone


def test_a_merge_of_merges_is_a_merge_of_their_results(llama: Family, tmp_path: Path) -> None:
    from mergekit.scripts.multimerge import main

    from tvbases_mergekit import register

    register()
    paths = llama.tuned()
    documents = [
        merge_config(Family(llama.base, {p.name: p for p in pair}), num_bases=1) | {"name": name}
        for name, pair in [("left", paths[:2]), ("right", paths[2:])]
    ]
    last = merge_config(llama, num_bases=1, lambda_=2.0) | {"models": [{"model": "left"}, {"model": "right"}]}
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([*documents, last], sort_keys=False))
    arguments = [tmp_path / "multi.yml", "-I", tmp_path / "between", "--out-path", tmp_path / "out", "--quiet"]
    main.main([str(a) for a in arguments], standalone_mode=False)
    vectors = family_vectors(llama)
    equal = torch.full((4, 2), 0.25, dtype=torch.float64)  # 2 * 1/2 * 1/2 of every task
    bound = {name: 3 * rounding for name, rounding in vectors.rounding(equal).items()}
    assert_within(read_state(tmp_path / "out"), added(vectors, equal), bound)


def test_adapters_merge_like_the_models_they_make(llama: Family, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from tvbases_mergekit import register

    register()
    merged_models: dict[str, Path] = {}
    for index in range(3):
        torch.manual_seed(index)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(str(llama.base)),
            LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        )
        model.save_pretrained(str(tmp_path / f"lora{index}"))
        model.merge_and_unload().save_pretrained(tmp_path / f"full{index}")  # type: ignore[operator]
        merged_models[f"full{index}"] = tmp_path / f"full{index}"
    full = merge_config(Family(llama.base, merged_models), num_bases=2, balance=False)
    adapters = full | {"models": [{"model": f"{llama.base}+{tmp_path / f'lora{i}'}"} for i in range(3)]}
    cache = tmp_path / "cache"
    found = run_ours(adapters, tmp_path / "adapters", "--lora-merge-cache", str(cache))
    expected = run_stock(full, tmp_path / "models")
    assert len(list(cache.iterdir())) == 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert distance(found, read_state(llama.base)) > 1e-3
