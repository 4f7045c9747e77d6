"""RegMean of experts that are one parameter in memory, packed in the files or not, against each expert's own rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.learning.data import IGNORED, TaskData, transformers_readout
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.regmean import regmean
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo import renamed
from zoo.models import State, tune

TASKS = ("a", "b")
EPS = torch.finfo(torch.float32).eps
SIZES = {**renamed.GROUPED, "num_local_experts": 4, "num_hidden_layers": 1}
MADE: dict[str, Callable[[], Any]] = {
    "gpt oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, head_dim=8, num_experts_per_tok=2)
    ),
    "llama 4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**SIZES, head_dim=8, num_experts_per_tok=1, intermediate_size_mlp=24)
    ),
    "jetmoe": lambda: transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_key_value_heads=2,
            kv_channels=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        )
    ),
}  # fmt: skip
NAMES = (*MADE, "dbrx", "granite moe", "mixtral", "qwen3 moe")
Grams = dict[tuple[str, int], Tensor]


def made(name: str, root: Path) -> tuple[Any, dict[str, State], Vectors]:
    torch.manual_seed(0)
    model = MADE[name]() if name in MADE else renamed.make(name)
    states = {"base": renamed.saved(model, root)}
    for task in TASKS:
        states[task] = tune(states["base"], ord(task), 0.1)
    tuned = {task: Checkpoint.from_state_dict(states[task], task) for task in TASKS}
    vectors = Vectors.of_models(Checkpoint.from_state_dict(states["base"], "base"), tuned)
    return model.double().eval(), states, vectors


def padded(ids: Tensor) -> TaskData:
    """The second text is three tokens shorter than the first."""
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    return TaskData("", [batch], transformers_readout)


def alone(data: TaskData) -> list[dict[str, Tensor]]:
    """Every text without its padding."""
    (batch,) = data.batches
    return [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def data_of(vectors: Vectors) -> list[TaskData]:
    ids = torch.arange(16).reshape(2, 8)
    return [TaskData(task, padded(ids + 5 * i).batches, transformers_readout) for i, task in enumerate(vectors.tasks)]


def grams(model: Any, batches: list[dict[str, Tensor]]) -> Grams:
    """{(parameter, expert): X^T X} of texts without padding, written out from what the modules are given."""
    found: Grams = {}

    def add(parameter: str, expert: int, rows: Tensor) -> None:
        found[parameter, expert] = found.get((parameter, expert), 0) + rows.mT @ rows

    def experts(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden, chosen, *_ = [*args, *kwargs.values()]
            hidden = hidden.flatten(0, -2)
            mlp = getattr(module, "mlp", module)
            for expert in range(module.num_experts):
                rows = hidden[(chosen == expert).any(-1)]
                if mlp is not module:  # DBRX
                    first, second, _ = (w.view(4, -1, w.shape[1])[expert] for w in mlp.parameters())
                    inner = mlp.activation_fn(rows @ first.T) * (rows @ second.T)
                    names, second_names = ("mlp.w1", "mlp.v1"), ("mlp.w2",)
                else:
                    weight = module.gate_up_proj[expert]
                    bias = module.gate_up_proj_bias[expert] if module.has_bias else 0
                    inner = module._apply_gate(rows @ (weight if module.is_transposed else weight.T) + bias)
                    names, second_names = ("gate_up_proj",), ("down_proj",)
                for name, given in [*((n, rows) for n in names), *((n, inner) for n in second_names)]:
                    add(f"{path}.{name}", expert, given)

        return hook

    def sorted_rows(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if hasattr(module, "num_experts") and type(module).__name__ == "JetMoeParallelExperts":
                for expert, rows in enumerate(args[0].split(args[1])):
                    add(f"{path}.weight", expert, rows)
            elif type(module).__name__ == "Llama4TextExperts":
                rows = args[0].view(module.num_experts, -1, module.hidden_size)
                gate, up = (rows @ module.gate_up_proj).chunk(2, -1)
                for expert in range(module.num_experts):
                    add(f"{path}.gate_up_proj", expert, rows[expert])
                    add(f"{path}.down_proj", expert, (up * module.act_fn(gate))[expert])

        return hook

    hooks = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("JetMoeParallelExperts", "Llama4TextExperts"):
            hooks.append(module.register_forward_pre_hook(sorted_rows(path), with_kwargs=True))
        elif kind.endswith("Experts"):
            hooks.append(module.register_forward_pre_hook(experts(path), with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def solution(products: list[Tensor], changes: list[Tensor], shrink: float) -> Tensor:
    """[out, in] sum_i B_i G_i times the pseudo-inverse of sum_i G_i."""
    shrunk = [torch.where(torch.eye(len(g)).bool(), g, shrink * g) for g in products]
    above = sum(change @ g for change, g in zip(changes, shrunk, strict=True))
    return above @ torch.linalg.pinv(torch.stack(shrunk).sum(0), hermitian=True, rtol=1e-10)


def matrices(name: str, stored: str, tensor: Tensor) -> list[tuple[Tensor, tuple[str, int]]]:
    """The matrices [out, in] of a tensor of the files, each with the parameter and the expert that has its inputs."""
    own = stored.rpartition(".")[0]
    if name in ("mixtral", "qwen3 moe"):  # a file has one matrix of one expert
        layer, _, rest = stored.partition(".block_sparse_moe" if name == "mixtral" else ".mlp")
        _, expert, kind, _ = rest.removeprefix(".").split(".")
        inner = "down_proj" if kind in ("w2", "down_proj") else "gate_up_proj"
        return [(tensor, (f"{layer}.mlp.experts.{inner}", int(expert)))]
    if name == "granite moe":
        parameter = "gate_up_proj" if "input" in stored else "down_proj"
        stored = f"{own.partition('.block_sparse_moe')[0]}.block_sparse_moe.experts.{parameter}"
    split = tensor.view(4, -1, tensor.shape[-1]) if name == "dbrx" else tensor
    turned = name in ("gpt oss", "llama 4") or stored.endswith("w2")
    return [(part.T if turned else part, (stored, e)) for e, part in enumerate(split)]


def of_experts(stored: str) -> bool:
    return ("experts" in stored or "put_linear" in stored) and not stored.endswith(("bias", "router.layer.weight"))


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_is_merged_by_the_rows_that_it_is_given(name: str, tmp_path: Path) -> None:
    """Padding does not count; experts that nothing is sent to keep the mean, and the report has them."""
    model, states, vectors = made(name, tmp_path)
    before = model.config._experts_implementation
    found = regmean(vectors, model, data_of(vectors), shrink=0.9)
    assert model.config._experts_implementation == before
    model.set_experts_implementation("eager")  # grouped kernels know no float64
    products, tuned = [], []
    for task, data in zip(TASKS, data_of(vectors), strict=True):
        tuned.append({n: states[task][n].double() - states["base"][n].double() for n in vectors.names})
        with InPlace(model, vectors.names).changed(tuned[-1].__getitem__):
            products.append(grams(model, alone(data)))
    exact, away = 0, 0.0
    for stored in filter(of_experts, vectors.names):
        merged_change = dense(found.change(stored)).reshape(tuned[0][stored].shape)
        parts = [matrices(name, stored, change) for change in (merged_change, *(own[stored] for own in tuned))]
        for (merged, key), *changes in zip(*parts, strict=True):
            given = [product.get(key, torch.zeros(merged.shape[1], merged.shape[1]).double()) for product in products]
            seen = any(bool(product.any()) for product in given)
            deltas = [change for change, _ in changes]
            mean = torch.stack(deltas).mean(0)
            expected = solution(given, deltas, 0.9) if seen else mean
            assert torch.allclose(merged, expected, rtol=0, atol=64 * EPS * float(mean.abs().max())), (stored, key)
            listed = stored in found.report["layers_without_input"]
            assert (listed or f"{stored}[{key[1]}]" in found.report["layers_without_input"]) != seen
            exact, away = exact + seen, max(away, float((merged - mean).abs().max()))
    assert exact >= 4 and away > 0.01


def test_an_expert_without_rows_keeps_the_mean(tmp_path: Path) -> None:
    model, _, vectors = made("llama 4", tmp_path)
    data = [
        TaskData(task, [{"input_ids": torch.tensor([[3]]), "labels": torch.tensor([[3]])}], transformers_readout)
        for task in TASKS
    ]
    found = regmean(vectors, model, data)
    name = "model.layers.0.feed_forward.experts.down_proj"
    idle = [expert for expert in range(4) if f"{name}[{expert}]" in found.report["layers_without_input"]]
    assert 0 < len(idle) < 4
    mean = torch.stack([dense(delta) for delta in vectors.deltas(name)]).mean(0)
    for expert, (merged, plain) in enumerate(zip(dense(found.change(name)), mean, strict=True)):
        assert torch.allclose(merged, plain, atol=4 * EPS) == (expert in idle)
