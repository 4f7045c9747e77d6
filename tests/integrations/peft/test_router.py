"""The router finds the tasks that were planted in the inputs, and mixed rows then run in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tvbases_hf import Vectors
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.errors import ParameterError
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.peft_models import Case, load_base, make_base

TASKS = ("math", "code", "chat")
WORDS = 4
"""Task i is asked about words i * WORDS ... alone."""


@contextmanager
def seen(model: nn.Module, layers: list[str], found: dict[str, Tensor]) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, given: found.__setitem__(name, given[0].detach().double())

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    yield
    for handle in hooks:
        handle.remove()


def sentences(task: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * task + seed)
    return WORDS * task + torch.randint(0, WORDS, (rows, 7), generator=generator)


def planted(root: Path, case: Case) -> dict[str, Path]:
    """An adapter of rank 4 per task, whose A holds the leading directions of what its words give every layer."""
    base, paths = make_base(root / "base", case), {}
    for index, task in enumerate(TASKS):
        plain: Any = load_base(base, case).eval()
        model = get_peft_model(plain, LoraConfig(**case.config))
        layers = [n for n, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
        found: dict[str, Tensor] = {}
        with seen(model.get_base_model(), layers, found), torch.no_grad(), model.disable_adapter():
            model(input_ids=sentences(index, 32, 0))
        for name, x in found.items():
            layer: Any = model.get_base_model().get_submodule(name)
            directions = torch.linalg.svd(x.reshape(-1, x.shape[-1]), full_matrices=False).Vh[:4]
            layer.lora_A["default"].weight.data = directions.float()
            out = layer.lora_B["default"].weight
            out.data = torch.randn(out.shape, generator=torch.Generator().manual_seed(index))
        model.save_pretrained(str(root / task))
        paths[task] = root / task
    return {"base": base, **paths}


CASES = {
    "llama": Case("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "gpt2": Case("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_rows_of_unknown_tasks_are_found_and_run_in_one_pass(name: str, tmp_path: Path) -> None:
    case, paths = CASES[name], planted(tmp_path, CASES[name])
    base = paths.pop("base")
    basis = LoraBasis.build(Vectors.open(base, paths), 3, method="ae")
    model: Any = load_base(base, case).eval()
    router = basis.router(model)
    truth = [0, 2, 1, 1, 0, 2]
    rows = torch.cat([sentences(task, 1, 1 + place) for place, task in enumerate(truth)])
    plain = router.residuals(model, input_ids=rows)
    attached = basis.attach(model, "math")
    assert torch.allclose(router.residuals(attached, input_ids=rows), plain, atol=1e-5), "whatever is selected"
    picked = router.pick(attached, input_ids=rows)
    assert picked == [TASKS[task] for task in truth]
    with torch.no_grad(), basis.mixed(attached, picked):
        together = attached(input_ids=rows).logits
    for row, task in enumerate(truth):
        basis.select(attached, TASKS[task])
        with torch.no_grad():
            assert torch.allclose(together[row], attached(input_ids=rows[row : row + 1]).logits[0], atol=1e-4)
    with pytest.raises(ParameterError, match=r"before basis\.attach"):
        basis.router(attached)


def test_residuals_are_those_of_the_formula_and_padding_does_not_count() -> None:
    """Of checkpoints, over a model with no configuration, against float64 projections."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = [{"0.weight": draw(10, 2) @ draw(2, 12), "2.weight": draw(5, 3) @ draw(3, 10)} for _ in range(3)]
    tuned = {f"t{i}": {n: t + change.get(n, 0) for n, t in state.items()} for i, change in enumerate(changes)}
    vectors = Vectors.of_models(
        Checkpoint.from_state_dict(state), {task: Checkpoint.from_state_dict(own) for task, own in tuned.items()}
    )
    basis = Basis.build(vectors, method="tsv", rank="energy:0.999999")
    x = draw(4, 6, 12)
    hidden = torch.tanh(model[0](x)).detach()
    wanted = torch.zeros(4, 3, dtype=torch.float64)
    for name, inputs, rank in (("0.weight", x, 2), ("2.weight", hidden, 3)):
        for task in range(3):
            right = torch.linalg.svd(changes[task][name].double()).Vh[:rank].T
            left = inputs.double() - inputs.double() @ right @ right.T
            wanted[:, task] += (left.square().sum(-1) / inputs.double().square().sum(-1)).mean(1) / 2
    router = basis.router(model, rank="energy:0.9999")
    assert torch.allclose(router.residuals(model, x).double(), wanted, atol=1e-5)
    assert router.pick(model, x) == [f"t{task}" for task in wanted.argmin(1).tolist()]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    found = router.residuals(Masked(), x, attention_mask=mask)
    assert torch.allclose(found, router.residuals(model, x[:, :4]), atol=1e-5)
    with pytest.raises(ParameterError, match="reached no layer"):
        router.residuals(nn.Linear(12, 2), x)


def test_tasks_that_change_no_layer_together_cannot_be_told_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {f"t{i}": {**state, f"{i}.weight": state[f"{i}.weight"] + 1} for i in range(2)}
    models = {task: Checkpoint.from_state_dict(own) for task, own in tuned.items()}
    basis = Basis.build(Vectors.of_models(Checkpoint.from_state_dict(state), models), method="tsv", rank="energy:0.9")
    with pytest.raises(ParameterError, match="no linear layer that all tasks change"):
        basis.router(model)
