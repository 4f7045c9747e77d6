"""Fixtures that last for the session: a test module names this one in ``pytest_plugins``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from zoo.hf_models import Family, make_bert, make_family, make_llama


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama-base"))


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert-base"))


@pytest.fixture(scope="session")
def llama(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), llama_base, ["math", "code", "chat", "law"], seed=3)


@pytest.fixture(scope="session")
def llama_sharded(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("llama-sharded")
    return make_family(root, llama_base, ["math", "code", "chat", "law"], seed=3, sharded=True)


@pytest.fixture(scope="session")
def llama_bf16(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("llama-bf16")
    return make_family(root, llama_base, ["math", "code", "chat", "law"], seed=4, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def bert(bert_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("bert"), bert_base, ["sst", "nli", "qa"], seed=5)


@pytest.fixture(scope="session")
def bert_sharded(bert_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("bert-sharded"), bert_base, ["sst", "nli", "qa"], seed=5, sharded=True)


@pytest.fixture
def place(llama: Family, tmp_path: Path) -> Family:
    """Copies of a base and four fine-tunes in ``tmp_path / "models"``, to be damaged."""
    shutil.copytree(llama.base.parent, tmp_path / "models")
    root = tmp_path / "models"
    return Family(root / "base", {task: root / path.name for task, path in llama.tasks.items()})


@pytest.fixture
def pair(place: Family) -> Family:
    """The same with two fine-tunes."""
    for task in ("chat", "law"):
        shutil.rmtree(place.tasks.pop(task))
    return place
