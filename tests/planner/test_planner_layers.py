"""How many layers of which models are traced, and what is refused: the parameters planned are those of the whole model."""

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2_5_VLConfig,
    Qwen3NextConfig,
    T5Config,
)  # fmt: skip

from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.compare import compare, overflow
from ds_minis.planner.plan.planner import Planner
from ds_minis.planner.step import recorder
from ds_minis.planner.step.anatomy import depths_to_trace
from ds_minis.planner.step.trace import CannotTrace, RunsTokenByToken, Way, build, examine, trace

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("kinds", "depths"),
    [
        ("a", (2, 3)),
        ("a" * 32, (2, 3)),
        ("ddd" + "m" * 58, (5, 6)),
        ("aaab" * 4, (4, 8)),
        ("ab" * 5, (2, 4)),
        ("d" + "ab" * 5, (3, 5)),
        ("ab" * 5 + "a", (3, 5)),
        ("abcab", None),
        ("aabb", None),
    ],
)
def test_depths_are_whole_periods_behind_the_layers_that_come_once(kinds, depths):
    assert depths_to_trace(kinds) == depths
    if depths is not None and len(kinds) > 2:
        few, more = depths
        assert kinds[:few][-2:] == kinds[:more][-2:] == kinds[-2:]
        assert (len(kinds) - few) % (more - few) == 0


MODELS = {
    "dense layers first": DeepseekV3Config(
        **SIZES | {"num_hidden_layers": 9, "num_key_value_heads": 4}, **EXPERTS, first_k_dense_replace=3, n_routed_experts=8,
        n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
    "every other with experts": Llama4TextConfig(
        **SIZES, num_hidden_layers=8, head_dim=16, interleave_moe_layer_step=2, num_local_experts=4,
        intermediate_size_mlp=96,
    ),
    "every fourth attends": Qwen3NextConfig(
        **SIZES, num_hidden_layers=8, head_dim=16, num_experts=4, **EXPERTS, shared_expert_intermediate_size=32,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "learned positions": GPT2Config(n_embd=64, n_head=4, n_layer=4, n_positions=128, vocab_size=500),
    "positions counted by the mask": OPTConfig(
        hidden_size=64, ffn_dim=96, num_attention_heads=4, num_hidden_layers=4, vocab_size=500, word_embed_proj_dim=64,
        max_position_embeddings=128,
    ),
    "one layer": LlamaConfig(**SIZES, num_hidden_layers=1),
}  # fmt: skip


@pytest.mark.parametrize(("name", "train"), [*((name, "lora") for name in MODELS), ("dense layers first", "full")])
def test_planned_parameters_are_those_of_the_whole_model(name, train):
    config = MODELS[name]
    planner, setup = Planner(config), Setup(settings=None, train=train, lora_rank=4)
    counted = planner.profile(planner.way(setup)).parameters
    model = build(config, Way(None, lora_rank=4 if train == "lora" else 0))
    assert counted["all"] == sum(p.numel() for p in model.parameters())
    assert counted["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_text_model_inside_of_another_is_planned():
    text = {**SIZES, "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2})
    assert Planner(config).estimate(Setup(settings=None), 512).device > 0


def test_no_length_beyond_the_positions_that_were_learned(tmp_path):
    config = MODELS["learned positions"]
    plan = compare(config, Setup(settings=None), model="m", gpu_memory=80, cache=tmp_path)
    assert {row.longest for row in plan.rows} == {128}
    with pytest.raises(CannotTrace, match="128 positions, 129"):
        compare(config, Setup(settings=None), model="m", gpu_memory=80, tokens=129, cache=tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(), "an encoder and a decoder"),
        (BartConfig(), "an encoder and a decoder"),
        (FalconConfig(num_hidden_layers=2, vocab_size=500), "not called by transformers' interface"),
        (Llama4TextConfig(**SIZES, num_hidden_layers=3, head_dim=16, moe_layers=[0, 1]), "do not repeat"),
    ],
    ids=["T5", "BART", "Falcon", "irregular"],
)
def test_what_cannot_be_planned_is_refused_with_its_reason(config, said):
    with pytest.raises(CannotTrace, match=said):
        Planner(config).estimate(Setup(settings=None), 512)


def test_layers_that_run_token_by_token_are_refused_once_and_soon(monkeypatch):
    monkeypatch.setattr(recorder, "MOST_OPERATIONS", 3000)
    config = JambaConfig(
        **SIZES, num_hidden_layers=4, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
        use_mamba_kernels=False,
    )  # fmt: skip
    planner, runs = Planner(config), []
    monkeypatch.setattr("ds_minis.planner.plan.planner.trace", lambda *args: runs.append(args) or trace(*args))
    for settings in (None, {}):
        with pytest.raises(RunsTokenByToken, match="JambaForCausalLM runs token by token"):
            planner.estimate(Setup(settings=settings, train="lora"), 512)
    assert len(runs) == 1


def test_layers_that_do_not_attend_cannot_share_a_sequence():
    assert "mix tokens otherwise" in examine(MODELS["every fourth attends"]).undivided
    planner, setup = Planner(MODELS["one layer"]), Setup(engine="ddp", gpus=2, settings={"sequence_parallel": 2})
    assert planner.estimate(setup, 512).device > 0
    planner.profile(planner.way(setup)).undivided = "they mix tokens"
    with pytest.raises(CannotTrace, match="cannot share its sequences: they mix tokens"):
        planner.estimate(setup, 512)


def test_heads_that_a_norm_joins_are_attended_to_at_once():
    """As in training: the norm of OLMoE's queries is over all heads."""
    config = OlmoeConfig(**SIZES, num_hidden_layers=3, num_experts=4, num_experts_per_tok=2)
    with_groups, without = (Planner(config).estimate(Setup(settings=s), 4096) for s in ({"head_groups": "auto"}, {}))
    assert with_groups.device == without.device


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_offloading_needs_no_more_however_few_layers(depth):
    planner = Planner(LlamaConfig(**SIZES, num_hidden_layers=depth))
    for train in ("full", "lora"):
        kept, offloaded = (planner.estimate(Setup(settings=s, train=train), 65536) for s in ({}, {"offload": "cpu"}))
        assert offloaded.device <= kept.device


def test_a_parameter_of_more_than_2_to_the_31_elements_is_named():
    config = MixtralConfig(**SIZES | {"hidden_size": 4096, "intermediate_size": 16384}, num_local_experts=64)
    config.num_hidden_layers = 3
    planner = Planner(config)
    said = overflow(planner, Setup(settings=None), 512)
    assert "the parameter model.layers.0.mlp.experts" in said and "8,589,934,592 elements, more than 2^31" in said


def test_a_bert_says_why_it_cannot_run_so_many_tokens():
    with pytest.raises(CannotTrace, match="cannot be run on tensors without values"):
        Planner(BertConfig(num_hidden_layers=3)).estimate(Setup(settings=None), 512)


def test_linear_layers_with_adapters_give_their_weight():
    model = build(LlamaConfig(**SIZES, num_hidden_layers=1), Way(None, lora_rank=2))
    projection = model.model.layers[0].self_attn.q_proj
    assert isinstance(projection.weight, torch.nn.Parameter) and projection.bias is None
