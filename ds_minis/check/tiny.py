"""Shrinks the configuration of any transformers model until a random instance of it fits anywhere, and builds it.

Sizes change, behaviour does not: kinds of layers, experts, soft caps, scales, biases, norms, activation, tied weights and
rope stay as configured. Nothing here knows a model: fields are told apart by their names and values.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, HEAD, VOCAB, POSITIONS, WINDOW = 32, 4, 8, 160, 256, 48
FIRST_TEXT_ID, FIRST_SPECIAL_ID = 8, 100  # text is made of the ids from the one to the other
MAX_PARAMETERS = 30_000_000
_FEW_LAYERS = 2

_DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate|jitter")
_TOKEN_ID = re.compile(
    r"(_token_ids?|_token_index|_token_idx|_(start|end|newline|patch)_id|^image_token|_suppress_tokens)$"
)
_TEXT_ID = re.compile(r"^_?(pad|bos|eos|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id$")
_NUM_LAYERS = re.compile(
    r"^num_layers_per_stack$|^(\w*_)?(num_)?(n_|hidden_|encoder_|decoder_|global_|lstm_|add_)?(layers?|blocks|depths?)$"
)
_PERIOD = re.compile(
    r"(period|interval|frequency|_step|every_n_layers|window_pattern|layer_group_size|att?n_res_block)$"
)

# Name of a field -> its size; the first pattern that is found decides. None: the field is not a size.
_SIZES: list[tuple[re.Pattern, int | None]] = [
    (re.compile(pattern), size)
    for pattern, size in [
        (r"ratio|mult$|multiple|multipl|factor|kernel|stride|num_channels|^(in|out|audio)_channels|type_vocab", None),
        (
            r"scal|reduction|dilation|merge_|merger|temporal|query_pre|base$|chunk_size_(feed|lm)|padding|conv_width",
            None,
        ),
        (r"codebook_size|byte_group_vocab", 64),
        (r"vocab|num_embeddings$", VOCAB),
        (
            r"position_embedding|positions$|n_ctx|seq_len$|context_length|position_embedding_size|model_max_length",
            POSITIONS,
        ),
        (r"window|local_attention$", WINDOW),
        (r"chunk_size$|chunk_length$|block_size", 8),
        (r"^(num|n)_(patches|image_tokens)$", 16),
        (r"image_size|input_size|crop_size|resolution", 16),
        (r"patch_size", 4),
        (r"mel_bins|feature_size|input_feat_size", 16),
        (r"image_seq|mm_tokens|num_query_tokens|latent_query|n_latents|num_latents|soft_tokens", 2),
        (r"zero_expert_num", 2),
        (r"(shared|num_share)_?experts?$|n_shared|num_shared", 1),
        (r"(num|n|routed|local)_experts$|n_routed", 4),
        (r"experts_per_tok|topk$|top_k|moe_k$|_top_k_|topk_experts", 2),
        (r"topk_group", 1),
        (r"n_group$|expert_group", 2),
        (r"index_topk$|rel_extent", 16),
        (r"n_heads|num_heads|attention_heads|n_head$|_heads$|heads_per_layer", HEADS),
        (r"index_head_dim|qk_head_dim", 16),
        (r"head_?dim|head_size|dim_head|kv_channels|d_kv|d_head|d_rel$|d_state|state_size", HEAD),
        (r"q_lora_rank|kv_lora_rank|projection_rank", 16),
        (r"rank$|per_layer_input|ple_dim", HEAD),
        (
            r"(moe|expert).*(intermediate|hidden)|(intermediate|hidden).*(moe|expert)|share_expert_dim|shared_intermediate",
            24,
        ),
        (r"intermediate|ffn|feed_forward|d_ff|dff|d_inner|mlp_dim|dim_ff|projector_hidden|projection_hidden", 48),
        (r"rotary_dim", HEAD // 2),
        (r"(hidden|embed|embedding|emb|proj|projection|output|input|in|out|model)_(size|dim|dims|sizes)$", HIDDEN),
        (r"hidden_size|hidden_dim|d_model|n_embd|embed_dim|lru_width|width|_channels$|output_dim", HIDDEN),
    ]
]


def tiny_config(config: Any, *, dropout: float | None = None) -> Any:
    """A shrunk copy of a transformers configuration, nested configurations included.

    Args:
        config: an instance of any `PreTrainedConfig`.
        dropout: replaces every dropout rate; None keeps them.
    """
    tiny = copy.deepcopy(config)
    _Shrinker(dropout).shrink(tiny)
    return tiny


def tiny_model(model_class: Callable[[Any], nn.Module], config: Any, *, seed: int = 0) -> nn.Module:
    """A model with random weights, on the CPU in float32 and in training mode; torch's random state stays as it is.

    Norm weights, biases and whatever else starts as a constant are moved off it: at zero and one a missing gradient would
    not be seen, and the norm of a zero has gradients that dwarf all others. No weight is large: the decay rates of
    linear attention are exponents, and large ones lose so many digits that no two float32 runs would agree.

    Args:
        model_class: a model's class, or whatever else makes a model of a configuration.
        config: a small configuration, see `tiny_config`.

    Raises:
        ValueError: the configuration is still a large model's.
    """
    with torch.random.fork_rng(devices=[]):
        _require_small(model_class, config)
        torch.manual_seed(seed)
        model = model_class(config).float().train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                if param.numel() and (param.dim() <= 1 or param.min() == param.max()):
                    param.add_(torch.randn(param.shape, generator=generator) * 0.05)
                param.clamp_(-1.2, 1.2)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, in place, with every `nn.Dropout` off (rates that no field of the configuration sets)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def _require_small(model_class, config) -> None:
    try:
        with torch.device("meta"):
            count = sum(param.numel() for param in model_class(config).parameters())
    except Exception:  # a model that computes with values while it is built; what it has to say comes without "meta"
        return
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"the shrunk configuration {type(config).__name__} still gives {count:,} parameters, at most "
            f"{MAX_PARAMETERS:,} are allowed: some field sets a size by a name that ds_minis.check.tiny does not know; "
            "set that field by hand"
        )


class _Shrinker:
    """What one configuration and its nested ones share: how special token ids were renumbered, and dropout."""

    def __init__(self, dropout: float | None):
        self.dropout = dropout
        self.new_ids: dict[int, int] = {}

    def shrink(self, config: Any) -> None:
        old = {name: value for name, value in vars(config).items() if not _is_config(value)}
        real_names = getattr(config, "attribute_map", {})
        common = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        hidden, heads, num_layers = (old.get(real_names.get(name, name)) for name in common)
        per_layer = getattr(old.get("_heterogeneity_spec"), "per_layer_overrides", {})
        layers = _Layers(old, num_layers, per_layer) if isinstance(num_layers, int) else None
        for name, value in old.items():
            if isinstance(value, bool) or value is None or name in _NO_SIZES:
                continue
            new = self.shrink_field(name, value, layers, hidden, heads)
            if new is not value:
                setattr(config, name, new)
        _settle(config, old)
        if per_layer:  # set last: what every layer has now stops to be an override
            config.per_layer_config = {
                new: self.shrink_override(per_layer[i], hidden, heads)
                for new, i in enumerate(layers.kept)
                if i in per_layer
            }
        for value in list(vars(config).values()):
            if _is_config(value):
                self.shrink(value)

    def shrink_field(self, name: str, value: Any, layers: _Layers | None, hidden: Any, heads: Any) -> Any:
        if isinstance(value, int | float) and _DROPOUT.search(name):
            return value if self.dropout is None else type(value)(self.dropout)
        if _TOKEN_ID.search(name) or name == "image_token":
            return self.token_id(name, value)
        if isinstance(value, dict):
            return _shrink_rope(value) if name.startswith("rope") else value
        if isinstance(value, list | tuple):
            if layers is not None:
                value = layers.shrink_list(value, name)
            sizes = [_shrink_size(name, v, hidden, heads) if type(v) is int else v for v in value]
            return type(value)(sizes) if sizes != list(value) else value
        if type(value) is int:
            if layers is not None and value == layers.old_count and _NUM_LAYERS.search(name):
                return len(layers.kept)
            return _shrink_size(name, value, hidden, heads)
        if name in ("initializer_range", "init_std") and isinstance(value, float):
            return 0.06  # at the usual 0.02 a model this narrow hardly depends on its inner weights
        return value

    def shrink_override(self, fields: dict[str, Any], hidden: Any, heads: Any) -> dict[str, Any]:
        """What one layer has instead of the configuration's own fields."""
        heads = fields.get("num_attention_heads", heads)
        return {name: self.shrink_field(name, value, None, hidden, heads) for name, value in fields.items()}

    def token_id(self, name: str, value: Any) -> Any:
        """Brings an id into range: the same ids stay the same, and those of images and sound leave the text's."""
        if isinstance(value, list | tuple):
            return type(value)(self.token_id(name, v) for v in value)
        if type(value) is not int or value < 0 or (_TEXT_ID.search(name) and value < FIRST_TEXT_ID):
            return value
        return self.new_ids.setdefault(value, FIRST_SPECIAL_ID + len(self.new_ids))


