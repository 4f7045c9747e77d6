"""Learned coefficients and masks: gradients, known optima, a planted mask, and how masks are stored and stitched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import Dense, LowRank, dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import CheckpointError, OutputError, ParameterError
from tvbases_hf.learning.adamerging import adamerging, with_shared
from tvbases_hf.learning.atlas import atlas
from tvbases_hf.learning.combination import Mixture, blocks_of, loss_and_gradient
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.devec import devec
from tvbases_hf.learning.localize import localize, share_masks, stitch, stitch_twice
from tvbases_hf.learning.masked import Csr, MaskedVectors
from tvbases_hf.methods.devec import Options
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.merging_models import NAMES, answers, changes, labelled_data, one_hot, random_states, unlabelled, vectors_of

EPS = torch.finfo(torch.float32).eps


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()


def mixed_forms(model: nn.Module) -> Vectors:
    """Three vectors, one of them dense, two low-rank where they can be."""
    plain = vectors_of(model, random_states(model, 3))
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: [
            LowRank(
                torch.randn(info.shape[0], 2, generator=generator, dtype=torch.float64),
                torch.randn(2, info.shape[1], generator=generator, dtype=torch.float64),
            )
            for _ in range(2)
        ]
        for name, info in plain.base.tensors.items()
        if len(info.shape) == 2
    }

    def read(name: str) -> list:
        found = plain.deltas(name)
        return [found[0], *factors[name]] if name in factors else found

    return Vectors(plain.base, plain.tasks, plain.labels, plain.names, plain.encoder, read)


# --- AdaMerging and aTLAS ---


@pytest.mark.parametrize("per", ["task", "layer", "weight"])
@pytest.mark.parametrize("loss", [TaskData.entropy, TaskData.loss])
def test_the_gradient_in_the_coefficients_equals_finite_differences(per: str, loss) -> None:
    model = network()
    vectors, data = mixed_forms(model), labelled_data(5, 3, dtype=torch.float64)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    mixture = Mixture(vectors, weights, blocks_of(vectors.names, per))
    values = 0.3 * torch.randn(mixture.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [next(iter(task.batches)) for task in data]
    _, slope = loss_and_gradient(mixture, model, data, batches, loss, values)
    assert slope.shape == (3, {"task": 1, "layer": 1, "weight": 4}[per])
    step = 1e-5
    for k in range(slope.shape[0]):
        for block in range(slope.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = values.clone()
                moved[k, block] += sign * step
                ends.append(loss_and_gradient(mixture, model, data, batches, loss, moved)[0])
            # central differences: step^2 of curvature, 1e-16 / step of rounding
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope[k, block]), rel=1e-6, abs=1e-9)


def test_entropy_falls_and_labels_are_not_needed() -> None:
    model = network()
    vectors = vectors_of(model, random_states(model, 3))
    data = [TaskData(t.name, t.batches, unlabelled) for t in labelled_data(5, 3, dtype=torch.float64)]
    found = adamerging(vectors, model, data, lr=0.02, steps=40)
    assert sum(found.losses[-4:]) < 0.8 * sum(found.losses[:4])
    assert found.values.shape == (3, 4) and len(found.losses) == 40
    one = adamerging(vectors, model, data, lr=1e-3, steps=1, start=[0.1, 0.2, 0.3], per="task")
    assert torch.allclose(one.values[:, 0], torch.tensor([0.1, 0.2, 0.3]).double(), atol=1.001e-3)
    assert not torch.equal(one.values[:, 0], torch.tensor([0.1, 0.2, 0.3]).double())
    for name in vectors.names:
        row = found.values[:, found.blocks[name]].tolist()
        assert torch.equal(dense(found.change(name)), dense(total(vectors.deltas(name), row)))


def test_low_rank_changes_stay_in_their_factors() -> None:
    """And are what the same changes give when they are stored whole."""
    model, data = network(), labelled_data(5, 3, dtype=torch.float64)
    vectors = mixed_forms(model)
    low = Vectors(vectors.base, vectors.tasks[:2], ("a", "b"), ("0.weight", "2.weight"), torch.eye(2).double(),
                  lambda name: vectors.deltas(name)[1:])  # fmt: skip
    whole = Vectors(low.base, low.tasks, low.labels, low.names, low.encoder,
                    lambda name: [Dense(dense(d)) for d in low.deltas(name)])  # fmt: skip
    found, expected = (adamerging(v, model, data[:2], steps=5, lr=0.1) for v in (low, whole))
    assert torch.allclose(found.values, expected.values, rtol=0, atol=1e-9)
    assert all(isinstance(found.change(name), LowRank) for name in found.names)
    for name in low.names:
        assert torch.allclose(dense(found.change(name)), dense(expected.change(name)), rtol=0, atol=1e-6)


def test_a_weight_that_is_not_contiguous_is_merged_like_any_other() -> None:
    plain, other = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    other.load_state_dict(plain.state_dict())
    other.weight = nn.Parameter(other.weight.detach().T.contiguous().T)
    states, data = random_states(plain, 3), labelled_data(5, 3, dtype=torch.float64)
    found = [adamerging(vectors_of(m, states), m, data, steps=3, lr=0.1) for m in (plain, other)]
    assert not other.weight.is_contiguous()
    assert torch.allclose(found[0].values, found[1].values, rtol=1e-12)


def quadratic() -> tuple[nn.Module, Vectors, list[TaskData]]:
    """Logistic regression along one vector: the loss is convex in its coefficient."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x = torch.randn(200, 4, dtype=torch.float64)
    direction = {"weight": torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]).double(), "bias": torch.zeros(2).double()}
    y = (x[:, 0] + 0.5 * torch.randn(200, dtype=torch.float64) < 0).long()
    state = {name: tensor + direction[name] for name, tensor in model.state_dict().items()}
    return model, vectors_of(model, [state]), [TaskData("new", [(x, y)], answers)]


