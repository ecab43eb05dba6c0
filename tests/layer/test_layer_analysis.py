"""Whole layers: what would be silently wrong where a short look at a layer does not show what it does."""

import copy
import math

import pytest
import torch
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    count_layers,
    loss_and_grads,
    twins,
)
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Llama4TextConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.layer.analysis import analysis


def test_layers_that_count_positions_themselves():
    """Llama 4 scales the queries of its layers without rotation, beyond `floor_scale` tokens alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    config = Llama4TextConfig(
        vocab_size=131, moe_layers=[], pad_token_id=0, initializer_range=0.2, floor_scale=40, attn_scale=0.5, **sizes
    )
    config._attn_implementation = "eager"
    reference = AutoModelForCausalLM.from_config(config).train()
    reference.config.use_cache = False
    model = copy.deepcopy(reference)
    convert_to_mini_sequence(model, {"chunk_size": 32})
    ids = torch.randint(1, 131, (1, 200))
    assert_same_training(model, reference, {"input_ids": ids, "labels": ids})
    report = mini_sequence_report(model)
    assert count_layers(model) == 3 and "torch.arange" in str(report)


def test_a_large_weight_behind_a_result_that_nobody_else_reads(monkeypatch):
    """Gradients of large weights are not asked for; what is left out in front of one would be missing in it alone."""
    monkeypatch.setattr(analysis, "LARGEST_WEIGHT", 1500)
    model, reference = twins("llama")
    for m in (model, reference):
        for layer in m.model.layers:
            torch.manual_seed(1)
            layer.mlp.down_proj = nn.Sequential(nn.Linear(48, 20, bias=False), nn.Linear(20, 80, bias=False), Halves())
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 2


class Halves(nn.Module):
    def forward(self, x):
        return x[..., :32] + x[..., 48:]


@pytest.mark.parametrize("scope", ["tokens", "layer"])
@pytest.mark.parametrize("change", ["adapter", "scale"])
def test_adapters_switched_between_forward_and_backward(change, scope):
    """PEFT holds active adapters in a list and their scales in a dict. Backward is of what forward was."""
    from peft import LoraConfig

    norms = []
    for tiled in (True, False):
        model = add_lora(build("llama"))
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        train_all_adapters(model)
        if tiled:
            convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
        loss = model(**batch(23)).loss
        if change == "adapter":
            model.set_adapter("other")
            train_all_adapters(model)
        else:
            for part in model.modules():
                if hasattr(part, "set_scale"):
                    part.set_scale("default", 3.0)
        loss.backward()
        norms.append([norm_of(model, ".default."), norm_of(model, ".other.")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[1][0] > 0 and norms[1][1] == 0


def train_all_adapters(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)


def norm_of(model, name: str) -> float:
    return sum(p.grad.norm().item() for n, p in model.named_parameters() if name in n and p.grad is not None)


def tempered(module, query, key, value, mask, scaling=None, **kwargs):
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores, count = query @ key.transpose(-1, -2) * scaling * module.temperature, query.shape[2]
    weights = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def all_heads_in_one(module, *args, **kwargs):
    return tempered(module, *args, **kwargs)[0].flatten(2), None


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_autocast_leaves_float64_alone(scope):
    model, reference = (m.double() for m in twins("llama"))
    convert_to_mini_sequence(model, CHUNKS | {"scope": scope})
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training(model, reference, batch(23), rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}], ids=["", "head groups"])
@pytest.mark.parametrize("attend", [tempered, all_heads_in_one])
def test_a_weight_that_the_attention_reads_from_its_module(attend, settings):
    AttentionInterface.register("tempered", attend)
    AttentionMaskInterface.register("tempered", lambda *args, **kwargs: None)
    model, reference = twins("llama", attention="tempered")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.self_attn.temperature = nn.Parameter(torch.tensor(1.3))
    convert_to_mini_sequence(model, CHUNKS | settings)
    assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 2


def test_dropout_that_is_on_in_a_layer_in_evaluation():
    """Monte Carlo dropout: backward has forward's masks, as a difference along the gradient shows."""
    model = add_lora(build("llama"), lora_dropout=0.3).double()
    convert_to_mini_sequence(model, CHUNKS)
    model.eval()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, step = [], 1e-4
    torch.manual_seed(5)
    model(**batch(23)).loss.backward()
    grads = [p.grad.clone() for p in trained]
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p.add_(g, alpha=sign * step)
        torch.manual_seed(5)
        losses.append(model(**batch(23)).loss.item())
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p.sub_(g, alpha=sign * step)
    derivative = (losses[0] - losses[1]) / (2 * step)
    assert derivative == pytest.approx(sum(g.square().sum().item() for g in grads), rel=1e-3)
    assert count_layers(model) == 2


def test_a_default_device_for_new_tensors():
    model = build("llama")
    convert_to_mini_sequence(model, CHUNKS)
    x = torch.randn(2, 23, 32).requires_grad_()
    rotation = model.model.rotary_emb(x, torch.arange(23)[None])
    try:
        torch.set_default_device("meta")
        model.model.layers[0](x, position_embeddings=rotation).sum().backward()
    finally:
        torch.set_default_device(None)
    assert x.grad is not None and not mini_sequence_report(model).untiled


def test_evaluation_in_inference_mode():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    model.eval(), reference.eval()
    with torch.inference_mode():
        loss, expected = model(**batch(23)).loss, reference(**batch(23)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert count_layers(model) == 2


class ScaledBy(LlamaDecoderLayer):
    """Keys are scaled by numbers given beside: as many as tokens, or another number of which the mean is taken."""

    def forward(self, hidden_states, numbers=None, **kwargs):
        scale = numbers if numbers.shape[1] == hidden_states.shape[1] else numbers.mean(1, keepdim=True)
        return super().forward(hidden_states * scale, **kwargs)


def test_an_argument_that_has_as_many_positions_as_tokens_by_chance():
    """What was found out for it says nothing about a call where it has another number."""
    model, reference = twins("llama")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.__class__ = ScaledBy
    convert_to_mini_sequence(model, CHUNKS | {"loss": False})
    for count in (23, 40, 23):
        torch.manual_seed(count)
        x, numbers = torch.randn(1, 23, 32), torch.rand(1, count, 1)
        results = []
        for m in (model, reference):
            inputs = x.clone().requires_grad_()
            rotation = m.model.rotary_emb(inputs, torch.arange(23)[None])
            m.model.layers[0](inputs, numbers=numbers, position_embeddings=rotation).square().sum().backward()
            results.append(inputs.grad)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(model.model.layers[0].mini_sequence_analyses) == 2


class TimesOneNumber(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * self.number


def test_rounding_in_bfloat16_is_not_taken_for_mixing():
    """The gradient of a single number is a sum that may be next to nothing; asked twice, with other numbers."""
    model = build("llama", num_hidden_layers=40)
    for layer in model.model.layers:
        layer.__class__ = TimesOneNumber
        layer.number = nn.Parameter(torch.tensor(1.0))
    model = model.bfloat16()
    convert_to_mini_sequence(model, CHUNKS)
    loss_and_grads(model, batch(40))
    assert count_layers(model) == 40


def test_a_head_that_is_run_again_after_its_model_was_set_to_evaluation():
    model = add_lora(build("llama"), target_modules=["q_proj", "lm_head"], lora_dropout=0.3)
    convert_to_mini_sequence(model, CHUNKS)
    loss = model(**batch(40)).loss
    loss.backward(retain_graph=True)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    loss.backward()
    assert_same_tensors({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads)
