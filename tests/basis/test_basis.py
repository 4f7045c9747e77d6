"""The basis directory: what is stored, what comes back, how far off it is, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf import Basis, Vectors, gram_matrix
from tvbases_hf.algebra.delta import dense
from tvbases_hf.bases import CONSTRUCTIONS
from tvbases_hf.errors import CheckpointError, MismatchError, OutputError, ParameterError
from tvbases_hf.storage import tensor_files
from zoo.fake_hub import FakeHub, file_bytes
from zoo.models import (
    CONFIG,
    SHAPES,
    Models,
    dense_task_matrix,
    flat,
    random_models,
    random_state,
    read_directory,
    save_checkpoint,
    tune,
)

EPS = torch.finfo(torch.float64).eps
METHODS = ("ae", "pca", "rand_select")
FLOATING = sorted(SHAPES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Four fine-tunes in float32, two of them alike."""
    directory = tmp_path_factory.mktemp("models")
    base = random_state(0)
    states = {f"task{i}": tune(base, i) for i in range(3)}
    states["task3"] = {
        name: tensor + (states["task0"][name] - tensor) / 2 + (tune(base, 9)[name] - tensor) / 2
        if tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }
    paths = {name: save_checkpoint(directory / name, state) for name, state in {"base": base, **states}.items()}
    (paths["base"] / "tokenizer.json").write_text('{"words": []}')
    (paths["base"] / "README.md").write_text("the base's own card")
    return Models(paths.pop("base"), paths, base, states)


def make(models: Models, method: str, dtype: torch.dtype | None = None, num_bases: int = 2) -> Basis:
    if method == "tsv":
        return Basis.build(models.vectors(), method="tsv", dtype=dtype)
    return Basis.build(models.vectors(), num_bases, method=method, dtype=dtype)


def save(models: Models, method: str, out: Path, dtype: torch.dtype | None = None, num_bases: int = 2) -> Basis:
    make(models, method, dtype, num_bases).save_pretrained(out)
    return Basis.from_pretrained(out)


def stored_matrix(directory: Path) -> Tensor:
    """[d, rows] the stored vectors by sorted name, float64, read without this library."""
    state = read_directory(directory)
    return torch.cat([state[name].double().reshape(len(state[name]), -1).T for name in sorted(state)])


def task_matrix(models: Models) -> Tensor:
    return dense_task_matrix(models.base_state, models.states)


# --- saving and loading -----------------------------------------------------------------------------------------------


def stacked(basis: Basis, name: str) -> Tensor:
    """[rows, *shape] all vectors of a basis, in the storage dtype."""
    deltas = basis.deltas(name)
    return torch.stack([dense(delta) for delta in deltas]).to(deltas[0].dtype)


