"""Linearised fine-tuning: task vectors that live in the tangent space of theta_0 (Ortiz-Jimenez et al., 2023).

The answers are linear in the weights there, so the changes that task vectors make to them add up without interference.
`fine_tune(Linearised(model), data)` trains one, and `task_vector()` is what it learned.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


class Linearised(nn.Module):
    """f(theta_0) + J(theta_0) (theta - theta_0) for any model f, trained like one.

    theta is ``tuned``, the model given, whose weights training changes and whose state dict this module's is; theta_0
    is ``origin``, a frozen copy. One forward pass gives both terms (a Jacobian-vector product in forward mode, about
    the cost of two passes), without fused attention kernels, which have no forward derivative. Every tensor among the
    outputs is linearised, so take losses of the logits: a loss that the model computes itself would be linear too.
    Statistics of batch norms stay those of theta_0.
    """

    tuned: nn.Module
    origin: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tuned = model
        self.origin = copy.deepcopy(model).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, in the same structure; caches and other things that are no tensors become None."""
        weights = dict(self.origin.named_parameters())
        step = {name: weight - weights[name] for name, weight in self.tuned.named_parameters()}
        structure: list[tuple[list[Any], pytree.TreeSpec]] = []

        def answers(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
            leaves, spec = pytree.tree_flatten(functional_call(self.origin, values, args, kwargs))
            structure.append(([_plain(leaf) for leaf in leaves], spec))
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        with sdpa_kernel(SDPBackend.MATH):
            at_origin, change = jvp(answers, (weights,), (step,))[:2]
        kept, spec = structure[0]
        sums = iter([value + moved for value, moved in zip(at_origin, change, strict=True)])
        return pytree.tree_unflatten([next(sums) if leaf is Tensor else leaf for leaf in kept], spec)

    def task_vector(self) -> dict[str, Tensor]:
        """theta - theta_0 by the model's own names, as it is now."""
        weights = dict(self.origin.named_parameters())
        return {name: (weight - weights[name]).detach() for name, weight in self.tuned.named_parameters()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """theta, by the model's own names: task vectors, InPlace and the searches for alpha know these."""
        return self.tuned.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Set theta; theta_0 stays."""
        return self.tuned.load_state_dict(*args, **kwargs)

    @property
    def reparametrised(self) -> nn.Module:
        """The model asked with other weights, for readouts that look at its class."""
        return self.origin

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("origin"), name)


def _plain(leaf: Any) -> Any:
    """Tensor (the class) where one has to be put, numbers and words as they are, None for anything else."""
    if isinstance(leaf, Tensor):
        return Tensor
    return leaf if isinstance(leaf, (bool, int, float, str)) else None
