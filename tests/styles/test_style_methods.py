"""A mix by a merging method is what the method makes of the dense changes, weight by weight, and stays a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tvbases_hf.algebra.delta import Dense, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.styles.diffusers_files import read_lora_file
from tvbases_hf.styles.mixed_file import mix_style_files, read_recipe
from zoo.lora_files import write
from zoo.peft_models import relative
from zoo.pipelines import FLUX_MODULES, dense_unique, products, style

EXACT = 1e-5
SCALES = {"a": 1.0, "b": 0.7, "c": -0.4}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("styles")
    states = {name: style(seed, FLUX_MODULES) for seed, name in enumerate(SCALES)}
    return {name: str(write(_new(where / name), state)) for name, state in states.items()}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def mixed(files: dict[str, str], out: Path, **how: Any) -> dict[str, torch.Tensor]:
    mix_style_files(files, out, dtype=torch.float32, **how)
    return {f"{c}.{m}": dense(delta) for c, own in read_lora_file(out).items() for m, delta in own.items()}


def reference(files: dict[str, str], method: str, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """What the method makes of full float64 matrices; thresholds of the whole model by sorting."""
    chosen, names = METHODS[method], [name for name in files if scales[name]]
    dtype = torch.float32 if method == "iso_cts" else torch.float64  # whose rounding noise is no direction
    changes = {name: products(load_file(files[name])) for name in names}
    options = chosen.defaults
    density = chosen.of_whole_model(options)
    if density is not None:
        entries = [torch.cat([m.flatten() for m in changes[name].values()]).abs().sort().values for name in names]
        options["limits"] = [float(own[len(own) - max(1, int(density * len(own)))]) for own in entries]
    modules = changes[names[0]]
    return {
        module: dense(
            chosen.change(
                module,
                matrix.shape,
                [Dense(changes[name][module].to(dtype)) for name in names],
                [scales[name] for name in names],
                options,
            )
        )
        for module, matrix in modules.items()
    }


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_mixes_as_it_merges_dense_changes(files: dict[str, str], method: str, tmp_path: Path) -> None:
    found = mixed(files, tmp_path / "mix.safetensors", method=method, scales=SCALES)
    wanted = reference(files, method, SCALES)
    assert set(found) == set(wanted)
    for module, matrix in wanted.items():
        assert relative(found[module], matrix) <= EXACT, module
    recipe = read_recipe(tmp_path / "mix.safetensors")
    assert recipe is not None and recipe["method"]["name"] == method


def test_a_style_of_scale_zero_is_not_there(files: dict[str, str], tmp_path: Path) -> None:
    scales = SCALES | {"b": 0.0}
    found = mixed(files, tmp_path / "mix.safetensors", method="tsv", scales=scales)
    for module, matrix in reference(files, "tsv", scales).items():
        assert relative(found[module], matrix) <= EXACT


def test_a_method_merges_the_component_that_is_named(files: dict[str, str], tmp_path: Path) -> None:
    """Their sum is the mix without one copy of what is shared; another method makes another change of them."""
    plain = mixed(files, tmp_path / "plain.safetensors", shared_weight=0.0)
    added = mixed(files, tmp_path / "added.safetensors", component="unique", method="task_arithmetic")
    other = mixed(files, tmp_path / "other.safetensors", component="unique", method="tsv")
    for module, matrix in plain.items():
        assert relative(added[module], matrix) <= EXACT
        assert relative(other[module], matrix) > 1e-3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "tvs"}, r"unknown merging method 'tvs' \(did you mean"),
        ({"method": "ties", "method_options": {"densty": 0.1}}, r"densty is no option of ties \(did you mean density"),
        ({"method_options": {"density": 0.1}}, "density: an option of a merging method; name the method too"),
    ],
)
def test_what_no_method_has_is_refused_before_anything_is_written(
    files: dict[str, str], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match=message):
        mix_style_files(files, tmp_path / "mix.safetensors", **how)
    assert list(tmp_path.iterdir()) == []


def test_rounding_noise_of_components_is_no_direction_of_iso_cts(files: dict[str, str], tmp_path: Path) -> None:
    """Unique components have as many columns as the styles, but fewer directions: the rest is float32's noise."""
    found = mixed(files, tmp_path / "mix.safetensors", method="iso_cts", component="unique", scales=SCALES)
    changes = [products(load_file(file)) for file in files.values()]
    for module, matrix in found.items():
        parts = [Dense(part.float()) for part in dense_unique(own[module] for own in changes)]
        wanted = METHODS["iso_cts"].combine(parts, list(SCALES.values()))
        assert torch.linalg.matrix_rank(matrix, rtol=1e-4) <= 2 * len(SCALES)
        assert relative(matrix, dense(wanted)) <= 1e-3, module
