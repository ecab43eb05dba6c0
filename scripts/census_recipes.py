"""What single architectures need to run at all at a tiny size, beyond what `ds_minis.check.tiny` does by rule. Census only.

Most are classes whose defaults are incomplete (a published configuration sets the field), or models that cannot be called
with text alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_minis.check.exactness import BATCH_SIZE, LENGTH, text_batch
from ds_minis.check.tiny import FIRST_SPECIAL_ID, VOCAB


def _nothing(config: Any) -> None:
    pass


@dataclass(frozen=True)
class Recipe:
    """Fields the class is made with, changes before and after shrinking, and inputs of another kind than text."""

    fields: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Any], None] = _nothing
    after: Callable[[Any], None] = _nothing
    batch: Callable[[Any], dict] | None = None


def _set(**values) -> Callable[[Any], None]:
    """Sets fields after shrinking; `text_config__head_dim` is a field of a nested configuration."""

    def change(config):
        for name, value in values.items():
            *path, last = name.split("__")
            target = config
            for part in path:
                target = getattr(target, part)
            setattr(target, last, value)

    return change


def _no_timm(config: Any) -> None:
    """Puts a vision tower without weights where a model would need the timm package: the census gives text only."""
    from transformers import AutoModel

    from_config = AutoModel.from_config

    def without_timm(inner, **kwargs):
        if inner.model_type not in ("timm_wrapper", "gemma3n_vision"):
            return from_config(inner, **kwargs)
        tower = torch.nn.Module()
        tower.config = inner
        return tower

    AutoModel.from_config = without_timm  # in a process of its own, see census.py


def _pixels(*shape: int, **others: Callable[[], torch.Tensor]) -> Callable[[Any], dict]:
    """Text and `pixel_values` of the given shape (without the batch)."""

    def batch(model):
        pixels = torch.randn(BATCH_SIZE, *shape, generator=torch.Generator().manual_seed(2))
        return {**text_batch(model), "pixel_values": pixels} | {name: make() for name, make in others.items()}

    return batch


def _queries(*shape: int) -> Callable[[Any], dict]:
    """Pixels, with the image token in front of the text once for every query of the Q-former."""

    def batch(model):
        inputs, count = _pixels(*shape)(model), model.config.num_query_tokens
        inputs["input_ids"][:, :count], inputs["labels"][:, :count] = _IMAGE, -100
        if "Instruct" in type(model).__name__:
            inputs["qformer_input_ids"] = torch.full((BATCH_SIZE, 4), 9)
        return inputs

    return batch


def _kosmos2(model) -> dict:
    inputs = _pixels(3, 16, 16)(model)
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, : model.config.latent_query_num] = 1
    return {**inputs, "image_embeds_position_mask": mask}


def _codebooks(model) -> dict:
    """Audio codes: one row of ids per codebook."""
    count, generator = model.config.num_codebooks, torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (BATCH_SIZE * count, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(5, 60, (BATCH_SIZE, LENGTH, count), generator=generator)}


def _patches(model) -> dict:
    vision, inputs = model.config.vision_config, text_batch(model)
    patches = torch.randn(BATCH_SIZE, 6, 2 + vision.patch_embed_hidden_size, generator=torch.Generator().manual_seed(2))
    patches[:, :, :2] = torch.arange(6)[:, None].float()  # row and column
    return {"flattened_patches": patches, "labels": inputs["labels"]}


def _mm_types(model) -> dict:
    inputs = text_batch(model)
    return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _only_pixels(model) -> dict:
    inputs = _pixels(3, 16, 16)(model)
    return {name: inputs[name] for name in ("pixel_values", "labels")}


def _mrope(*section: int, **fields) -> Recipe:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return Recipe(fields={"text_config": {"rope_parameters": rope, **fields}})


_IMAGE = FIRST_SPECIAL_ID
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
    **{"indexer_budget": 16, "indexer_compress_ratio": 4},
}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_HEAD = Recipe(fields={"head_dim": 128})
_ASSISTANT = Recipe(fields={"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}})
_TIMM = Recipe(before=_no_timm)
_VOCABULARY = {"<image>": 110, "<|visual token 000001|>": 111, "<|visual token 000002|>": 112, "<|extra_200|>": 113}
_IMAGE_NAMES = {"<image>": 110, **{f"IMGIMG{letter}Z": 111 + i for i, letter in enumerate("ABC")}}

RECIPES: dict[str, Recipe] = {
    **{
        f"encoder-decoder:{name}": Recipe(after=_set(decoder_start_token_id=0))
        for name in ("t5", "longt5", "switch_transformers")
    },
    # fields that the class leaves open, and the published configurations set
    "bamba": Recipe(fields={"attn_layer_indices": [9, 18, 27], "z_loss_coefficient": 0.1}),
    "cohere_compass": Recipe(fields={"text_config": {"rope_parameters": {"full_attention": _ROPE}}}),
    "cohere_compass_text": Recipe(fields={"rope_parameters": {"full_attention": _ROPE}}),
    "dbrx": Recipe(
        fields={"ffn_config": {"hidden_size": 2048}, "attn_config": {"clip_qkv": 8.0}, "rope_parameters": _ROPE},
        after=_set(attn_config__rope_theta=10000.0),
    ),
    "deepseek_ocr2": Recipe(
        fields={"text_config": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 31}}
    ),
    "deepseek_v2": Recipe(fields={"num_experts_per_tok": 6, "first_k_dense_replace": 1}),
    "diffusion_gemma": Recipe(
        fields={"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}}
    ),
    "doge": Recipe(fields={"is_moe": True, "num_experts": 4}),
    "dots1": Recipe(fields={"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6}),
    "gemma4": Recipe(fields={"text_config": _GEMMA4_EXPERTS}),
    "gemma4_text": Recipe(fields=_GEMMA4_EXPERTS),
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "granite4_vision": Recipe(fields={"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"}),
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2": Recipe(fields={"layer_types": ["conv", "full_attention"] * 16}),
    "lfm2_moe": Recipe(fields={"layer_types": ["conv", "full_attention"] * 16}),
    "ministral": _HEAD,
    "nemotron": Recipe(fields={"num_key_value_heads": 8}),
    "perception_lm": Recipe(before=_no_timm, fields={"vision_config": {"model_args": {"embed_dim": 32}}}),
    "qwen4_exp": Recipe(fields={"text_config": _INDEXER}),
    "qwen4_exp_text": Recipe(fields=_INDEXER),
    "step3p7": Recipe(fields={"text_config": {"sliding_window": 512}}),
    "xmod": Recipe(fields={"default_language": "en_XX"}),
    "glm46v": _mrope(8, 12, 12),
    "glm4v": _mrope(8, 12, 12),
    "glm4v_moe": _mrope(8, 12, 12),
    "glm_ocr": _mrope(8, 12, 12),
    "glmga": _mrope(8, 12, 12),
    "paddleocr_vl": _mrope(16, 24, 24),
    "qwen2_5_omni_thinker": _mrope(16, 24, 24),
    "qwen2_5_vl": _mrope(16, 24, 24),
    "qwen2_vl": _mrope(16, 24, 24),
    "ernie4_5_vl_moe": _mrope(22, 22, 20),
    "hunyuan_vl": _mrope(16, 16, 16, 16, head_dim=128),
    # sizes that depend on each other in ways no name tells
    "blt": Recipe(
        after=_set(
            **{f"{part}_config__hidden_size_global": 64 for part in ("encoder", "decoder")},
            **{"global_config__hidden_size": 64, "global_config__head_dim": 16},
            patcher_config__vocab_size=VOCAB + 1,  # its logits, of bytes, find the patches and are none of the model's
        )
    ),
    "inkling_mm_model": Recipe(after=_set(vision_config__num_hidden_layers=5)),  # fewer need the scipy package
    "muse_spark": Recipe(
        after=_set(
            audio_config__num_hidden_layers=4,
            audio_config__hidden_sizes=(8, 8, 16, 16),
            audio_config__depths=(1, 1, 1, 1),
        )
    ),
    "reformer": Recipe(
        after=_set(axial_pos_shape=(3, 8), axial_pos_embds_dim=(16, 16), num_buckets=4, hash_seed=0),
        batch=lambda model: text_batch(model, length=24),
    ),
    # vision towers that need a package of their own
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    # names of image tokens
    "chameleon": Recipe(fields={"vocabulary_map": _IMAGE_NAMES}),
    "image-text:emu3": Recipe(fields={"vocabulary_map": _VOCABULARY}),
    # other inputs than text
    "blip": Recipe(batch=_pixels(3, 16, 16)),
    "blip-2": Recipe(after=_set(image_token_index=_IMAGE), batch=_queries(3, 16, 16)),
    "git": Recipe(batch=_pixels(3, 16, 16)),
    "instructblip": Recipe(after=_set(image_token_index=_IMAGE), batch=_queries(3, 16, 16)),
    "instructblipvideo": Recipe(after=_set(video_token_index=_IMAGE), batch=_queries(4, 3, 16, 16)),
    "idefics": Recipe(
        batch=_pixels(
            *(1, 3, 16, 16),
            image_attention_mask=lambda: torch.ones(BATCH_SIZE, LENGTH, 1, dtype=torch.long),
            attention_mask=lambda: torch.ones(BATCH_SIZE, LENGTH, dtype=torch.long),
        )
    ),
    "kosmos-2": Recipe(batch=_kosmos2),
    "molmo2": Recipe(batch=_mm_types),
    "musicgen": Recipe(batch=_codebooks),
    "musicgen_melody": Recipe(batch=_codebooks),
    "pp_formulanet": Recipe(batch=_pixels(3, 16, 16)),
    "pix2struct": Recipe(batch=_patches),
    "vision-encoder-decoder": Recipe(after=_set(pad_token_id=0, decoder_start_token_id=1), batch=_only_pixels),
    "udop": Recipe(
        after=_set(decoder_start_token_id=0),
        batch=lambda model: {**text_batch(model), "bbox": torch.rand(BATCH_SIZE, LENGTH, 4)},
    ),
}
