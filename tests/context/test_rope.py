"""RoPE that is changed for long sequences: against formulas written out in float64 here."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_minis import convert_to_mini_sequence
from ds_minis.context import rope
from ds_minis.context.rope import change_rope, check_rope, exact_rope, rope_error, rope_theta_of, with_rope

LAST = 1_048_575
THETA = 3.6e9
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 8192,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
}


def config_of(kind="llama", **parameters):
    sizes = SIZES | ({"rope_parameters": {"rope_theta": 5e5} | parameters} if parameters else {})
    return AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def rotary_of(model):
    return model.get_decoder().rotary_emb


def llama3_frequencies(frequencies):
    wavelengths = 2 * math.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    between = ((1 - smooth) / 8 + smooth) * frequencies
    return np.where(wavelengths > 8192, frequencies / 8, np.where(wavelengths < 8192 / 4, frequencies, between))


def yarn_frequencies(frequencies, theta, dim=32):
    def pair_of(rotations):
        return dim * math.log(2048 / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return frequencies / 4 * ramp + frequencies * (1 - ramp)


def right(kind, theta, position, dim=32):
    """Cosines and sines in float64, each pair once: (dim / 2,)."""
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scale = 1.0
    if kind == "linear":
        frequencies = frequencies / 4
    elif kind == "llama3":
        frequencies = llama3_frequencies(frequencies)
    elif kind == "yarn":
        frequencies, scale = yarn_frequencies(frequencies, theta), 0.1 * math.log(4) + 1
    angles = position * frequencies
    return scale * np.cos(angles), scale * np.sin(angles)


def of_model(model, position, dtype=torch.float32, **which):
    """The model's cosines and sines at a position, each (rotary dimensions,) in float64."""
    cos, sin = rotary_of(model)(torch.zeros(1, 1, 64, dtype=dtype), torch.tensor([[position]]), **which)
    assert cos.dtype == sin.dtype == dtype
    return cos[0, 0].double().numpy(), sin[0, 0].double().numpy()


@pytest.mark.parametrize("position", [0, 1, 4095, LAST])
@pytest.mark.parametrize("kind", SCALED)
def test_cosines_and_sines_are_those_of_float64_at_every_position(kind, position):
    config = with_rope(config_of(**SCALED[kind]), theta=THETA, length=LAST + 1)
    model = exact_rope(model_of(config))
    for got, expected in zip(of_model(model, position), right(kind, THETA, position), strict=True):
        assert np.abs(got - np.tile(expected, 2)).max() < 1e-5
    assert rope_error(model, LAST + 1) < 1e-6


def test_without_it_float32_is_wrong_at_a_million_tokens():
    """What the module is for: nothing was cast here."""
    model = model_of(with_rope(config_of(rope_type="default"), theta=THETA, length=LAST + 1))
    got, expected = of_model(model, LAST)[0], np.tile(right("default", THETA, LAST)[0], 2)
    assert 1e-3 < np.abs(got - expected).max() == pytest.approx(rope_error(model, LAST + 1), rel=0.5)


def cast_to(model, dtype):
    return model.to(dtype)


def cast_all_tensors(model, dtype):  # as FSDP1 casts buffers, which passes by Module.to
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype)
    return model