@pytest.mark.parametrize("method", [*METHODS, "tsv"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_saving_what_was_loaded_gives_the_same_bytes(
    models: Models,
    tmp_path: Path,
    method: str,
    dtype: torch.dtype | None,
    sharded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sharded:
        monkeypatch.setattr(tensor_files, "MAX_SHARD_SIZE", 3000)
    basis = save(models, method, tmp_path / "first", dtype)
    basis.save_pretrained(tmp_path / "second")
    first, second = file_bytes(tmp_path / "first"), file_bytes(tmp_path / "second")
    assert first == second
    assert (len([name for name in first if name.endswith(".safetensors")]) > 1) == sharded
    assert ("basis.safetensors.index.json" in first) == sharded
    assert "config.json" not in first


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_basis_does_not_depend_on_the_layout_of_the_models(
    models: Models, tmp_path: Path, kind: str, shards: int
) -> None:
    paths = {
        name: save_checkpoint(tmp_path / kind / name, state, kind=kind, shards=shards)
        for name, state in {"base": models.base_state, **models.states}.items()
    }
    other = Models(paths.pop("base"), paths, models.base_state, models.states)
    save(models, "ae", tmp_path / "first")
    save(other, "ae", tmp_path / "second")
    first, second = stored_matrix(tmp_path / "first"), stored_matrix(tmp_path / "second")
    # The Gram matrices differ in the last digits, and so do the encoders.
    assert torch.allclose(first, second, rtol=0, atol=2e-7 * float(first.abs().max()))


@pytest.mark.parametrize("method", [*METHODS, "tsv"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_built_and_a_loaded_basis_have_the_same_vectors(
    models: Models, tmp_path: Path, method: str, dtype: torch.dtype | None
) -> None:
    built = make(models, method, dtype)
    built.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert (loaded.tasks, set(loaded.names), loaded.tensors) == (built.tasks, set(built.names), built.tensors)
    assert torch.equal(loaded.encoder, built.encoder)
    for name in built.names:
        assert stacked(built, name).dtype == stacked(loaded, name).dtype == (dtype or torch.float32)
        assert torch.equal(stacked(built, name), stacked(loaded, name))


@pytest.mark.parametrize("method", METHODS)
def test_stored_vectors_are_the_sums_that_the_encoder_names(models: Models, tmp_path: Path, method: str) -> None:
    basis = save(models, method, tmp_path / "basis", torch.float64)
    matrix = task_matrix(models)
    encoder = basis.encoder
    if method == "pca":
        encoder = torch.cat([encoder, torch.full((4, 1), 0.25, dtype=torch.float64)], dim=1)
    tolerance = 10 * EPS * float(matrix.abs().max())
    assert torch.allclose(stored_matrix(tmp_path / "basis"), matrix @ encoder, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", [*METHODS, "tsv"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_reconstructions_are_the_stored_vectors_times_the_decoder(
    models: Models, tmp_path: Path, method: str, dtype: torch.dtype | None
) -> None:
    basis = save(models, method, tmp_path / "basis", dtype)
    for index, task in enumerate(basis.tasks):
        found = basis.reconstruct(task)
        assert set(found) == set(SHAPES) and len(found) == len(SHAPES)
        for name in found:
            rows = stacked(basis, name).double().reshape(len(basis.decoder), -1)
            expected = (basis.decoder[:, index] @ rows).reshape(SHAPES[name])
            if method == "tsv":  # factors are multiplied in float64, and stacked() rounds the product once more
                expected = dense(basis.deltas(name)[index])
            assert found[name].dtype == torch.float32
            # One rounding to float32; float64 sums before it differ by far less.
            assert torch.allclose(found[name].double(), expected, rtol=2**-23, atol=1e-12)
    with pytest.raises(KeyError):
        basis.reconstruct("task0")["no such tensor"]
    with pytest.raises(ParameterError, match=r'no task "math".*task0, task1, task2, task3'):
        basis.reconstruct("math")


def test_as_many_bases_as_tasks_give_every_fine_tune_back(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis", num_bases=4)
    for task, path in models.tasks.items():
        restored = read_directory(basis.restore(task, models.base, tmp_path / task))
        original = read_directory(path)
        for name, tensor in original.items():
            # The vector is rounded to float32 once and the sum once.
            assert torch.allclose(restored[name].double(), tensor.double(), rtol=2**-23, atol=2**-23)


def test_tensors_of_any_shape_are_stored(tmp_path: Path) -> None:
    shapes = {"scalar": (), "one": (1,), "empty": (0,), "hollow": (3, 0), "cube": (2, 3, 4)}
    models = random_models(tmp_path, shapes=shapes)
    basis = save(models, "ae", tmp_path / "basis")
    assert {name: tuple(stacked(basis, name).shape[1:]) for name in basis.names} == shapes
    restored = read_directory(basis.restore("task0", models.base, tmp_path / "restored"))
    assert {name: tuple(restored[name].shape) for name in shapes} == shapes
    built = Basis.build(models.vectors(), 2)
    for found in (built, basis):
        assert {name: tuple(tensor.shape) for name, tensor in found.reconstruct("task1").items()} == shapes


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bases", [1, 2, 3])
def test_reported_errors_are_those_of_the_stored_numbers(
    models: Models, tmp_path: Path, method: str, dtype: torch.dtype, num_bases: int
) -> None:
    basis = save(models, method, tmp_path / "basis", dtype, num_bases)
    matrix, stored = task_matrix(models), stored_matrix(tmp_path / "basis")
    lost = (stored @ basis.decoder - matrix).square().sum(dim=0) / matrix.square().sum(dim=0)
    # |tau|^2 minus what the decoder saves: rounding of the squares, which are 1.
    reported = torch.tensor(basis.info.task_error, dtype=torch.float64).square()
    assert torch.allclose(reported, lost, rtol=0, atol=100 * EPS * len(matrix) ** 0.5)


def test_errors_of_truncated_task_vectors_are_those_of_the_stored_factors(models: Models, tmp_path: Path) -> None:
    basis = save(models, "tsv", tmp_path / "basis", torch.bfloat16)
    assert basis.info.ranks
    matrix = task_matrix(models)
    state = read_directory(tmp_path / "basis")
    for index, error in enumerate(basis.info.task_error):
        parts = []
        for name in FLOATING:
            if name in state:
                parts.append(state[name][index].double().reshape(-1))
            else:
                ranks = basis.info.ranks[name]
                start, stop = sum(ranks[:index]), sum(ranks[: index + 1])
                left, right = state[f"{name}.left"].double(), state[f"{name}.right"].double()
                parts.append((left[:, start:stop] @ right[start:stop]).reshape(-1))
        lost = (torch.cat(parts) - matrix[:, index]).norm() / matrix[:, index].norm()
        assert error == pytest.approx(float(lost), rel=1e-9)
        assert 0.1 < error < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decoder_is_fitted_to_the_stored_vectors(
    models: Models, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    unfitted = make(models, method, dtype).decoder
    basis = save(models, method, tmp_path / "basis", dtype)
    matrix, stored = task_matrix(models), stored_matrix(tmp_path / "basis")
    fitted = basis.decoder
    if method == "pca":  # the mean is added to every reconstruction as it is
        assert torch.equal(fitted[-1], torch.ones(4, dtype=torch.float64))
        mean = stored[:, -1:]
        expected = torch.linalg.lstsq(stored[:, :-1], matrix - mean, driver="gelsd").solution
        assert torch.allclose(fitted[:-1], expected, rtol=0, atol=1e-9)
    else:
        expected = torch.linalg.lstsq(stored, matrix, driver="gelsd").solution
        assert torch.allclose(fitted, expected, rtol=0, atol=1e-9)

    def lost(decoder: Tensor) -> Tensor:
        return (stored @ decoder - matrix).square().sum(dim=0)

    assert (lost(fitted) <= lost(unfitted) * (1 + 1e-12)).all()
    assert not torch.equal(fitted, unfitted)
    assert float(lost(fitted).sum()) < float(lost(unfitted).sum())


def test_numbers_too_large_for_the_stored_dtype_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = random_state(0)
    states = {f"task{i}": tune(base, i, size=3e5) for i in range(2)}
    paths = {name: save_checkpoint(tmp_path / "models" / name, s) for name, s in {"base": base, **states}.items()}
    models = Models(paths.pop("base"), paths, base, states)
    out = tmp_path / "out" / "basis"
    with pytest.raises(ParameterError, match=r"overflows torch\.float16; store it as bfloat16 or float32"):
        save(models, "ae", out, torch.float16)
    assert not out.parent.exists()

    save(models, "ae", out, torch.bfloat16)
    before = file_bytes(out)
    with pytest.raises(ParameterError, match="overflows"):
        save(models, "ae", out, torch.float16)
    assert file_bytes(out) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_are_stored_in_the_dtype_of_the_base_unless_another_is_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    models = random_models(tmp_path / "models", dtype=dtype)
    own = save(models, "ae", tmp_path / "own")
    asked = save(models, "ae", tmp_path / "asked", torch.float32)
    assert {info.dtype for info in own.tensors.values()} == {dtype}
    assert {info.dtype for info in asked.tensors.values()} == {torch.float32}


# --- restoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, -0.5, 0.3])
def test_a_restored_model_is_the_base_plus_the_reconstruction_rounded_once(
    tmp_path: Path, method: str, dtype: torch.dtype, alpha: float
) -> None:
    models = random_models(tmp_path / "models", dtype=dtype)
    basis = save(models, method, tmp_path / "basis")
    out = basis.restore("task1", models.base, tmp_path / "restored", alpha=alpha)
    restored = read_directory(out)
    assert restored.keys() == models.base_state.keys()
    change = alpha * (stored_matrix(tmp_path / "basis") @ basis.decoder[:, 1])
    expected = (flat(models.base_state) + change).to(dtype)
    found = flat(restored).to(dtype)
    # Sums of float64 in another order may fall on the other side of a rounding boundary, hardly ever.
    assert float((found != expected).double().mean()) < 1e-3
    assert torch.allclose(found.double(), expected.double(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(restored["model.position_ids"], models.base_state["model.position_ids"])
    assert all(restored[name].dtype == tensor.dtype for name, tensor in models.base_state.items())


def test_a_model_restored_with_alpha_zero_is_the_base(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis")
    restored = read_directory(basis.restore("task0", models.base, tmp_path / "restored", alpha=0))
    assert all(torch.equal(restored[name], tensor) for name, tensor in models.base_state.items())


def test_a_restored_model_has_the_configuration_and_the_tokenizer_of_the_base(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis")
    out = basis.restore("task0", models.base, tmp_path / "restored")
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "tokenizer.json").read_text() == '{"words": []}'
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "restored from a basis" in card and "the base's own card" not in card  # which does not describe it


def test_another_base_is_refused(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis")
    with pytest.raises(MismatchError, match=r"is not the model this basis was built on.*give the same base"):
        basis.restore("task0", models.tasks["task1"], tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_restored_model_replaces_itself_and_nothing_else(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis")
    out = basis.restore("task0", models.base, tmp_path / "restored")
    first = file_bytes(out)
    basis.restore("task1", models.base, out)
    assert file_bytes(out)["model.safetensors"] != first["model.safetensors"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write"):
        basis.restore("task0", models.base, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_base_stored_in_shards_is_restored(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_checkpoint(tmp_path / "base", models.base_state, shards=3)
    vectors = Vectors.open(base, {task: path for task, path in models.tasks.items()})
    monkeypatch.setattr(tensor_files, "MAX_SHARD_SIZE", 3000)
    Basis.build(vectors, 4).save_pretrained(tmp_path / "basis")
    out = Basis.from_pretrained(tmp_path / "basis").restore("task2", base, tmp_path / "restored")
    assert (out / "model.safetensors.index.json").is_file()
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == set(models.base_state)
    restored = read_directory(out)
    for name, tensor in models.states["task2"].items():
        assert torch.allclose(restored[name].double(), tensor.double(), rtol=2**-23, atol=2**-23)


# --- what the directory says ------------------------------------------------------------------------------------------


def test_the_configuration_holds_what_was_found(models: Models, tmp_path: Path) -> None:
    vectors = models.vectors()
    gram = gram_matrix(vectors)
    Basis.build(vectors, 2, gram=gram, balance=False, seed=3).save_pretrained(tmp_path / "basis")
    info = Basis.from_pretrained(tmp_path / "basis").info
    matrix = task_matrix(models)
    total = float(matrix.square().sum())
    encoder = torch.tensor(info.encoder, dtype=torch.float64)
    best = torch.linalg.lstsq(matrix @ encoder, matrix).solution
    assert info.method == "ae" and info.options == CONSTRUCTIONS["ae"].complete({"balance": False, "seed": 3})
    assert info.loss == pytest.approx(float((matrix @ encoder @ best - matrix).square().sum()) / total, rel=1e-9)
    spectrum = torch.linalg.svdvals(matrix).square()
    assert info.spectral_bound == pytest.approx(float(spectrum[2:].sum()) / total, rel=1e-9)
    assert info.bound <= info.loss * (1 + 1e-12)
    assert info.gram == gram.matrix.tolist()
    assert info.base_norm == pytest.approx(float(flat(models.base_state).norm()), rel=1e-12)
    assert info.effective_weights == pytest.approx(encoder.sum(dim=1).tolist())


def test_the_model_card_names_every_task_with_its_error(models: Models, tmp_path: Path) -> None:
    basis = save(models, "ae", tmp_path / "basis", torch.bfloat16)
    card = (tmp_path / "basis" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: tvbases-hf\n")
    for task, error, weight in zip(basis.tasks, basis.info.task_error, basis.info.effective_weights, strict=True):
        assert f"| {task} | {weight:.3f} | {error:.1%} |" in card
    assert "2 bases of 4 task vectors" in card and "from_pretrained" in card
    assert str(tmp_path) not in card and "base_model:" not in card  # a path here means nothing to others


def test_the_model_card_of_a_hub_base_links_to_it(models: Models, tmp_path: Path) -> None:
    vectors = models.vectors()
    vectors.base.label = "owner/base"
    Basis.build(vectors, 2).save_pretrained(tmp_path / "basis")
    assert "\nbase_model: owner/base\n" in (tmp_path / "basis" / "README.md").read_text(encoding="utf-8")


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["push", "save"])
@pytest.mark.parametrize("state", ["built", "loaded"])
def test_pushing_uploads_the_directory_that_saving_writes(
    models: Models, tmp_path: Path, way: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch)
    basis = make(models, "ae")
    basis.save_pretrained(tmp_path / "basis")
    basis = basis if state == "built" else Basis.from_pretrained(tmp_path / "basis")
    if way == "push":
        url = basis.push_to_hub("me/skills", private=True, commit_message="first")
    else:
        url = basis.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/skills", commit_message="first")
        assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "basis")
    assert str(url) == "https://example.org/me/skills"
    assert hub.files == file_bytes(tmp_path / "basis")
    assert hub.calls[0]["repo_id"] == "me/skills" and hub.calls[0]["commit_message"] == "first"


def test_a_basis_is_loaded_from_where_the_hub_puts_it(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    save(models, "ae", tmp_path / "basis")
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / "basis")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    basis = Basis.from_pretrained("me/skills", revision="v1", cache_dir="somewhere")
    assert basis.tasks == tuple(models.tasks)
    assert (asked["repo_id"], asked["revision"], asked["cache_dir"]) == ("me/skills", "v1", "somewhere")


# --- what is refused --------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = directory / "basis_config.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return damage


def cut(directory: Path) -> None:
    with open(directory / "basis.safetensors", "r+b") as stream:
        stream.truncate(2000)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda d: (d / "basis_config.json").unlink(), "not a basis directory: it has no basis_config"),
    "not JSON": (lambda d: (d / "basis_config.json").write_text("{"), "basis_config.json is damaged"),
    "not UTF-8": (lambda d: (d / "basis_config.json").write_bytes(b"\xff"), "basis_config.json is damaged"),
    "a list": (lambda d: (d / "basis_config.json").write_text("[1]"), "basis_config.json is damaged"),
    "no decoder": (rewritten(lambda data: data.pop("decoder")), "basis_config.json is damaged"),
    "an unknown field": (rewritten(lambda data: data.update(colour="red")), "basis_config.json is damaged"),
    "a newer format": (rewritten(lambda data: data.update(format_version=99)), "99 is newer.*pip install -U"),
    "a version that is no number": (rewritten(lambda data: data.update(format_version="x")), "is damaged"),
    "a task too many": (rewritten(lambda data: data["tasks"].append("more")), "basis_config.json is damaged"),
    "a short encoder": (rewritten(lambda data: data["encoder"].pop()), "basis_config.json is damaged"),
    "a ragged decoder": (rewritten(lambda data: data["decoder"][0].pop()), "basis_config.json is damaged"),
    "a decoder of words": (rewritten(lambda data: data.update(decoder=[["a"] * 4] * 2)), "is damaged"),
    "an empty encoder": (rewritten(lambda data: data.update(encoder=[])), "basis_config.json is damaged"),
    "no vectors": (lambda d: (d / "basis.safetensors").unlink(), "not a checkpoint"),
    "cut vectors": (cut, "basis.safetensors is truncated"),
    "a vector too many": (rewritten(lambda data: data["decoder"].append(data["decoder"][0])), "3 entries"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_basis_is_named(models: Models, tmp_path: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    save(models, "ae", tmp_path / "basis")
    damage(tmp_path / "basis")
    with pytest.raises(CheckpointError, match=message) as caught:
        Basis.from_pretrained(tmp_path / "basis")
    assert str(tmp_path / "basis") in str(caught.value)


def test_a_basis_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Basis.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a basis directory"):
        Basis.from_pretrained(tmp_path)


def test_an_unknown_method_is_refused_with_the_known_ones(models: Models) -> None:
    with pytest.raises(ParameterError, match=r"unknown method 'svd'.*ae, cluster, .*pca, .*pca_positive, rand_select"):
        Basis.build(models.vectors(), 2, method="svd")
    for options, message in (
        ({"method": "tsv"}, "tsv keeps every task: num_bases goes with ae"),
        ({"method": "joint"}, "joint is for adapters only"),
        ({"budget": 0.5}, "rank and budget are of method tsv"),
        ({"alpha": 0.5}, "alpha is for adapters only"),
        ({"balanc": False}, "did you mean balance"),
        ({"method": "rand_select", "solver": "adam"}, "solver is an option of method ae, not of rand_select"),
        ({"method": "cluster", "inner": "ties", "densty": 0.5}, "did you mean density"),
        ({"method": "cluster", "inner": "tie"}, "did you mean ties"),
    ):
        with pytest.raises(ParameterError, match=message):
            Basis.build(models.vectors(), 2, **options)  # type: ignore[arg-type]
    assert Basis.build(models.vectors()).info.num_bases == 2
    with pytest.raises(ParameterError, match="only 4 tasks"):
        Basis.build(models.vectors(), 5)


def test_a_directory_with_other_things_in_it_is_not_replaced(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "basis"
    save(models, "ae", out)
    save(models, "pca", out)
    assert Basis.from_pretrained(out).info.method == "pca"
    (out / "thesis.txt").write_text("mine")
    before = file_bytes(out)
    with pytest.raises(OutputError, match="did not write"):
        save(models, "ae", out)
    assert file_bytes(out) == before
