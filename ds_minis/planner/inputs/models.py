"""Dimensions of well-known models, as their `config.json` on the hub states them, so that planning works offline."""

from __future__ import annotations

from typing import Any


def _sizes(kind: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_GEMMA_2 = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    **_TIED,
}
_FALCON_MAMBA = {
    "model_type": "falcon_mamba",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 64,
    "state_size": 16,
    "time_step_rank": 256,
    "vocab_size": 65024,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _sizes("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-8B": _sizes("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-70B": _sizes("llama", 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.2-1B": _sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED),
    "meta-llama/Llama-3.2-3B": _sizes("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED),
    "meta-llama/Llama-2-7b-hf": _sizes("llama", 4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Llama-2-70b-hf": _sizes("llama", 8192, 28672, 80, 64, 8, 32000),
    "mistralai/Mistral-7B-v0.1": _sizes("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": _sizes("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "Qwen/Qwen2-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen3-0.6B": _sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "Qwen/Qwen3-32B": _sizes("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "google/gemma-2-9b": _sizes("gemma2", 3584, 14336, 42, 16, 8, 256000, **_GEMMA_2),
    "tiiuae/falcon-mamba-7b": _FALCON_MAMBA,
}
_OTHER_NAMES = {
    "meta-llama/meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama/meta-llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "mistralai/mistral-7b": "mistralai/Mistral-7B-v0.1",
    "meta-llama/llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "meta-llama/llama-2-70b": "meta-llama/Llama-2-70b-hf",
}


def known_name(model: str) -> str | None:
    """The name in `MODELS` that a hub id, or its last part, means; instruction-tuned models have their base's dimensions."""
    wanted = model.lower().removesuffix("-instruct").removesuffix("-chat-hf").removesuffix("-it").removesuffix("-base")
    if wanted in _OTHER_NAMES:
        return _OTHER_NAMES[wanted]
    names = {**{name.lower(): name for name in MODELS}, **_OTHER_NAMES}
    short = {full.rpartition("/")[2]: name for full, name in names.items()}
    return names.get(wanted) or (short.get(wanted) if "/" not in wanted else None)


def shipped_config(model: str) -> Any:
    """The transformers configuration of a model in `MODELS`; None for any other."""
    name = known_name(model)
    if name is None:
        return None
    from transformers import AutoConfig

    fields = dict(MODELS[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields, pad_token_id=None)
