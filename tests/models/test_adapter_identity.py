"""An adapter read as deltas computes what PEFT computes, and one written again is the same adapter for PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.peft_models import (
    Case,
    load_adapter,
    load_base,
    make_adapter,
    make_base,
    outputs,
    relative,
    rewrite,
    with_deltas,
)

# s B A and the factors of DoRA are rounded to float32 once; six layers of a model amplify that a little.
TOLERANCE = 1e-5
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONVOLUTIONS = ["wide", "point", "line", "cube"]

CASES = {
    "lora": Case("llama", {"target_modules": ATTENTION}),
    "rslora": Case("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "alpha_pattern": Case("llama", {"target_modules": ATTENTION, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}}),
    "rank_pattern": Case(
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "k_proj": 5},
            "alpha_pattern": {"v_proj": 1},
        },
    ),
    "rank_pattern rslora": Case(
        "llama", {"target_modules": ATTENTION, "rank_pattern": {"k_proj": 5}, "use_rslora": True}
    ),
    "regular expression": Case("llama", {"target_modules": r".*\.(q|up)_proj", "exclude_modules": ["layers.1"]}),
    "all-linear": Case("llama", {"target_modules": "all-linear"}),
    "layers_to_transform": Case(
        "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "output": Case("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "fan_in_fan_out set by mistake": Case("llama", {"target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "mica": Case("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "orthogonal": Case("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4}),
    "dora": Case("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "dora rslora": Case("llama", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "dora biases": Case("bert", {"target_modules": ["query", "dense"], "use_dora": True, "bias": "lora_only"}),
    "conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "conv1d square": Case("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d with linear": Case(
        "gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}, {"tie_word_embeddings": False}
    ),
    "conv1d lora_bias": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "lora_bias": Case("bert", {"target_modules": ["query", "dense"], "lora_bias": True, "use_rslora": True}),
    "bias all": Case("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": Case("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "bias all lora_bias": Case("bert", {"target_modules": ["query"], "bias": "all", "lora_bias": True}),
    "classifier": Case("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "classifier of layers": Case("roberta", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "embeddings of an encoder": Case(
        "bert", {"target_modules": ["word_embeddings", "position_embeddings", "query"], "task_type": "SEQ_CLS"}
    ),
    "convolutions": Case("vision", {"target_modules": [*CONVOLUTIONS, "out"]}),
    "convolutions lora_bias": Case("vision", {"target_modules": ["wide", "line"], "lora_bias": True}),
    "convolutions dora": Case("vision", {"target_modules": [*CONVOLUTIONS, "out"], "use_dora": True}),
    "vision embedding": Case("vision", {"target_modules": ["table", "out"], "modules_to_save": ["point"]}),
}
# DoRA of a weight that is stored as [in, out] scales its columns: exact, but dense, so that it is not written again.
READ_ONLY = {
    "dora conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora embedding": Case("vision", {"target_modules": ["table", "out"], "use_dora": True}),
}


@dataclass(frozen=True)
class Made:
    """A case on disk, and the logits of PEFT's own loaded adapter."""

    case: Case
    base: Path
    directory: Path
    expected: Tensor

    def adapter(self) -> Adapter:
        return Adapter.open(self.directory, Checkpoint.open(self.base))


@pytest.fixture(scope="module", params=sorted({**CASES, **READ_ONLY}))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, root = (CASES | READ_ONLY)[request.param], tmp_path_factory.mktemp("case")
    base = make_base(root / "base", case)
    directory = make_adapter(root / "adapter", base, case)
    return Made(case, base, directory, outputs(load_adapter(base, case, directory)))


def test_base_plus_deltas_computes_what_peft_computes(made: Made) -> None:
    assert relative(outputs(load_base(made.base, made.case)), made.expected) > 1e-3
    assert relative(outputs(with_deltas(made.base, made.case, made.adapter())), made.expected) <= TOLERANCE


def test_an_adapter_written_again_is_the_same_to_peft(made: Made, tmp_path: Path) -> None:
    adapter, base = made.adapter(), Checkpoint.open(made.base)
    if made.case in READ_ONLY.values():
        with pytest.raises(ParameterError, match="not low-rank"):
            rewrite(tmp_path / "again", made.base, adapter)
        return
    again = rewrite(tmp_path / "again", made.base, adapter)
    assert relative(outputs(load_adapter(made.base, made.case, again)), made.expected) <= TOLERANCE
    reread = Adapter.open(again, base)
    assert set(reread.names) >= set(adapter.names)
    for name in reread.names:
        found, expected, weight = reread.delta(name), adapter.delta(name), base.read(name).double()
        assert found is not None
        difference = dense(found) - (torch.zeros(found.shape) if expected is None else dense(expected))
        assert float(difference.norm()) <= TOLERANCE * float(weight.norm())
