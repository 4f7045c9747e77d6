"""Tasks of a basis take each other's place in a model that PEFT serves compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tvbases_hf import LoraBasis
from tvbases_hf.basis import libraries
from zoo.adapter_families import random_adapters
from zoo.peft_models import edit_config


def test_tasks_of_equal_rank_keep_the_compiled_graph_and_another_scale_does_not(tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter
    from transformers import AutoModelForCausalLM

    adapters = random_adapters(tmp_path / "adapters", tasks=("math", "code"))
    libraries.add(tmp_path / "library", adapters.base, adapters.tasks, budget=0.9)
    library = LoraBasis.from_pretrained(tmp_path / "library")
    for folder, task in (("math", "math"), ("code", "code"), ("twice", "code")):
        library.adapter(task, rank=4, equal_rank=True).save_pretrained(tmp_path / folder)
    edit_config(tmp_path / "twice", lora_alpha=8)
    ids = torch.arange(12).reshape(2, 6)

    def served(folder: str) -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(adapters.base)
        return PeftModel.from_pretrained(model, str(tmp_path / folder)).eval()

    model = served("math")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        before = compiled(ids).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            hotswap_adapter(model, str(tmp_path / "code"), adapter_name="default")
            after = compiled(ids).logits
            assert torch.equal(after, served("code")(ids).logits) and not torch.allclose(after, before, atol=1e-3)
            hotswap_adapter(model, str(tmp_path / "twice"), adapter_name="default")  # the scale is a part of the graph
            with pytest.raises(RuntimeError, match="recompile"):
                compiled(ids)
    torch.compiler.reset()
