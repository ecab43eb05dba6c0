"""Whole layers: what changes after the first call, what others do beside a step."""

import copy
import math
import sys
import threading

import pytest
import torch
from models import CHUNKS, assert_same_training, batch, build, count_layers, loss_and_grads, twins
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ds_minis import convert_to_mini_sequence, mini_sequence_report

PARTS = ["k_proj", "v_proj", "down_proj"]


def with_adapter(model, kind: str):
    from peft import IA3Config, LoraConfig, get_peft_model

    torch.manual_seed(1)
    if kind == "IA3":
        config = IA3Config(target_modules=PARTS, feedforward_modules=["down_proj"], init_ia3_weights=False)
    else:
        config = LoraConfig(r=4, use_dora=kind == "DoRA", target_modules=PARTS, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}], ids=["", "head groups"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
@pytest.mark.parametrize("before", ["none", "disabled", "merged"])
def test_an_adapter_that_is_there_after_the_first_call_alone(before, kind, settings):
    """DoRA's and IA3's gradients depend on results of projections that nobody reads without them."""
    model, reference = twins("llama")
    if before != "none":
        model, reference = (with_adapter(m, kind) for m in (model, reference))
    convert_to_mini_sequence(model, CHUNKS | settings)
    if before == "none":
        assert_same_training(model, reference, batch(23))
        model, reference = (with_adapter(m, kind) for m in (model, reference))
    elif before == "disabled":
        with model.disable_adapter(), torch.no_grad():  # as a preference loss runs its reference
            model(**batch(23))
    else:
        model.merge_adapter()
        with torch.no_grad():
            model(**batch(23))
        model.unmerge_adapter()
    assert_same_training(model, reference, batch(23), rtol=1e-5 if before != "merged" else 1e-4)
    assert count_layers(model) == 2


def test_another_model_in_another_thread():
    """Whatever a thread runs, it must get the attention of its own model."""
    model, _ = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    other, plain = build("llama", seed=3), build("llama", seed=3)
    convert_to_mini_sequence(other, CHUNKS)
    models = {"tiled": model, "tiled too": other, "plain": plain}
    expected = {name: m(**batch(23)).loss.item() for name, m in models.items()}
    seen: dict[str, list] = {name: [] for name in models}

    def train(name: str) -> None:
        for _ in range(15):
            try:
                loss = models[name](**batch(23)).loss
                loss.backward()
                seen[name].append(loss.item())
            except BaseException as error:
                seen[name].append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=train, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for name in models:
        assert seen[name] == pytest.approx([expected[name]] * 15, rel=1e-5), name
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


@pytest.mark.parametrize("part", ["mlp", "self_attn", "self_attn.q_proj", "input_layernorm"])
def test_backward_hooks_on_a_part_see_all_tokens(part):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))  # found out without hooks
    shapes: dict[str, list] = {"tiled": [], "plain": []}
    for name, m in (("tiled", model), ("plain", reference)):

        def hook(module, grad_inputs, grad_outputs, name=name):
            shapes[name].append(grad_outputs[0].shape)
            return tuple(g if g is None else g / (1 + g.norm()) for g in grad_inputs)

        m.model.layers[0].get_submodule(part).register_full_backward_hook(hook)
    assert_same_training(model, reference, batch(23))
    assert shapes["tiled"] == shapes["plain"] == [(2, 23, 32)]
    assert any("has the hook" in reason for _, reason in mini_sequence_report(model).untiled.values())


def test_no_cache_is_said_where_it_was_given_by_position():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    inputs = batch(23)
    args = inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"], None
    torch.testing.assert_close(model(*args).loss, reference(*args).loss)


class ScaledByLength(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        scaling = self.scaling
        self.scaling = scaling * math.log(hidden_states.shape[1])
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.scaling = scaling


def test_a_setting_of_the_attention_that_depends_on_the_length():
    model, reference = twins("llama")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.self_attn.__class__ = ScaledByLength
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    reasons = {reason for _, reason in mini_sequence_report(model).untiled.values()}
    assert any("'scaling' depends on the number of tokens" in reason for reason in reasons), reasons


class AllExpertsCalled(torch.nn.Module):
    """A mixture that calls every expert, also with no token at all, and sends no token to one of them at first."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        choice = (rows[:, 0] > 0).long() + (rows[:, 1] > 0).long()
        choice = choice.clamp(max=1) if CLOSED else choice
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = (choice == i).nonzero().squeeze(1)
            y = y.index_add(0, chosen, expert(rows[chosen]))
        return y.view_as(x)


CLOSED = True


def test_an_expert_that_no_token_was_sent_to_at_first(monkeypatch):
    model, reference = twins("llama")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.mlp = AllExpertsCalled(layer.mlp)
    convert_to_mini_sequence(model, CHUNKS)
    for closed in (True, False):
        monkeypatch.setitem(globals(), "CLOSED", closed)
        assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 2


def test_a_projection_read_on_both_sides_of_the_attention_is_summed_in_float32():
    """The gate of Qwen3-Next's attention is part of its queries' projection."""
    config = Qwen3NextConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["full_attention"], mlp_only_layers=[0], initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).train().bfloat16()
    inputs, name = batch(512, batch_size=1), "model.layers.0.self_attn.q_proj.weight"
    grads = []
    for chunk_size in (1, 256):
        model = copy.deepcopy(reference)
        convert_to_mini_sequence(model, {"chunk_size": chunk_size})
        grads.append(loss_and_grads(model, inputs)[1][name].float())
        assert count_layers(model) == 1
    assert (grads[0] - grads[1]).norm() < 0.008 * grads[1].norm()


def test_hooks_on_every_module_see_all_tokens():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))

    def hook(module, args, output):
        return output / (1 + output.norm()) if type(module).__name__ == "LlamaMLP" else None

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_same_training(model, reference, batch(23))
    finally:
        handle.remove()