class _Layers:
    """Which layers of a stack stay: two, or more where that is what it takes to have every kind of layer."""

    def __init__(self, fields: dict[str, Any], count: int, per_layer: dict[int, dict]):
        self.old_count = count
        self.lists = [v for v in fields.values() if isinstance(v, list | tuple)]
        self.lists.append([str(per_layer.get(i)) for i in range(count)])
        self.lists += [v * count for name, v in fields.items() if self.is_pattern(v, name)]
        self.kept = self._of_every_kind(count)
        if fields.get("num_kv_shared_layers"):  # the last layers use keys and values of earlier ones of their kind
            self.kept += self.kept

    def _of_every_kind(self, count: int) -> list[int]:
        kept, once, seen = [], set(), set()
        for i in range(count):
            kinds = set()
            for number, values in enumerate(self.lists):
                if len(values) >= self.old_count > _FEW_LAYERS and not _is_increasing(values):
                    kinds.add((number, str(values[i])))
                elif self.is_indices(values):
                    kinds.add((number, i in values))
            if kinds - seen:
                kept.append(i)
            seen |= {kind for kind in kinds if kind[1] != "hybrid" or kind in once}
            once |= kinds
        for i in range(count):
            if len(kept) < _FEW_LAYERS and i not in kept:
                kept.append(i)
        return sorted(kept)

    def is_per_layer(self, values: list | tuple) -> bool:
        return len(values) == self.old_count > _FEW_LAYERS

    def is_pattern(self, values: Any, name: str) -> bool:
        """Kinds of layers that repeat over the stack."""
        return isinstance(values, list | tuple) and name.endswith("block_types") and len(values) < self.old_count

    def is_indices(self, values: list | tuple) -> bool:
        return _is_increasing(values) and self.old_count > max(_FEW_LAYERS, values[-1]) and values[0] >= 0

    def shrink_list(self, values: list | tuple, name: str) -> list | tuple:
        """A list with an entry per layer, or of layers' indices; any other list as it is."""
        if self.is_per_layer(values):
            return type(values)(range(len(self.kept)) if _is_increasing(values) else (values[i] for i in self.kept))
        if self.is_pattern(values, name):
            return type(values)(values[i % len(values)] for i in self.kept)
        if self.is_indices(values) and re.search(r"ind(ex|ic)|idx|layer", name):
            return type(values)(new for new, i in enumerate(self.kept) if i in values)
        return values