@pytest.mark.parametrize("nonnegative", [False, True])
def test_atlas_with_one_block_finds_what_a_search_over_alpha_finds(nonnegative: bool) -> None:
    model, task_vectors, data = quadratic()
    grid = torch.linspace(-4, 4, 161, dtype=torch.float64)

    x, y = data[0].batches[0]  # type: ignore[index]

    def loss(alpha: float) -> float:
        state = {n: t + alpha * dense(task_vectors.deltas(n)[0]) for n, t in model.state_dict().items()}
        return float(nn.functional.cross_entropy(torch.func.functional_call(model, state, x), y))

    best = float(grid[torch.tensor([loss(float(a)) for a in grid]).argmin()])
    assert best > 0.5
    found = atlas(task_vectors, model, data, per="task", weight_decay=0.0, epochs=400, nonnegative=nonnegative)
    assert float(found.values) == pytest.approx(best, abs=0.06)


def test_nonnegative_coefficients_stay_so_where_a_negative_one_would_be_better() -> None:
    model, task_vectors, _ = quadratic()
    x = torch.randn(100, 4, dtype=torch.float64)
    data = [TaskData("new", [(x, (x[:, 0] > 0).long())], answers)]
    vectors = task_vectors
    assert float(atlas(vectors, model, data, per="task", epochs=60).values) < -0.1
    assert 0 <= float(atlas(vectors, model, data, per="task", epochs=60, nonnegative=True).values) < 1e-2


def test_blocks_are_weights_layers_or_one() -> None:
    names = ("embed.weight", "layers.0.a.weight", "layers.0.b.weight", "layers.1.a.weight", "norm.weight")
    assert list(blocks_of(names, "task").values()) == [0] * 5
    assert list(blocks_of(names, "layer").values()) == [0, 1, 1, 2, 0]
    assert list(blocks_of(names, "weight").values()) == [0, 1, 2, 3, 4]


