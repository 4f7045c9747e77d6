"""Where weights lie, told by their names alone."""

from __future__ import annotations

import pytest

from tvbases_hf.models.positions import groups_of, in_order, positions_of

MODELS: dict[str, dict[str, str]] = {
    "one tower": {
        "model.embed_tokens.weight": "other",
        "model.layers.0.mlp.experts.7.w1.weight": "block 0",
        "model.layers.11.norm.weight": "block 11",
    },
    "clip": {
        "logit_scale": "other",
        "text_model.encoder.layers.0.mlp.fc1.weight": "text block 0",
        "vision_model.encoder.layers.11.mlp.fc1.weight": "vision block 11",
        "visual_projection.weight": "other",
    },
    "t5": {
        "shared.weight": "other",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "encoder block 0",
        "decoder.block.3.layer.0.SelfAttention.q.weight": "decoder block 3",
    },
    "whisper": {
        "model.encoder.conv1.weight": "other",
        "model.encoder.layers.1.fc1.weight": "encoder block 1",
        "model.decoder.layers.1.fc1.weight": "decoder block 1",
    },
    "qwen2 vl": {
        "visual.blocks.0.mlp.fc1.weight": "vision block 0",
        "visual.merger.mlp.0.weight": "other",
        "model.layers.0.mlp.up_proj.weight": "text block 0",
    },
    "llava": {
        "vision_tower.vision_model.encoder.layers.0.x": "vision block 0",
        "language_model.model.layers.2.x": "text block 2",
        "multi_modal_projector.linear_1.weight": "other",
    },
    "two of a kind": {
        "vision_model.transformer.layers.0.x": "vision_model transformer block 0",
        "vision_model.global_transformer.layers.0.x": "vision_model global_transformer block 0",
        "language_model.model.layers.0.x": "text block 0",
    },
    "diffusion transformer": {
        "transformer_blocks.0.attn.to_q.weight": "transformer block 0",
        "single_transformer_blocks.3.attn.to_q.weight": "single_transformer block 3",
    },
    "context is no text": {"context_encoder.layers.0.x": "encoder block 0", "decoder.layers.0.x": "decoder block 0"},
    "gpt2": {"wte.weight": "other", "h.0.attn.c_attn.weight": "block 0"},
    "stages": {"encoder.layers.0.blocks.1.x": "block 0", "encoder.layers.1.blocks.0.x": "block 1"},
}


@pytest.mark.parametrize("model", MODELS)
def test_a_group_is_a_block_of_one_tower(model: str) -> None:
    assert groups_of(MODELS[model]) == MODELS[model]


def test_a_position_counts_within_its_tower() -> None:
    names = [f"encoder.layers.{i}.x" for i in range(3)] + [f"decoder.layers.{i}.x" for i in range(5)] + ["embed.x"]
    found = positions_of(names)
    assert [found[name].share for name in names[:-1]] == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    assert "embed.x" not in found
    assert positions_of(["h.0.x"])["h.0.x"].share == 1  # an only layer, as in mergekit


def test_groups_are_ordered_by_tower_and_number() -> None:
    given = ["other", "vision block 10", "text block 2", "vision block 9", "text block 10"]
    assert list(in_order(dict.fromkeys(given, 0))) == [
        "text block 2", "text block 10", "vision block 9", "vision block 10", "other",
    ]  # fmt: skip
    assert list(in_order(dict.fromkeys(["block 10", "other", "block 9"], 0))) == ["block 9", "block 10", "other"]
