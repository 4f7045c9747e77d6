"""Attacks on basis directories: what basis_config.json says, and the numbers that it describes."""

from __future__ import annotations

import torch

from attacks.kinds import INFINITY, NAN, attack, edit, rewrite
from attacks.workplace import Workplace


@attack("basis", "decoder.0.0: input should be a finite number")
def nan_in_a_decoder(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c["decoder"][0].__setitem__(0, NAN))


@attack("basis", "1 tasks are named twice (first: math)")
def two_tasks_of_one_name(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c.update(tasks=["math", "math"]))


@attack("basis", "tasks.0: input should be a valid string, got None")
def a_task_without_a_name(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c.update(tasks=[None, "math"]))


@attack("basis", "encoder has 1 entries, and 2 are needed")
def a_task_that_is_in_no_basis(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c["encoder"].pop())


@attack("basis", "encoder.0.0: input should be a valid number, got True")
def a_truth_value_for_a_number(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c["encoder"][0].__setitem__(0, True))


@attack("basis", "is older than this library reads")
def a_format_before_the_first(place: Workplace) -> None:
    edit(place / "basis/basis_config.json", lambda c: c.update(format_version=0))


@attack("basis", "holds 128 NaN or infinite numbers")
def infinite_vectors(place: Workplace) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(place / "basis/basis.safetensors", lambda s: s[name].fill_(INFINITY))


@attack("basis", "the files of the basis do not belong together")
def vectors_of_another_shape(place: Workplace) -> None:
    name = "model.norm.weight"
    rewrite(place / "basis/basis.safetensors", lambda s: s.update({name: torch.zeros(1, 5)}))


@attack("tsv-basis", "does not hold the 2 vectors")
def factors_of_one_dimension(place: Workplace) -> None:
    name = "model.layers.0.self_attn.q_proj.weight.left"
    rewrite(place / "tsv-basis/basis.safetensors", lambda s: s.update({name: torch.zeros(4)}))


@attack("lora-basis", "does not hold the vectors")
def a_rank_that_the_factors_do_not_have(place: Workplace) -> None:
    edit(
        place / "lora-basis/basis_config.json",
        lambda c: next(iter(c["adapters"]["modules"].values()))["ranks"].__setitem__(0, 99),
    )


@attack("lora-basis", "adapters.alpha: input should be a finite number")
def an_infinite_scale(place: Workplace) -> None:
    edit(place / "lora-basis/basis_config.json", lambda c: c["adapters"].update(alpha=INFINITY))


@attack("online", "options.online.weights.0: input should be a finite number")
def nan_in_the_state_of_an_online_basis(place: Workplace) -> None:
    edit(place / "online/basis_config.json", lambda c: c["options"]["online"]["weights"].__setitem__(0, NAN))


@attack("online", "NaN or infinite numbers")
def nan_in_the_vectors_of_an_online_basis(place: Workplace) -> None:
    """The good directory must stay."""
    rewrite(place / "online/basis.safetensors", lambda s: s["model.norm.weight"].fill_(NAN))


@attack("online", "holds 16 NaN or infinite numbers of 16")
def nan_in_what_is_added_to_an_online_basis(place: Workplace) -> None:
    rewrite(place / "chat/model.safetensors", lambda s: s["model.norm.weight"].fill_(NAN))


@attack("online", "1 of 21 weights of the base have no vectors (first: lm_head.weight)")
def a_weight_that_is_lost_from_an_online_basis(place: Workplace) -> None:
    rewrite(place / "online/basis.safetensors", lambda s: s.pop("lm_head.weight"))


@attack("online", "the files of the basis do not belong together")
def a_weight_that_an_online_basis_has_by_another_name(place: Workplace) -> None:
    rewrite(place / "online/basis.safetensors", lambda s: s.update({"x": s.pop("lm_head.weight")}))