def test_shared_components_of_pairs_become_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    base = Checkpoint.from_state_dict({"weight": torch.randn(40, 40, generator=generator)})
    common = torch.randn(40, 2, generator=generator)

    def change() -> Tensor:
        own = torch.randn(40, 2, generator=generator)
        return torch.cat([common, own], 1) @ torch.randn(4, 40, generator=generator)

    models = {n: Checkpoint.from_state_dict({"weight": base.read("weight") + change()}) for n in NAMES}
    vectors = with_shared(Vectors.of_models(base, models), Options(pool="pairs", rank=4.0))
    assert vectors.labels == (*NAMES, "math & code", "math & chat", "code & chat")
    assert vectors.encoder[:, 3].tolist() == [0.5, 0.5, 0.0]
    shared = dense(vectors.deltas("weight")[3])
    space = torch.linalg.qr(common.double()).Q
    assert float((space @ (space.T @ shared) - shared).norm()) < 0.05 * float(shared.norm())
    with pytest.raises(ParameterError, match="pool must be pairs"):
        with_shared(vectors, Options())
    with pytest.raises(ParameterError, match="at least 2; got pairs and 1"):
        with_shared(vectors.selected([0]))


def test_bad_options_of_learned_coefficients_are_refused() -> None:
    model, data = network(), labelled_data(5, 3, dtype=torch.float64)
    vectors = vectors_of(model, random_states(model, 3))
    with pytest.raises(ParameterError, match="per must be one of task, layer, weight; got 'block'"):
        adamerging(vectors, model, data, per="block")
    with pytest.raises(ParameterError, match="steps must be at least 1"):
        adamerging(vectors, model, data, steps=0)
    with pytest.raises(ParameterError, match="start has 2 coefficients, but there are 3 vectors"):
        adamerging(vectors, model, data, start=[0.1, 0.2], steps=1)
    with pytest.raises(ParameterError, match="squared coefficients need a start above 0"):
        atlas(vectors, model, data, nonnegative=True, start=0.0)
    with pytest.raises(ParameterError, match="no data given"):
        atlas(vectors, model, [])
    with pytest.raises(ParameterError, match="epochs must be at least 1"):
        atlas(vectors, model, data, epochs=0)
    with pytest.raises(ParameterError, match='"math" is empty'):
        atlas(vectors, model, [TaskData("math", [], answers)])


# --- Localize-and-Stitch ---


