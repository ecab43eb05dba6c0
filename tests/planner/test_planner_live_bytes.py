"""What is planned against what a real step on the CPU holds: every storage, counted by another counter than the planner's."""

import contextlib
import io
import warnings

import pytest
import torch
from live_bytes import LiveBytes
from planner_models import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from ds_minis import convert_to_mini_sequence
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner
from ds_minis.planner.step.adapters import add_lora
from ds_minis.planner.step.stubs import register

CONFIG = LlamaConfig(**SIZES)
TOKENS = 3500


def planned(config, setup: Setup, tokens: int) -> float:
    """Bytes of activations and gradients at the peak."""
    planner = Planner(config)
    profile = planner.profile(planner.way(setup))
    offloaded = bool((setup.settings or {}).get("offload"))
    peak = profile.peak(planner.lengths(setup, tokens, profile), lambda where, sofar, layer: sofar, offloaded=offloaded)
    return peak.activations + peak.held


def real(config, setup: Setup, tokens: int, attention: str) -> float:
    """The same, of the second step of a real model: analyses are made in the first."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).train()
    if setup.train == "lora":
        add_lora(model, setup.lora_rank)
    if setup.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setup.settings is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(model, dict(setup.settings))

    def step():
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    apart = [*model.parameters(), *model.buffers()]
    with LiveBytes(apart=apart) as live:
        step()
    # The blocks of host memory are on the same device here.
    host = sum(entry.nbytes for entry in live.at_peak if entry.dtype == torch.uint8)
    return live.peak - host


WAYS = {
    "plain": {"settings": None, "checkpointing": False},
    "checkpointing": {"settings": None},
    "mlp": {"settings": {"scope": "mlp"}},
    "tokens": {"settings": {"scope": "tokens"}},
    "layer": {"settings": {}},
    "layer in small chunks": {"settings": {"chunk_size": 300}},
    "a number of mini-sequences": {"settings": {"num_mini_sequences": 7}},
    "head groups": {"settings": {"head_groups": "auto"}},
    "no tiled loss": {"settings": {"loss": False}},
    "LoRA": {"settings": {}, "train": "lora"},
    "LoRA, checkpointing": {"settings": None, "train": "lora"},
}


@pytest.mark.parametrize("name", WAYS)
def test_planned_bytes_are_those_of_a_real_step(name):
    setup = Setup(dtype="float32", **WAYS[name])
    expected = real(CONFIG, setup, TOKENS, register())
    assert planned(CONFIG, setup, TOKENS) == pytest.approx(expected, rel=0.03)


def test_kept_attention_with_torchs_own_attention():
    setup = Setup(dtype="float32", settings={"keep": "attention"})
    assert planned(CONFIG, setup, 2200) == pytest.approx(real(CONFIG, setup, 2200, "sdpa"), rel=0.03)


def test_another_architecture_at_another_depth():
    config = Qwen3Config(**SIZES | {"num_hidden_layers": 7, "head_dim": 32, "tie_word_embeddings": True})
    setup = Setup(dtype="float32")
    assert planned(config, setup, 2500) == pytest.approx(real(config, setup, 2500, register()), rel=0.03)


def test_offloaded_inputs_leave_the_device():
    """On a CPU all is one device: layer inputs that were copied out are counted apart by their blocks' dtype."""
    setup = Setup(dtype="float32", settings={"offload": "cpu"})
    expected = real(CONFIG, setup, TOKENS, register())
    assert planned(CONFIG, setup, TOKENS) == pytest.approx(expected, rel=0.06)
    assert expected < 0.9 * planned(CONFIG, Setup(dtype="float32"), TOKENS)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family):
    sizes = SIZES | {"num_hidden_layers": 3, "intermediate_size": 128}
    if family == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = Qwen3MoeConfig(**sizes, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    setup = Setup(dtype="float32", settings={"chunk_size": 300})
    assert planned(config, setup, 900) == pytest.approx(real(config, setup, 900, register()), rel=0.03)


def test_counted_products_are_those_of_the_layers_and_of_attention():
    """In forward and backward: 3 products for each linear layer, 2 + 5 causal ones for each head's attention."""
    config = LlamaConfig(**SIZES)
    planner = Planner(config)
    linear, attention = planner.profile(planner.way(Setup(settings=None, checkpointing=False))).flops
    width, heads, kv_heads = 128 // 8, 8, 2
    layer = 128 * width * (2 * heads + 2 * kv_heads) + 3 * 128 * 352
    assert linear == pytest.approx(3 * 2 * (5 * layer + 128 * 2000), rel=1e-3)
    assert attention == pytest.approx(5 * 7 * heads * width)