_NO_SIZES = {"id2label", "label2id", "transformers_version", "architectures", "dtype", "_heterogeneity_spec"}


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _is_increasing(values: list | tuple) -> bool:
    return bool(values) and all(type(v) is int for v in values) and sorted(set(values)) == list(values)


def _shrink_size(name: str, value: int, hidden: Any, heads: Any) -> int:
    """The new size of a field; what is small already, and what is no size, stays."""
    if value <= 1 or isinstance(value, bool):
        return value
    if name.startswith("first_k_dense") or name == "num_dense_layers":
        return 1
    if _NUM_LAYERS.search(name):
        return min(value, _FEW_LAYERS)
    if _PERIOD.search(name):
        return min(value, 2)
    if name.endswith("_offset"):
        return 1 if "vocab" not in name else value
    if re.search(r"(key_value|kv)_heads|kv_n_heads|num_query_groups|key_heads", name):
        return HEADS if value == heads else min(value, 2)
    for pattern, size in _SIZES:
        if pattern.search(name):
            if name == "attention_hidden_size" and isinstance(hidden, int) and value % hidden == 0:
                return HIDDEN * (value // hidden)
            return value if size is None else min(value, size)
    return HIDDEN if value == hidden and value > 64 else value


def _shrink_rope(parameters: dict, head: int = HEAD) -> dict:
    """Rope parameters for heads of `head` elements: what has an entry per pair of elements gets as few."""
    pairs = int(head * (parameters.get("partial_rotary_factor") or 1.0)) // 2
    new = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            value = _shrink_rope(value, head)
        elif name.endswith("_factor") and isinstance(value, list):
            value = value[:pairs]
        elif name == "mrope_section":
            parts = [math.floor(pairs * part / sum(value)) for part in value]
            value = [*parts[:-1], pairs - sum(parts[:-1])]
        elif name == "original_max_position_embeddings":
            value = min(value, POSITIONS // 2)
        new[name] = value
    return new


def _settle(config: Any, old: dict[str, Any]) -> None:
    """What follows from several fields at once, and what only real hardware or real weights have."""
    if isinstance(old.get("use_mamba_kernels"), bool):
        config.use_mamba_kernels = False
    if "quantization_config" in old:
        del config.quantization_config
    if old.get("num_kv_shared_layers"):
        config.num_kv_shared_layers = config.num_hidden_layers // 2
    if old.get("num_experts_per_tok") == 1:
        config.num_experts_per_tok = 1
    expand = old.get("mamba_expand", old.get("expand"))
    for name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"):
        if expand and isinstance(old.get(name), int):  # the mixer's width is that of all its heads
            setattr(config, name, int(expand * HIDDEN) // HEAD)
    if isinstance(old.get("mamba_d_ssm"), int):
        config.mamba_d_ssm = int(expand * HIDDEN)
    if isinstance(old.get("qk_rope_head_dim"), int):
        _settle_latent_attention(config, old)
    config._attn_implementation = "eager"


def _settle_latent_attention(config: Any, old: dict[str, Any]) -> None:
    """Heads with a part that is rotated and one that is not: their sum, and the rotated fraction of it."""
    head_dim, nope, rope = (old.get(name) for name in ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim"))
    if head_dim == (nope or 0) + rope:
        config.head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    parameters = config.rope_parameters if old.get("rope_parameters") else {}
    for rope_of_kind in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope_of_kind.get("partial_rotary_factor") is not None:
            rope_of_kind["partial_rotary_factor"] = config.qk_rope_head_dim / config.head_dim
