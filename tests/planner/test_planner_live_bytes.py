"""What is planned against what a real step on the CPU holds and computes, counted by another counter than the planner's."""

import contextlib
import io
import math
import warnings
from dataclasses import dataclass

import models
import pytest
import torch
from live_bytes import LiveBytes
from planner_models import SIZES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from ds_minis import convert_to_mini_sequence
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner
from ds_minis.planner.step.adapters import add_lora
from ds_minis.planner.step.stubs import FLOPS, register

CONFIG = LlamaConfig(**SIZES)
TOKENS = 3500


@dataclass(frozen=True)
class Counted:
    """Of a step.

    Attributes:
        peak_bytes: of activations and gradients.
        products: operations of matrix products, and of the attention.
    """

    peak_bytes: float
    products: tuple[float, float]


def planned(config, setup: Setup, tokens: int) -> Counted:
    planner = Planner(config)
    profile = planner.profile(planner.way(setup))
    offloaded = bool((setup.settings or {}).get("offload"))
    peak = profile.peak(planner.lengths(setup, tokens, profile), lambda where, sofar, layer: sofar, offloaded=offloaded)
    per_token, per_square = profile.flops
    return Counted(peak.activations + peak.held, (per_token * tokens, per_square * tokens**2))


class FourBits(TorchDispatchMode):
    """Counts products with 4-bit weights, which are an operation of their own in forward."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name == "bitsandbytes::gemm_4bit":
            self.flops += 2 * args[0].shape[:-1].numel() * math.prod(args[2])
        return func(*args, **(kwargs or {}))


def real(config, setup: Setup, tokens: int, attention: str) -> Counted:
    """Of the second step of a real model: analyses are made in the first."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).train()
    if setup.train == "lora":
        add_lora(model, setup.lora_rank)
    if setup.train == "qlora":
        model = models.add_lora(models.quantized(model), r=setup.lora_rank, target_modules="all-linear")
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
    with LiveBytes(apart=apart, flops_of=FLOPS) as live, FourBits() as four_bits:
        step()
    # The blocks of host memory are on the same device here.
    host = sum(entry.nbytes for entry in live.at_peak if entry.dtype == torch.uint8)
    return Counted(live.peak - host, (live.matmul_flops + four_bits.flops, live.other_flops))


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
def test_planned_bytes_and_products_are_those_of_a_real_step(name):
    setup = Setup(dtype="float32", **WAYS[name])
    found, expected = planned(CONFIG, setup, TOKENS), real(CONFIG, setup, TOKENS, register())
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.03)
    assert found.products == pytest.approx(expected.products, rel=1e-3)


@pytest.mark.parametrize(
    ("keep", "train"), [("attention", "full"), ("matmuls", "full"), ("matmuls", "lora"), ("all", "lora")]
)
def test_what_is_kept_with_torchs_own_attention(keep, train):
    """The stand-in's output is a copy of its queries, which a layer need not keep."""
    setup = Setup(dtype="float32", settings={"keep": keep, "chunk_size": 300}, train=train)
    found, expected = planned(CONFIG, setup, 2200), real(CONFIG, setup, 2200, "sdpa")
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.03)
    assert found.products[0] == pytest.approx(expected.products[0], rel=1e-3)


@pytest.mark.parametrize("keep", ["input", "matmuls"])
def test_products_with_weights_of_four_bits(keep):
    """Those of the adapters are kept: linear layers with 4-bit weights have a forward of their own."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 3})
    setup = Setup(dtype="float32", settings={"keep": keep, "chunk_size": 150}, train="qlora")
    found, expected = planned(config, setup, 400), real(config, setup, 400, register())
    assert found.products == pytest.approx(expected.products, rel=1e-3)


def test_another_architecture_at_another_depth():
    config = Qwen3Config(**SIZES | {"num_hidden_layers": 7, "head_dim": 32, "tie_word_embeddings": True})
    setup = Setup(dtype="float32")
    assert planned(config, setup, 2500).peak_bytes == pytest.approx(
        real(config, setup, 2500, register()).peak_bytes, rel=0.03
    )


def test_offloaded_inputs_leave_the_device():
    """On a CPU all is one device: layer inputs that were copied out are counted apart by their blocks' dtype."""
    setup = Setup(dtype="float32", settings={"offload": "cpu"})
    expected = real(CONFIG, setup, TOKENS, register()).peak_bytes
    assert planned(CONFIG, setup, TOKENS).peak_bytes == pytest.approx(expected, rel=0.06)
    assert expected < 0.9 * planned(CONFIG, Setup(dtype="float32"), TOKENS).peak_bytes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family):
    sizes = SIZES | {"num_hidden_layers": 3, "intermediate_size": 128}
    if family == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = Qwen3MoeConfig(**sizes, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    setup = Setup(dtype="float32", settings={"chunk_size": 300})
    assert planned(config, setup, 900).peak_bytes == pytest.approx(
        real(config, setup, 900, register()).peak_bytes, rel=0.03
    )


def test_counted_products_are_those_of_the_layers_and_of_attention():
    """In forward and backward: 3 products for each linear layer, 2 + 5 causal ones for each head's attention."""
    config = LlamaConfig(**SIZES)
    planner = Planner(config)
    linear, attention = planner.profile(planner.way(Setup(settings=None, checkpointing=False))).flops
    width, heads, kv_heads = 128 // 8, 8, 2
    layer = 128 * width * (2 * heads + 2 * kv_heads) + 3 * 128 * 352
    assert linear == pytest.approx(3 * 2 * (5 * layer + 128 * 2000), rel=1e-3)
    assert attention == pytest.approx(5 * 7 * heads * width)
