"""What a merge of a plain YAML loads, and that what it does not load is found when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from zoo.adapter_zoo import config_of, make_zoo

HEAVY = ("accelerate", "networkx", "peft", "torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils")
CODE = f"""
import sys
from tvbases_mergekit import merge
merge(sys.argv[1], sys.argv[2])
loaded = set({HEAVY}) & set(sys.modules)
assert not loaded, loaded
from tvbases_hf import Vectors, gram_matrix
gram_matrix(Vectors.open(sys.argv[3], {{"task": sys.argv[4]}}))
assert not set({HEAVY}) & set(sys.modules)

import mergekit.common, mergekit.graph
from mergekit.architecture import infer_architecture_info
assert mergekit.common.peft.PeftModel.__module__ == "peft.peft_model"
assert mergekit.graph.networkx.DiGraph.__module__ == "networkx.classes.digraph"
try:
    infer_architecture_info((), None, None)
except IndexError:
    pass  # mergekit's own: no models
import transformers
assert transformers.PreTrainedModel.__module__ == "transformers.modeling_utils"
"""


def test_a_merge_loads_neither_model_code_nor_what_only_other_merges_use(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    config = config_of(zoo, "task_arithmetic", [0.5] * len(zoo.full), models=zoo.full)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    given = [tmp_path / "merge.yml", tmp_path / "out", zoo.base, next(iter(zoo.full.values()))]
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, given)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
