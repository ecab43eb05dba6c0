"""Models with `keep: "attention"`, and an attention that is watched."""

import weakref

import torch
from models import CHUNKS, assert_same_tensors, batch, checkpointed, loss_and_grads, twins
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_minis import convert_to_mini_sequence

SETTINGS = {
    "layer": {},
    "layer, offload": {"offload": "cpu"},
}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}


class Attention:
    """torch's attention, registered under a name of its own; counts its calls and sees what it is given and gives."""

    name = "watched_for_keep_attention"

    def __init__(self):
        self.calls, self.heads, self.outputs = 0, [], []
        self.run, self.change = sdpa_attention_forward, lambda out: out
        AttentionInterface.register(self.name, self)

    def __call__(self, module, query, key, value, attention_mask=None, **kwargs):
        self.calls += 1
        self.heads.append([weakref.ref(t.untyped_storage()) for t in (query, key, value)])
        out, weights = self.run(module, query, key, value, attention_mask, **kwargs)
        out = self.change(out)
        self.outputs.append(weakref.ref(out.untyped_storage()))
        return out, weights


def converted(settings, family="llama", attention="sdpa", **sizes):
    """A checkpointed model that keeps its attention, and one as it is."""
    model, reference = (checkpointed(m) for m in twins(family, attention=attention, **(sizes or WIDE)))
    return convert_to_mini_sequence(model, CHUNKS | {"keep": "attention"} | settings), reference


def unmasked(length, **kwargs):
    inputs = batch(length, **kwargs)
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


def assert_same_gradients_twice(model, reference, inputs: dict) -> torch.Tensor:
    """Backward of one loss with its graph retained, and again, gives the reference's gradients; the loss, its graph freed."""
    _, grads = loss_and_grads(reference, inputs)
    loss = model(**inputs).loss
    for retain in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)
        assert_same_tensors({name: p.grad for name, p in model.named_parameters()}, grads)
    return loss
