"""What the modules of a family are called in the code of its makers, which ComfyUI and kohya's trainers go by.

By original name, diffusers' modules; several are rows of one original matrix, in this order. # is a block's number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from .families import Modules, split_numbers, with_numbers

Names = Mapping[str, tuple[str, ...]]


def _block(original: str, diffusers: str, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Entries of one kind of block; spaces separate modules that are rows of one matrix."""
    return {f"{original}{own}": tuple(f"{diffusers}{part}" for part in parts.split()) for own, parts in names.items()}


def _double(proj: str, qkv: str, mlp: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """A block of Flux or HunyuanVideo for pictures and text side by side."""
    names = {
        f"img_attn{qkv}": "attn.to_q attn.to_k attn.to_v",
        f"txt_attn{qkv}": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        f"img_attn{proj}": "attn.to_out.0",
        f"txt_attn{proj}": "attn.to_add_out",
        **{f"img_mlp{own}": f"ff.{part}" for own, part in mlp.items()},
        **{f"txt_mlp{own}": f"ff_context.{part}" for own, part in mlp.items()},
    }
    return _block("double_blocks.#.", "transformer_blocks.#.", names)


def _plain(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return _block("", "", names)


SINGLE = {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
FLUX_1 = {
    **_double(".proj", ".qkv", {".0": "net.0.proj", ".2": "net.2"}),
    **_block("double_blocks.#.", "transformer_blocks.#.", {"img_mod.lin": "norm1.linear"}),
    **_block("double_blocks.#.", "transformer_blocks.#.", {"txt_mod.lin": "norm1_context.linear"}),
    **_block("single_blocks.#.", "single_transformer_blocks.#.", SINGLE | {"modulation.lin": "norm.linear"}),
    **_plain({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
    **_block("time_in.", "time_text_embed.timestep_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    **_block("guidance_in.", "time_text_embed.guidance_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    **_block("vector_in.", "time_text_embed.text_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
}
FLUX_2 = {
    **_double(".proj", ".qkv", {".0": "linear_in", ".2": "linear_out"}),
    **_block(
        "single_blocks.#.", "single_transformer_blocks.#.attn.", {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"}
    ),
    **_plain({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
    **_block("time_in.", "time_guidance_embed.timestep_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
}
HUNYUAN_VIDEO = {
    **_double("_proj", "_qkv", {".fc1": "net.0.proj", ".fc2": "net.2"}),
    **_block("double_blocks.#.", "transformer_blocks.#.", {"img_mod.linear": "norm1.linear"}),
    **_block("double_blocks.#.", "transformer_blocks.#.", {"txt_mod.linear": "norm1_context.linear"}),
    **_block("single_blocks.#.", "single_transformer_blocks.#.", SINGLE | {"modulation.linear": "norm.linear"}),
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
WAN = {
    **_block("blocks.#.self_attn.", "blocks.#.attn1.", ATTENTION),
    **_block("blocks.#.cross_attn.", "blocks.#.attn2.", ATTENTION | {"k_img": "add_k_proj", "v_img": "add_v_proj"}),
    **_block("blocks.#.ffn.", "blocks.#.ffn.", {"0": "net.0.proj", "2": "net.2"}),
    **_block("text_embedding.", "condition_embedder.text_embedder.", {"0": "linear_1", "2": "linear_2"}),
    **_block("time_embedding.", "condition_embedder.time_embedder.", {"0": "linear_1", "2": "linear_2"}),
    **_plain({"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out"}),
    **_block("img_emb.proj.", "condition_embedder.image_embedder.ff.net.", {"1": "0.proj", "3": "2"}),
}
LTX_BLOCK = (
    *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
EMBEDDER = "emb.timestep_embedder.linear_"
LTX = {
    **_block("transformer_blocks.#.", "transformer_blocks.#.", {part: part for part in LTX_BLOCK}),
    **_plain({"patchify_proj": "proj_in", "proj_out": "proj_out"}),
    **_block("caption_projection.", "caption_projection.", {"linear_1": "linear_1", "linear_2": "linear_2"}),
    **_block("adaln_single.", "time_embed.", {own: own for own in ("linear", f"{EMBEDDER}1", f"{EMBEDDER}2")}),
}
ORIGINAL: Mapping[str, Names] = {
    "Flux.1": FLUX_1,
    "Chroma": FLUX_1,
    "Flux.2": FLUX_2,
    "HunyuanVideo": HUNYUAN_VIDEO,
    "LTX-Video": LTX,
    "Wan": WAN,
    "ChronoEdit": WAN,
    "SkyReels 2": WAN,
}


@functools.cache
def original_modules(family: str) -> Modules | None:
    """To find the original names of a family, with dots or underscores; None where they are diffusers' own."""
    names = ORIGINAL.get(family)
    return None if names is None else Modules(dict.fromkeys(names, (1, 1)), any_depth=True)


def find_original(family: str, name: str) -> str | None:
    """diffusers' module of an original name, with dots or underscores; None also where it is several modules."""
    known = original_modules(family)
    found = known.find(name) if known is not None else None
    pattern, numbers = split_numbers(found or "")
    modules = ORIGINAL[family][pattern] if found else ()
    return with_numbers(modules[0], numbers) if len(modules) == 1 else None
