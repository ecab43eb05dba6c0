"""A small model with an LM head, to do to its logits whatever models do, and the comparison with its plain twin."""

import torch
import torch.nn.functional as F
from models import assert_same_tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_minis import convert_to_mini_sequence

H, V, CHUNK = 16, 37, 5


LOSS_ONLY = {"chunk_size": 10_000, "loss_chunk_size": CHUNK}


class Output(dict):
    loss = property(lambda self: self["loss"])


class Model(nn.Module):
    """An LM head behind an embedding; `process` turns logits into what cross entropy gets, `options` go to it."""

    def __init__(self, process=lambda logits: logits, flatten=True, bias=False, dtype=torch.float32, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(V, H), nn.Linear(H, V, bias)
        self.process, self.flatten, self.options = process, flatten, options
        self.to(dtype)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.process(self.lm_head(self.embed(input_ids)))
        if labels is None:
            return Output(logits=logits)
        if self.flatten:
            logits, labels = logits.view(-1, logits.shape[-1]), labels.view(-1)
        return Output(loss=F.cross_entropy(logits, labels, **self.options), logits=logits)


class LargestTensor(TorchDispatchMode):
    """The largest number of rows of any tensor whose last dimension is a vocabulary."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, t.numel() // self.vocab_size)
        return out


def pair(**kwargs):
    model, reference = Model(**kwargs), Model(**kwargs)
    return convert_to_mini_sequence(model, LOSS_ONLY), reference


def data(length=23, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (batch_size, length), generator=generator)
    labels = torch.randint(0, V, (batch_size, length), generator=generator)
    labels[0, :9] = -100  # the first chunk is masked as a whole
    return {"input_ids": ids, "labels": labels}


def assert_same_loss(model, reference, inputs, rtol=1e-5):
    grads = []
    for m in (model, reference):
        loss = m(**inputs).loss
        weights = torch.linspace(-1, 2, loss.numel()).view_as(loss) if loss.dim() else torch.tensor(3.0)
        m.zero_grad()
        (loss * weights).sum().backward()
        grads.append({"loss": loss.detach()} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0]["loss"].dtype == grads[1]["loss"].dtype
    torch.testing.assert_close(grads[0]["loss"], grads[1]["loss"], rtol=rtol, atol=1e-6)
    assert_same_tensors(grads[0], grads[1], rtol=rtol)


def own_loss(function, **kwargs):
    """A model and its reference whose loss is `function(logits, labels, model)`."""

    class Own(Model):
        def forward(self, input_ids, labels=None):
            return Output(loss=function(self.lm_head(self.embed(input_ids)), labels, self))

    return convert_to_mini_sequence(Own(**kwargs), LOSS_ONLY), Own(**kwargs)


def flat(logits, labels, **kwargs):
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), **kwargs)