@pytest.mark.parametrize("cast", [cast_to, cast_all_tensors, lambda model, dtype: model.bfloat16()])
def test_no_cast_of_the_model_reaches_the_angles(cast):
    config = with_rope(config_of(rope_type="default"), theta=THETA, length=LAST + 1)
    model = cast(exact_rope(model_of(config)), torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    check_rope(model, LAST + 1)
    got = of_model(model, LAST, torch.bfloat16)[0]
    assert np.abs(got - np.tile(right("default", THETA, LAST)[0], 2)).max() < 2**-8
    if cast is not cast_all_tensors:
        assert rotary_of(model).inv_freq.dtype == torch.float32


def test_a_cast_without_it_is_noticed_with_the_dtype_and_the_size_of_the_error():
    model = model_of(with_rope(config_of(rope_type="default"), theta=THETA, length=LAST + 1)).bfloat16()
    with pytest.raises(
        ValueError, match=r"model.rotary_emb: .* position 1,048,575 are wrong by 1\.\d.*bfloat16.*exact_rope"
    ):
        check_rope(model, LAST + 1)


def test_a_configuration_that_was_changed_after_the_model_was_made_is_refused():
    model = model_of(config_of(rope_type="default"))
    model.config.rope_parameters["rope_theta"] = THETA
    with pytest.raises(ValueError, match="inv_freq is not what the model's configuration says.*with_rope.*change_rope"):
        exact_rope(model)


@pytest.mark.parametrize("kind", SCALED)
def test_a_model_that_is_there_is_changed_as_one_that_is_loaded(kind, tmp_path):
    config = config_of(**SCALED[kind])
    there = change_rope(model_of(config), theta=THETA, length=65_536)
    loaded = exact_rope(model_of(with_rope(config_of(**SCALED[kind]), theta=THETA, length=65_536)))
    assert there.config.to_dict() == loaded.config.to_dict()
    for got, expected in zip(of_model(there, 65_535), of_model(loaded, 65_535), strict=True):
        assert (got == expected).all()
    again = change_rope(there, theta=2 * THETA, length=131_072)
    assert np.abs(of_model(again, LAST)[0] - np.tile(right(kind, 2 * THETA, LAST)[0], 2)).max() < 1e-5
    again.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert rope_theta_of(saved.config) == 2 * THETA and saved.config.max_position_embeddings == 131_072
    assert torch.allclose(rotary_of(saved).inv_freq, rotary_of(again).inv_freq, rtol=1e-5, atol=0)


def test_a_scaling_keeps_the_lengths_that_it_was_made_for():
    """They default to max_position_embeddings, which grows."""
    config = config_of(**LLAMA3)
    long = with_rope(config, theta=THETA, length=LAST + 1)
    assert long.rope_parameters == SCALED["llama3"] | {"rope_theta": THETA}
    assert long.max_position_embeddings == LAST + 1
    assert config.rope_parameters["rope_theta"] == 5e5 and config.max_position_embeddings == 8192


def test_a_scaling_that_is_derived_from_the_length_stays_that_of_the_old_length():
    config = config_of(rope_type="yarn", factor=2.0, original_max_position_embeddings=2048)
    config.rope_parameters["factor"] = None  # 8192 / 2048
    assert with_rope(config, theta=THETA, length=LAST + 1).rope_parameters["factor"] == 4.0
    config = config_of(**LLAMA3)
    del config.rope_parameters["original_max_position_embeddings"]
    assert with_rope(config, theta=THETA, length=LAST + 1).rope_parameters == SCALED["llama3"] | {"rope_theta": THETA}


@pytest.mark.parametrize("kind", ["stablelm", "glm"])
def test_partial_rotary_embeddings_keep_their_part(kind):
    config = config_of(kind, rope_type="default", partial_rotary_factor=0.5)
    model = exact_rope(model_of(with_rope(config, theta=THETA, length=LAST + 1)))
    expected = right("default", THETA, LAST, dim=16)[0]
    got = of_model(model, LAST)[0]
    assert got.shape == (16,)
    assert np.abs(got - np.tile(expected, 2)).max() < 1e-5


def test_layers_with_a_window_keep_their_base():
    types = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = AutoConfig.for_model("gemma3_text", **SIZES | types)
    before = config.rope_parameters["sliding_attention"]["rope_theta"]
    model = exact_rope(model_of(with_rope(config, theta=THETA, length=LAST + 1)))
    for layer_type, theta in (("sliding_attention", before), ("full_attention", THETA)):
        got = of_model(model, LAST, layer_type=layer_type)[0]
        assert np.abs(got - np.tile(right("default", theta, LAST)[0], 2)).max() < 1e-5


def test_models_without_a_base_and_frequencies_of_each_length_are_refused():
    with pytest.raises(ValueError, match="a gpt2 model has no rope_theta in its configuration"):
        with_rope(AutoConfig.for_model("gpt2"), theta=THETA, length=64)
    with pytest.raises(ValueError, match="type 'dynamic' has frequencies that depend on more than its base.*llama3"):
        with_rope(config_of(rope_type="dynamic", factor=2.0), theta=THETA, length=64)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary embedding"):
        exact_rope(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_exact_too(duplicate):
    model = duplicate(exact_rope(model_of(with_rope(config_of(rope_type="default"), theta=THETA, length=LAST + 1))))
    check_rope(model.bfloat16(), LAST + 1)


class CastsByMethod(type(rotary_of(model_of(config_of(rope_type="default"))))):
    """Rotary embeddings that ask for float32 in another way than transformers' own do."""

    @torch.no_grad()
    def forward(self, x, position_ids):
        angles = torch.cat([position_ids[..., None].float() * self.inv_freq.float()] * 2, dim=-1)
        return angles.cos().type_as(x), angles.sin().type_as(x)


def test_whatever_way_a_models_code_asks_for_float32_it_gets_float64():
    model = model_of(with_rope(config_of(rope_type="default"), theta=THETA, length=LAST + 1))
    rotary_of(model).__class__ = CastsByMethod
    exact_rope(model)
    assert np.abs(of_model(model, LAST)[0] - np.tile(right("default", THETA, LAST)[0], 2)).max() < 1e-5


def test_short_sequences_train_as_without_it_and_mini_sequences_are_exact_with_it():
    """Loss and every gradient: plain RoPE, exact RoPE, and exact RoPE in mini-sequences."""
    ids = torch.randint(3, 64, (2, 37), generator=torch.Generator().manual_seed(1))
    plain = model_of(config_of(rope_type="default"))
    exact = exact_rope(copy.deepcopy(plain))
    tiled = convert_to_mini_sequence(copy.deepcopy(exact), {"chunk_size": 16})
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (plain, exact, tiled)]
    for loss in losses:
        loss.backward()
        assert loss.item() == pytest.approx(losses[0].item(), abs=1e-5)
    for model in (exact, tiled):
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(parameter.grad, other.grad, atol=1e-5), name


def test_no_submodule_and_no_saved_tensor_is_added():
    model = model_of(config_of(rope_type="default"))
    modules, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    exact_rope(model)
    assert [name for name, _ in model.named_modules()] == modules and list(model.state_dict()) == keys
    assert "angles in float64" in repr(model) and type(rotary_of(model)).__name__ == "LlamaRotaryEmbedding"
    assert rope.plain_class(rotary_of(model)) in type(rotary_of(model)).__mro__


def test_positions_that_a_model_has_are_not_taken_away():
    changed = with_rope(config_of(rope_type="default"), theta=THETA, length=64)
    assert changed.max_position_embeddings == SIZES["max_position_embeddings"]


def test_a_base_beside_the_parameters_is_changed_too():
    config = config_of(rope_type="default")
    config.rope_theta = 5e5
    assert with_rope(config, theta=THETA, length=LAST + 1).rope_theta == THETA


def test_a_small_error_is_refused_too():
    """What float32 alone does at 16K tokens, where nothing was cast."""
    model = model_of(with_rope(config_of(rope_type="default"), theta=THETA, length=16_384))
    assert 2e-5 < rope_error(model, 16_384) < 2e-3
    with pytest.raises(ValueError, match="position 16,383 are wrong by .*float32"):
        check_rope(model, 16_384)
    check_rope(model, 16_384, tolerance=2e-3)
