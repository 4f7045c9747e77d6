"""The tasks as lm-eval has them: a YAML file and a file of documents each, made from prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .prompts import Prompts

PREFIX = "bench_llm_"


def task_name(name: str, split: str = "test") -> str:
    """What lm-eval calls it."""
    return f"{PREFIX}{name}" + ("" if split == "test" else f"_{split}")


def write_choices(folder: Path, prompts: Prompts, split: str) -> None:
    """Multiple choice among a task's words by their log-likelihood after the prompt."""
    docs = [{"prompt": prompt, "answer": answer} for prompt, answer in prompts.splits[split]]
    asked = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(prompts.words),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    _write(folder, task_name(prompts.name, split), docs, asked)


def write_generation(folder: Path, name: str, docs: Iterable[Mapping[str, str]], pattern: str, which: int) -> None:
    """Short greedy answers; the match number ``which`` of ``pattern`` in the first line has to be the answer."""
    asked = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
        "filter_list": [
            {
                "name": "none",
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": which, "fallback": ""},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
        ],
    }
    _write(folder, task_name(name), docs, asked)


def _write(folder: Path, name: str, docs: Iterable[Mapping[str, Any]], asked: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    content = {"task": name, **source, **asked, "metadata": {"version": 1.0}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
