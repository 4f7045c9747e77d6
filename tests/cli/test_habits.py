"""Options of mergekit's that fingers know, given to `tvbases merge`."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from commands.command_line import refused, root, tvbases
from oracles.merge_oracle import merge_config, write_config
from zoo.hf_models import Family, read_state

pytest_plugins = ["zoo.hf_fixtures"]
HABITS = [
    "--copy-tokenizer",
    "--lazy-unpickle",
    "--low-cpu-memory",
    "--lora-merge-cache",
    "cache",
    "--trust-remote-code",
]


def test_what_is_not_needed_is_said_and_changes_nothing(pair: Family) -> None:
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    plain, habits = root(pair) / "plain", root(pair) / "habits"
    assert tvbases("merge", file, plain, "--quiet").err == ""
    done = tvbases("merge", file, habits, *HABITS)
    assert done.code == 0 and done.err.count("note: --") == 4 and "--lora-merge-cache is not needed: " in done.err
    one, other = read_state(plain), read_state(habits)
    assert all(one[name].equal(other[name]) for name in one)
    assert (habits / "tokenizer.json").is_file() and not (root(pair) / "cache").exists()


def test_cuda_is_the_device(pair: Family) -> None:
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    with patch("tvbases_mergekit.merge", side_effect=AssertionError) as run, pytest.raises(AssertionError):
        tvbases("merge", file, root(pair) / "out", "--cuda")
    assert run.call_args.kwargs["device"] == "cuda"


def test_a_size_of_shards_is_answered_with_what_to_use(pair: Family) -> None:
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    message = refused(root(pair), "merge", file, root(pair) / "out", "--out-shard-size", "1B")
    assert "tvbases mergekit-yaml" in message
