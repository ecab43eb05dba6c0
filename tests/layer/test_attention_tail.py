"""Runs of a layer that are given the attention's output skip what comes before the attention, where nothing else follows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    count_layers,
    loss_and_grads,
    with_dropout,
)
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from ds_minis import convert_to_mini_sequence
from ds_minis.layer.attention.attention_tail import AttentionTail

NUM_CHUNKS = 4
SHORTENED = NUM_CHUNKS - 1 + NUM_CHUNKS  # runs of a layer and step: all but the first in forward, all in backward
BATCH = batch(33, batch_size=1)


class ScalesResult(LlamaAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out * 1.5, weights


class ScalesResultInPlace(LlamaAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out.mul_(1.5), weights


class AddsItsInput(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return out + 0.1 * hidden_states, weights


class GivesMore(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)[0], hidden_states


class GatesOutput(LlamaAttention):
    """A gate of the tokens, which the projection behind the attention reads from the module."""

    def forward(self, hidden_states, **kwargs):
        self.o_proj.__class__ = Gated
        self.o_proj.gate = torch.sigmoid(self.q_proj(hidden_states))
        return super().forward(hidden_states, **kwargs)


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x * self.gate)


class DropsItsInput(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return super().forward(F.dropout(hidden_states, 0.3, self.training), **kwargs)


def changed(cls):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = cls
    return model


@pytest.fixture
def shortened(monkeypatch):
    """Appends an element for each shortened run."""
    runs, forward = [], AttentionTail.forward

    def counting(self, *args, **kwargs):
        runs.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AttentionTail, "forward", counting)
    return runs


def converted(model):
    return convert_to_mini_sequence(copy.deepcopy(model), CHUNKS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt_neox", "gpt_oss"])
def test_exact_and_shortened(family, shortened):
    model = build(family)
    tiled = converted(model)
    assert_same_training(tiled, model, BATCH)
    assert count_layers(tiled) == 2 and len(shortened) == 2 * SHORTENED


def test_several_sequences(shortened):
    model = build("llama")
    assert_same_training(converted(model), model, batch(20))
    assert len(shortened) == 2 * SHORTENED


def test_with_lora(shortened):
    model = add_lora(build("llama"))
    assert_same_training(converted(model), model, BATCH)
    assert len(shortened) == 2 * SHORTENED


def test_rotations_are_not_computed_again(monkeypatch):
    calls, rotate = [], modeling_llama.apply_rotary_pos_emb
    tiled = converted(build("llama"))
    loss_and_grads(tiled, BATCH)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *a, **k: calls.append(1) or rotate(*a, **k))
    loss_and_grads(tiled, BATCH)
    # Before the attention: in forward, and twice in backward. Behind it: the first chunk, which is watched.
    assert len(calls) == 2 * (3 * NUM_CHUNKS + 1)


@pytest.mark.parametrize("cls", [ScalesResult, ScalesResultInPlace, AddsItsInput, GivesMore])
def test_more_than_a_projection_is_run_in_full(cls, shortened):
    model = changed(cls)
    tiled = converted(model)
    assert_same_training(tiled, model, BATCH)
    assert count_layers(tiled) == 2 and not shortened


def test_a_module_that_reads_what_came_before_is_run_as_a_whole(shortened):
    model = changed(GatesOutput)
    tiled = converted(model)
    assert_same_training(tiled, model, BATCH)
    assert count_layers(tiled) == 0 and not shortened


@torch.inference_mode()
def test_writes_that_inference_mode_does_not_count(shortened):
    model = changed(ScalesResultInPlace)
    inputs = {k: v for k, v in BATCH.items() if k != "labels"}
    torch.testing.assert_close(converted(model)(**inputs).logits, model(**inputs).logits)
    assert not shortened


@pytest.mark.parametrize("in_attention", [False, True])
def test_dropout(in_attention, shortened, monkeypatch):
    """Random numbers are those of a full run: also where the attention module draws before its attention."""
    model = with_dropout(changed(DropsItsInput if in_attention else LlamaAttention), 0.3)
    tiled, full = converted(model), converted(model)
    torch.manual_seed(5)
    loss, grads = loss_and_grads(tiled, BATCH)
    assert count_layers(tiled) == 2 and len(shortened) == (0 if in_attention else 2 * SHORTENED)
    monkeypatch.setattr("ds_minis.layer.attention.attention_tail.is_flat", lambda *args: False)
    shortened.clear()
    torch.manual_seed(5)
    expected_loss, expected = loss_and_grads(full, BATCH)
    assert not shortened
    assert torch.equal(loss, expected_loss)
    assert_same_tensors(grads, expected, rtol=0)
