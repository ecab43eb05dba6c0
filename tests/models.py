"""Tiny models of the tested families, batches for them, and the comparison with the unconverted model."""

from __future__ import annotations

import copy

import torch
from transformers import (
    BartConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.tiling.modules.swap import whole_fallback_reason

VOCAB_SIZE = 131
# Chunks of the tests to which their sizes do not matter: neither divides the length of a batch, nor the other.
CHUNKS = {"chunk_size": 10, "loss_chunk_size": 7}
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-tied-bias": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=2.0, sliding_window=8),
    "phi3": lambda: Phi3Config(**_SIZES, resid_pdrop=0.0),
}
MOE_CONFIGS = {
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, output_router_logits=True),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        output_router_logits=True,
    ),
}
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Others whose layers are not like the ones above: parallel attention, sinks, norms of another kind, rotation of a part.
LAYER_CONFIGS = {
    "phi": lambda: PhiConfig(**_SIZES, resid_pdrop=0.0, partial_rotary_factor=0.5),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "cohere": lambda: CohereConfig(**_SIZES),
    "gpt_oss": lambda: GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=8, sliding_window_pattern=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_SPARSE, head_dim=8),
    "mixtral without router outputs": lambda: MixtralConfig(**_SIZES, num_local_experts=4),
}
# Layers that are not tiled as a whole: an attention of their own (in all cases, in some), two attentions.
UNTILED_CONFIGS = {
    "bloom": lambda: BloomConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(**_SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, reorder_and_upcast_attn=True),
    "bart": lambda: BartConfig(
        **_SIZES, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0
    ),
}
LORA_TARGETS = "all-linear"
# What runs over chunks in one training forward of the tiny Llama, in each scope. The linear layer is the LM head.
LLAMA_CALLS = {
    "layer": {"LlamaDecoderLayer": 2, "LlamaRMSNorm": 1, "Linear": 1},
    "tokens": {"LlamaMLP": 2, "LlamaRMSNorm": 5, "Linear": 1},
}


def build(family: str, *, seed: int = 0, attention: str = "eager", **settings) -> PreTrainedModel:
    """A model of a family; `settings` are for its configuration."""
    torch.manual_seed(seed)
    config = (CONFIGS | MOE_CONFIGS | LAYER_CONFIGS | UNTILED_CONFIGS)[family]()
    config.update(settings)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).train()
    model.config.use_cache = False
    with torch.no_grad():  # norms and biases that start at one and zero would hide a missing gradient
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn_like(param) * 0.1)
    return model


def add_lora(model: PreTrainedModel, **settings):
    """LoRA with a second factor that is not zero, so that every adapter weight gets a gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": LORA_TARGETS, **settings}))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(0, 0.1)
    return model


def with_dropout(model: PreTrainedModel, probability: float) -> PreTrainedModel:
    """Dropout behind the activation of every MLP, inside of what is tiled."""
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(probability))
    return model


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its linear layers in 4-bit NF4, stored as float32 numbers as FSDP and ZeRO-3 need it."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    model = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        quantization_config=config,
        dtype=torch.float32,
        attn_implementation=model.config._attn_implementation,
    )
    model.config.use_cache = False
    return model.train()


def checkpointed(model, use_reentrant: bool = False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    return model


def batch(length: int, *, batch_size: int = 2, seed: int = 0, prompt: int = 0, padding: int = 0) -> dict:
    """Token ids, labels (prompt and padding masked) and the attention mask; the last row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    if padding:
        input_ids[-1, -padding:], attention_mask[-1, -padding:], labels[-1, -padding:] = 0, 0, -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def loss_and_grads(model, inputs: dict, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def count_layers(model) -> int:
    """Decoder layers that ran as a whole over chunks, in every call."""
    layers = [m for m in model.modules() if isinstance(m, TiledLayer)]
    return sum(bool(m.mini_sequence_analyses) and not whole_fallback_reason(m) for m in layers)


def assert_same_training(model, reference, inputs: dict, *, rtol: float = 1e-5, **kwargs) -> None:
    """Loss and every gradient agree; gradients relative to the largest of the parameter (floor: 1% of the model's)."""
    loss, grads = loss_and_grads(model, inputs, **kwargs)
    expected_loss, expected = loss_and_grads(reference, inputs, **kwargs)
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    assert_same_tensors(grads, expected, rtol=rtol)


def assert_same_tensors(tensors: dict, expected: dict, *, rtol: float = 1e-5) -> None:
    for name, error in relative_errors(tensors, expected).items():
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def relative_errors(tensors: dict, expected: dict) -> dict[str, float]:
    """Each tensor's largest error, relative to its largest entry (floor: 1% of the largest of all tensors)."""
    assert tensors.keys() == expected.keys() and expected
    largest = max(t.abs().max().item() for t in expected.values())
    errors = {}
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 0.01 * largest)
        errors[name] = (tensors[name] - tensor).abs().max().item() / scale
    return errors


def twins(family: str, **kwargs) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its copy."""
    model = build(family, **kwargs)
    return model, copy.deepcopy(model)


def with_class(model, cls):
    """The model, its decoder layers made instances of `cls`."""
    for layer in model.model.layers:
        layer.__class__ = cls
    return model
