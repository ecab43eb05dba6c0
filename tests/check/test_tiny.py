"""Configurations are shrunk in size and in nothing else."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    JambaConfig,
    Lfm2MoeConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    ZambaConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from ds_minis.check.tiny import FIRST_SPECIAL_ID, VOCAB, tiny_config, tiny_model, without_dropout


def num_params(model):
    return sum(param.numel() for param in model.parameters())


def test_sizes_shrink_and_behaviour_stays():
    config = Gemma2Config(final_logit_softcapping=7.0, attention_bias=True, hidden_activation="relu")
    before = copy.deepcopy(config.to_dict())
    tiny = tiny_config(config)
    assert config.to_dict() == before
    assert (tiny.hidden_size, tiny.num_hidden_layers, tiny.num_attention_heads, tiny.vocab_size) == (32, 2, 4, VOCAB)
    assert tiny.num_key_value_heads == 2  # fewer than heads, as before
    assert set(tiny.layer_types) == {"sliding_attention", "full_attention"}
    for kept in ("final_logit_softcapping", "attn_logit_softcapping", "attention_bias", "hidden_activation"):
        assert getattr(tiny, kept) == getattr(config, kept)
    assert tiny.tie_word_embeddings and tiny.query_pre_attn_scalar == config.query_pre_attn_scalar


@pytest.mark.parametrize(
    "config, classes",
    [
        (DeepseekV3Config(), {"DeepseekV3MLP", "DeepseekV3MoE"}),
        (JambaConfig(), {"JambaMambaMixer", "JambaAttention", "JambaMLP", "JambaSparseMoeBlock"}),
        (Qwen3NextConfig(), {"Qwen3NextGatedDeltaNet", "Qwen3NextAttention"}),
        (Lfm2MoeConfig(layer_types=["conv", "full_attention"] * 16), {"Lfm2MoeMLP", "Lfm2MoeSparseMoeBlock"}),
        (RecurrentGemmaConfig(), {"RecurrentGemmaRecurrentBlock", "RecurrentGemmaAttention"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else None,
)
def test_every_kind_of_layer_stays(config, classes):
    tiny = tiny_config(config)
    model = tiny_model(AutoModelForCausalLM.from_config, tiny)
    assert classes <= {type(module).__name__ for module in model.modules()}
    assert tiny.num_hidden_layers <= 4 and num_params(model) < 1_000_000


def test_layers_that_share_their_attention_stay_in_twos():
    tiny = tiny_config(ZambaConfig())
    assert tiny.layers_block_type.count("hybrid") == 2
    tiny_model(AutoModelForCausalLM.from_config, tiny)


def test_nested_configurations_shrink_and_special_ids_stay_apart():
    config = Gemma3Config()
    tiny = tiny_config(config)
    assert tiny.text_config.hidden_size == 32 and tiny.vision_config.num_hidden_layers == 2
    ids = [tiny.image_token_id, tiny.boi_token_index, tiny.eoi_token_index]
    assert len(set(ids)) == 3 and all(FIRST_SPECIAL_ID <= i < VOCAB for i in ids)
    assert num_params(tiny_model(AutoModelForImageTextToText.from_config, tiny)) < 1_000_000


def test_lists_of_rope_get_as_short_as_the_heads():
    scaled = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
    tiny = tiny_config(Phi3Config(rope_parameters=scaled | {"original_max_position_embeddings": 4096}))
    assert tiny.rope_parameters["rope_type"] == "longrope" and tiny.rope_parameters["long_factor"] == [1.5] * 4
    tiny_model(AutoModelForCausalLM.from_config, tiny)


def test_layers_with_fields_of_their_own_keep_them():
    config = LlamaConfig(
        num_hidden_layers=4, per_layer_config={2: {"intermediate_size": 999}, 3: {"intermediate_size": 20}}
    )
    tiny = tiny_config(config)
    assert [layer.intermediate_size for layer in tiny.per_layer_config] == [48, 48, 20]


def test_unknown_field_of_the_hidden_size_is_a_hidden_size():
    class Unusual(PreTrainedConfig):
        model_type = "unusual"

    tiny = tiny_config(Unusual(hidden_size=768, breadth_of_gate=768, number_of_things=700))
    assert tiny.breadth_of_gate == 32 and tiny.number_of_things == 700


def test_dropout_is_kept_unless_asked():
    config = GPT2Config(resid_pdrop=0.25)
    assert tiny_config(config).resid_pdrop == 0.25
    quiet = tiny_config(config, dropout=0.0)
    assert (quiet.resid_pdrop, quiet.attn_pdrop, quiet.embd_pdrop) == (0, 0, 0)
    model = without_dropout(tiny_model(AutoModelForCausalLM.from_config, tiny_config(config)))
    assert model.training and all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_quantization_goes():
    config = LlamaConfig()
    config.quantization_config = {"quant_method": "fp8"}
    assert not hasattr(tiny_config(config), "quantization_config") and config.quantization_config


def test_model_is_the_same_again_and_the_random_state_stays():
    config = tiny_config(LlamaConfig())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (tiny_model(AutoModelForCausalLM.from_config, config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight) and not torch.equal(
        one.lm_head.weight, other.lm_head.weight
    )
    assert all(param.dtype == torch.float32 and param.min() != param.max() for param in one.parameters())


def test_large_model_is_refused():
    config = LlamaConfig(hidden_size=512, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"LlamaConfig still gives 33,\d+,\d+ parameters, at most 30,000,000"):
        tiny_model(AutoModelForCausalLM.from_config, config)