def planted() -> tuple[nn.Module, Vectors, list[TaskData], Tensor]:
    """A task vector that helps in two of eight columns and harms in the others."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(300, 8)
    y = (x[:, 0] + x[:, 5] > 0).long()
    sign = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1])
    useful = torch.zeros(8, dtype=torch.bool)
    useful[[0, 5]] = True
    row = torch.where(useful, torch.ones(8), sign)
    vector = torch.stack([-row, row])
    state = {"weight": model.weight.detach() + vector}
    return model, vectors_of(model, [state]), [TaskData("math", [(x, y)], answers)], useful.expand(2, 8)


def test_a_planted_mask_is_found() -> None:
    model, task_vectors, data, useful = planted()
    vectors = task_vectors
    found = localize(vectors, model, data, sparsity=0.0, lr=200.0, l1=1e-2, epochs=60)
    (csr,) = (part["weight"] for part in found.parts)
    assert torch.equal(csr.mask(), useful)
    assert torch.equal(csr.dense(), torch.where(useful, dense(task_vectors.deltas("weight")[0]).float(), 0.0))
    before = localize(vectors, model, data, sparsity=0.5, epochs=0)
    assert not torch.equal(before.parts[0]["weight"].mask(), useful)
    assert found.density == (4 / 16,)


def test_a_step_of_the_mask_is_one_of_gradient_descent_on_the_objective() -> None:
    """Over bases: sum_i W_e[i, m] L_i, and the penalty."""
    model = network()
    vectors = vectors_of(model, random_states(model, 3))
    data = labelled_data(5, 3, dtype=torch.float64)
    encoder = torch.tensor([[0.75], [0.25], [0.0]], dtype=torch.float64)
    basis = Vectors(vectors.base, vectors.tasks, ("b",), vectors.names, encoder, lambda n: vectors.deltas(n)[:1])
    logits = {n: torch.full_like(t, -0.02, requires_grad=True) for n, t in model.state_dict().items()}
    masked = {n: t.detach() + logits[n].sigmoid() * dense(vectors.deltas(n)[0]) for n, t in model.state_dict().items()}
    objective = sum(logit.sigmoid().sum() * 1e-4 for logit in logits.values())
    for weight, task in ((0.75, data[0]), (0.25, data[1])):
        for x, y in task.batches:
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, masked, x), y)
            objective = objective + weight * loss / len(task.batches)  # type: ignore[arg-type]
    objective.backward()  # type: ignore[union-attr]
    found = localize(basis, model, data, sparsity=0.0, bias=0.02, lr=3.0, l1=1e-4, epochs=1)
    count = 0
    for name, logit in logits.items():
        assert logit.grad is not None
        after = logit.detach() - 3.0 * logit.grad
        clear = after.abs() > 1e-6
        assert torch.equal(found.parts[0][name].mask()[clear], (after > 0)[clear])
        count += int((after > 0).sum())
    assert 0 < count < sum(logit.numel() for logit in logits.values())


def masks(*rows: list[int]) -> tuple[MaskedVectors, Tensor]:
    values = torch.arange(1.0, 1 + len(rows) * len(rows[0])).reshape(len(rows), -1)
    parts = tuple({"w": Csr.masked(v, torch.tensor(row).bool())} for v, row in zip(values, rows, strict=True))
    return MaskedVectors(tuple(f"t{i}" for i in range(len(rows))), parts), values


def test_stitching_averages_where_masks_overlap() -> None:
    masked, values = masks([1, 1, 0, 0], [0, 1, 1, 0])
    expected = torch.tensor([values[0, 0], (values[0, 1] + values[1, 1]) / 2, values[1, 2], 0])
    assert torch.equal(dense(stitch(masked).change("w"), torch.float32), expected)
    weighted = dense(stitch(masked, [3, 1]).change("w"))
    assert float(weighted[1]) == pytest.approx(float((3 * values[0, 1] + values[1, 1]) / 4))
    with pytest.raises(ParameterError, match="one positive weight for each of the 2 vectors"):
        stitch(masked, [1.0])
    with pytest.raises(ParameterError, match="one positive weight"):
        stitch(masked, [1.0, 0.0])


def test_a_shared_mask_is_the_rounded_mean_of_the_clusters() -> None:
    masked, values = masks([1, 1, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1])
    vectors = Vectors(
        Checkpoint.from_state_dict({"w": torch.zeros(4)}),
        masked.labels,
        masked.labels,
        ("w",),
        torch.eye(4),
        lambda name: [Dense(row) for row in values],
    )
    shared = share_masks(masked, vectors, [[0, 1, 2], [3]])
    assert shared.labels == ("t0 + t1 + t2", "t3")
    assert shared.parts[0]["w"].mask().tolist() == [True, True, False, False]
    # the member whose own mask lacks the number counts too
    assert shared.parts[0]["w"].values.tolist() == pytest.approx(values[:3, :2].mean(0).tolist())
    assert shared.parts[1]["w"].mask().tolist() == [False, True, False, True]
    for clusters in ([[0, 1]], [[0, 1, 2], [2, 3]], [[0, 1, 2, 3], []]):
        with pytest.raises(ParameterError, match="each of the 4 vectors once"):
            share_masks(masked, vectors, clusters)


def test_stitching_twice_keeps_within_a_cluster_what_one_mask_alone_holds() -> None:
    masked, values = masks([1, 1, 0], [1, 0, 0], [0, 1, 1])
    twice = dense(stitch_twice(masked, [[0, 1], [2]]).change("w"), torch.float32)
    assert twice.tolist() == [0.0, float(values[0, 1] + values[2, 1]) / 2, float(values[2, 2])]
    once = dense(stitch(masked).change("w"))
    assert float(once[0]) == float(values[0, 0] + values[1, 0]) / 2


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 2, 2, 2), (0,)])
def test_csr_gives_back_what_is_under_the_mask(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(shape, generator=generator) < share
        csr = Csr.masked(tensor, mask)
        assert torch.equal(csr.mask(), mask)
        assert torch.equal(csr.dense(), torch.where(mask, tensor, torch.zeros(())))
        assert len(csr) == int(mask.sum())


def test_masked_vectors_survive_the_disk(tmp_path: Path) -> None:
    model = network(torch.float32)
    vectors = one_hot(vectors_of(model, random_states(model, 3)))
    found = localize(vectors, model, labelled_data(5, 3), sparsity=0.1, epochs=2, lr=10.0)
    out = found.save(tmp_path / "masks")
    again = MaskedVectors.load(out)
    assert again.labels == found.labels and again.names == found.names and again.density == found.density
    before, after = changes(stitch(found)), changes(stitch(again))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(file.stat().st_size for file in out.iterdir()) >= found.nbytes
    written = (out / "masked_vectors.safetensors").read_bytes()
    for _ in range(8):  # its own output may be replaced, by the same bytes
        found.save(out)
        assert (out / "masked_vectors.safetensors").read_bytes() == written
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write"):
        found.save(out)
    with pytest.raises(CheckpointError, match="holds no masked vectors"):
        MaskedVectors.load(tmp_path)
    file = out / "masked_vectors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is damaged"):
        MaskedVectors.load(out)


def test_bad_options_of_masks_are_refused() -> None:
    model, data = network(), labelled_data(5, 3, dtype=torch.float64)
    vectors = vectors_of(model, random_states(model, 3))
    for option in ({"sparsity": 2}, {"bias": 0.0}, {"lr": 0.0}, {"l1": -1.0}, {"epochs": -1}):
        with pytest.raises(ParameterError, match="sparsity must lie between 0 and 1"):
            localize(vectors, model, data, **option)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match='"math" is empty'):
        localize(vectors, model, [TaskData("math", [], answers), *data[1:]], epochs=1)


# --- DeVec's protocol ---


class Matrix(nn.Module):
    """Logits of one matrix, large enough to be decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 20, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_devec_trains_a_coefficient_for_every_vector_and_every_shared_component() -> None:
    """The labels are those of a model that only such coefficients make: what two tasks share is taken away from it."""
    torch.manual_seed(0)
    model, generator = Matrix(), torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base, common = Checkpoint.from_state_dict({"layer.weight": model.layer.weight.detach()}), draw(20, 2)
    changes = [torch.cat([common, draw(20, 2)], dim=1) @ draw(4, 24) / 5 for _ in NAMES]
    states = {n: {"layer.weight": base.read("layer.weight") + c} for n, c in zip(NAMES, changes, strict=True)}
    vectors = Vectors.of_models(base, {n: Checkpoint.from_state_dict(state) for n, state in states.items()})
    options = Options(pool="pairs", rank=4.0)
    shared = [dense(part) for part in with_shared(vectors, options).deltas("layer.weight")[3:]]
    target = base.read("layer.weight") + sum(changes, torch.zeros(())) - 2 * shared[0]
    inputs = draw(64, 24)
    labels = (inputs @ target.T).argmax(1)
    data = [TaskData("any", [(inputs, labels)], lambda asked, batch: (asked(batch[0]), batch[1]))]

    def loss(weight: Tensor) -> float:
        return float(nn.functional.cross_entropy(inputs @ weight.T, labels))

    still = devec(vectors, model, data, options=options, lr=1e-30, epochs=1)
    assert torch.allclose(still.values[:, 0], torch.tensor([0.3] * 3 + [0.0] * 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(dense(still.change("layer.weight")), 0.3 * sum(changes, torch.zeros(())), atol=1e-6)
    found = devec(vectors, model, data, options=options, lr=0.1, epochs=150)
    assert found.vectors.labels == (*NAMES, "math & code", "math & chat", "code & chat") and found.method == "devec"
    weights = base.read("layer.weight")
    alone = atlas(vectors, model, data, per="task", start=0.3, lr=0.1, weight_decay=0.0, epochs=150)
    reached, without = (loss(weights + dense(one.change("layer.weight"))) for one in (found, alone))
    assert reached < 0.8 * without < loss(weights + 0.3 * sum(changes, torch.zeros(())))
    assert found.values[3, 0] < 0
