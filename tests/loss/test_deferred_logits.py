"""Deferred logits: what models do to logits is run by chunks, computed in full, or refused; never silently wrong."""

import collections
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from heads import CHUNK, LOSS_ONLY, H, LargestTensor, Model, Output, V, assert_same_loss, data, flat, own_loss, pair
from models import batch, build
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from ds_minis import convert_to_mini_sequence
from ds_minis.loss.logits.deferred import DeferredLogits

PROCESSES = {
    "softcap": lambda x: torch.tanh(x / 2.0) * 2.0,
    "softcap-methods": lambda x: x.div(2.0).tanh().mul(2.0),
    "reversed operands": lambda x: 1.5 - 2.0 * x,
    "tensor operands": lambda x: torch.mul(torch.tensor(0.5), x) + torch.linspace(0, 1, V),
    "in place": lambda x: x.div_(3.0).mul_(2.0),
    "augmented": lambda x: exec("x /= 3.0; x *= 2") or x,
    "to dtype": lambda x: x.to(torch.float64).float(),
    "shift": lambda x: x[..., :-1, :].contiguous(),
    "slices": lambda x: x[:, 2:, :],
    "one row": lambda x: x[0],
    "transposed": lambda x: x.transpose(0, 1),
    "flatten": lambda x: x.flatten(0, 1),
    "reshape": lambda x: x.reshape(-1, V),
    "view of a size": lambda x: x.view(torch.Size((x.shape[0] * x.shape[1], V))),
    "vocabulary slice": lambda x: x[:, 1:, : V - 20] * 2.0,
    "slice of a slice": lambda x: x[..., 3:][:, 4:, : V - 20],
    "forbidden tokens": lambda x: exec("x[:, :, [3, 7]] = -5.0") or x,
    "forbidden token, a mask": lambda x: exec("x[..., torch.arange(V) > V - 5] = torch.tensor(-5.0)") or x,
}


def matching(labels, name):
    if name == "shift":
        return labels[:, 1:].contiguous()
    if name == "slices":
        return labels[:, 2:].contiguous()
    if name == "one row":
        return labels[0]
    if name == "vocabulary slice":
        return labels[:, 1:].clamp(max=V - 21)
    if name == "slice of a slice":
        return labels[:, 4:].clamp(max=V - 24)
    return labels.transpose(0, 1).contiguous() if name == "transposed" else labels


@pytest.mark.parametrize("name", PROCESSES)
def test_what_models_do_to_logits_is_deferred(name):
    process = PROCESSES[name]

    class Processed(Model):
        def forward(self, input_ids, labels=None):
            logits = process(self.lm_head(self.embed(input_ids)))
            target = matching(labels, name).reshape(-1)
            return Output(loss=F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target))

    model, reference = convert_to_mini_sequence(Processed(), LOSS_ONLY), Processed()
    assert_same_loss(model, reference, data())
    with LargestTensor(V) as largest:
        model(**data()).loss.backward()
    assert largest.rows <= max(CHUNK, H)  # H: the head's weight gradient seen as a matrix of H rows


MATERIALIZED = {
    "log_softmax": lambda x: x.log_softmax(-1),
    "every other token of the vocabulary": lambda x: x[..., torch.arange(V - 3)],
    "one more dimension": lambda x: x[:, None],
    "boolean mask": lambda x: x[torch.arange(x.shape[1]).remainder(3).bool().expand(x.shape[0], -1)],
    "set item of some rows": lambda x: exec("x[:, 1:, 3] = -5.0") or x,
    "set item of a row": lambda x: exec("x[:, 3] = -5.0") or x,
    "set items to other values": lambda x: exec("x[..., :3] = torch.arange(3.0)") or x,
    "unknown in place": lambda x: x.relu_(),
    "sum of two": lambda x: x + x.detach(),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", MATERIALIZED)
def test_what_cannot_be_deferred_is_computed_in_full(name):
    process = MATERIALIZED[name]

    class Processed(Model):
        def forward(self, input_ids, labels=None):
            logits = process(self.lm_head(self.embed(input_ids)))
            labels = labels.clamp(max=29)
            if name == "boolean mask":
                labels = labels[torch.arange(23).remainder(3).bool().expand(2, -1)]
            return Output(loss=F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)))

    model, reference = convert_to_mini_sequence(Processed(), LOSS_ONLY), Processed()
    assert_same_loss(model, reference, data())


def test_learned_scale_gets_its_gradient():
    class Scaled(Model):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.embed(input_ids)) * self.scale
            return Output(loss=F.cross_entropy(logits.view(-1, V), labels.view(-1)))

    model, reference = convert_to_mini_sequence(Scaled(), LOSS_ONLY), Scaled()
    assert_same_loss(model, reference, data())


def written(*writes, view=lambda x: x.view(-1, V), use_view=False):
    def loss(logits, labels, model):
        alias = view(logits)
        for write in writes:
            write(logits, alias)
        logits = alias if use_view else logits
        return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1)[: logits.numel() // V])

    return loss


WRITES = {
    "through a view": written(lambda x, v: v.mul_(2.0)),
    "behind a view": written(lambda x, v: x.mul_(2.0), use_view=True),
    "through a part": written(lambda x, v: v.mul_(2.0), view=lambda x: x[:, :5]),
    "through a cast that does nothing": written(lambda x, v: v.mul_(2.0), view=lambda x: x.float()),
    "behind a cast that does nothing": written(
        lambda x, v: x.div_(2.0), view=lambda x: x.to(torch.float32), use_view=True
    ),
    "set item of a view": written(lambda x, v: v.__setitem__((slice(None), 3), -5.0)),
    "set item behind a view": written(lambda x, v: x.__setitem__((..., 3), -5.0), use_view=True),
    "unknown operation behind a view": written(lambda x, v: x.relu_(), use_view=True),
    "augmented item": written(lambda x, v: exec("x[:, 3] *= 2"), use_view=True),
    "augmented rows": written(lambda x, v: exec("x[..., :-1, :] -= 1.5"), use_view=True),
    "twice": written(lambda x, v: v.mul_(2.0), lambda x, v: x.tanh_(), use_view=True),
    "of a view that was computed, then the base": written(
        lambda x, v: v.argmax(-1), lambda x, v: x.mul_(2), use_view=True
    ),
    "of a view that was computed": written(lambda x, v: v.argmax(-1), lambda x, v: v.mul_(0.5)),
    "of logits that were computed": written(lambda x, v: x.argmax(-1), lambda x, v: x.mul_(2)),
    "by a keyword": written(lambda x, v: F.relu(x, inplace=True), use_view=True),
    "by a keyword, after a copy": written(
        lambda x, v: F.relu(x, inplace=True), view=lambda x: x[:, 1:].contiguous(), use_view=True
    ),
    "of another dtype": written(lambda x, v: x.mul_(torch.linspace(0, 1, V, dtype=torch.float64))),
    "after a copy": written(lambda x, v: x.mul_(2.0), view=lambda x: x[:, 1:].contiguous(), use_view=True),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_reach_every_alias(name):
    assert_same_loss(*own_loss(WRITES[name]), data())


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().mean()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return 2 * grad * logits / logits.numel()


def test_a_fused_loss_gives_its_gradient():
    """An autograd.Function, such as a fused cross entropy of somebody's, does not ask what a tensor stands for."""
    model, reference = own_loss(lambda x, labels, m: FusedLoss.apply(x * 2.0) + m.embed.weight.square().sum())
    assert_same_loss(model, reference, data())


def test_a_fused_loss_of_logits_that_were_written_to_is_refused():
    model, _ = own_loss(lambda x, labels, m: FusedLoss.apply(x.mul_(2.0)))
    with pytest.raises(RuntimeError, match="written to in place: give it a clone"):
        model(**data()).loss.backward()


@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_gradients_of_logits_are_refused(name):
    model, _ = own_loss(lambda x, labels, m: getattr(x, name)(*[print] * (name == "register_hook")) or flat(x, labels))
    with pytest.raises(RuntimeError, match='"loss": false'):
        model(**data())


def test_second_order_gradients_are_refused():
    model, _ = pair()
    loss = model(**data()).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)


def test_output_of_every_form():
    Named = collections.namedtuple("Named", "loss logits")

    @dataclasses.dataclass
    class Data:
        loss: torch.Tensor
        logits: torch.Tensor | None

    forms = {
        "namedtuple": Named,
        "nested": lambda loss, logits: {"loss": loss, "more": [logits]},
        "keys": lambda loss, logits: {1: loss, 2: logits},
        "dataclass": Data,
        "bare": lambda loss, logits: logits,
    }
    for form, make in forms.items():

        class Formed(Model):
            def forward(self, input_ids, labels=None, make=make):
                logits = self.lm_head(self.embed(input_ids))
                return make(flat(logits, labels), logits)

        output = convert_to_mini_sequence(Formed(), LOSS_ONLY)(**data())
        values = vars(output).values() if form == "dataclass" else tree_leaves(output)
        assert not any(isinstance(value, DeferredLogits) for value in values), form


def accuracy_first(logits, labels, model):
    with torch.no_grad():
        assert (logits.argmax(-1) == labels).float().mean() >= 0
    return flat(logits, labels) + model.embed.weight.square().sum()


def scaled_without_grad(logits, labels, model):
    with torch.no_grad():
        logits = logits * 2.0
    return flat(logits, labels) + model.embed.weight.square().sum()


def loss_in_autocast(logits, labels, model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits * torch.tensor(0.7, dtype=torch.bfloat16)
        return flat(logits, labels)


MODES = {
    "accuracy first": accuracy_first,
    "scaled without grad": scaled_without_grad,
    "loss in autocast": loss_in_autocast,
    "loss twice": lambda logits, labels, model: flat(logits, labels) + 2 * flat(logits / 2, labels, reduction="sum"),
    "z-loss": lambda logits, labels, model: flat(logits, labels) + logits.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("name", MODES)
def test_gradient_mode_autocast_and_repeated_use(name):
    assert_same_loss(*own_loss(MODES[name]), data(), rtol=1e-5)


def test_head_outside_of_autocast_with_the_model_inside():
    class Model32(Model):
        def forward(self, input_ids, labels=None):
            with torch.autocast("cpu", enabled=False):
                logits = self.lm_head(self.embed(input_ids).float())
            return Output(loss=flat(logits, labels))

    losses = []
    for model in (convert_to_mini_sequence(Model32(), LOSS_ONLY), Model32()):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**data()).loss)
        losses[-1].backward()
        losses.append(model.lm_head.weight.grad)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[1], losses[3], rtol=1e-4, atol=1e-7)


def test_a_cast_after_autocast_computes_nothing():
    """accelerate casts a model's output to float32 when the autocast around its forward has ended."""

    class Cast(Model):
        def forward(self, input_ids, labels=None):
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.lm_head(self.embed(input_ids))
                loss = flat(logits, labels)
            return Output(loss=loss, logits=logits.float())

    with LargestTensor(V) as largest:
        output = convert_to_mini_sequence(Cast(), LOSS_ONLY)(**data())
    assert largest.rows <= H and set(output) == {"loss"}  # the transposed weight has H rows


def test_dtype_of_logits_under_autocast():
    seen = []
    model, _ = pair(process=lambda x: seen.append(x.dtype) or x)
    with torch.autocast("cpu", torch.bfloat16):
        model(**data())
    assert seen == [torch.bfloat16]


def test_operand_that_is_written_to_is_refused():
    def loss(logits, labels, model):
        bias = torch.ones(V)
        logits = logits + bias
        bias.zero_()
        return flat(logits, labels)

    model, _ = own_loss(loss)
    with pytest.raises(RuntimeError, match='"loss": false'):
        model(**data())
    assert type(model.lm_head) is nn.Linear


def test_hidden_states_that_are_written_to_are_refused():
    class Writes(Model):
        def forward(self, input_ids, labels=None):
            hidden = self.embed(input_ids).detach()
            logits = self.lm_head(hidden)
            hidden.mul_(0.5)
            return Output(loss=flat(logits, labels))

    with pytest.raises(RuntimeError, match="hidden states were written to"):
        convert_to_mini_sequence(Writes(), LOSS_ONLY)(**data())


OPERANDS = {
    "constant minus logits": lambda x: torch.linspace(0, 1, V) - x,
    "number to the power of logits": lambda x: torch.pow(torch.tensor(2.0), x / 4),
    "constant over logits": lambda x: torch.linspace(1, 2, V) / (x + 30.0),
    "one number per row": lambda x: x * torch.linspace(1, 2, 23)[:, None],
    "type of another": lambda x: x.type_as(torch.zeros(3, dtype=torch.float64)).float(),
    "other as the logits": lambda x: x * torch.tensor(0.5).type_as(x),
    "class second": lambda x: x.transpose(1, -1).transpose(1, -1),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name):
    assert_same_loss(*own_loss(lambda x, labels, m: flat(OPERANDS[name](x).contiguous(), labels)), data())


def test_dimensions_that_end_in_the_vocabulary():
    def loss(logits, labels, model):
        second = F.cross_entropy(logits.transpose(1, -1), labels)
        return second + logits.flatten(1).square().mean() + logits.flatten(start_dim=0, end_dim=1).mean()

    assert_same_loss(*own_loss(loss), data())


def test_nobody_sees_deferred_logits():
    model, seen = build("llama"), []
    convert_to_mini_sequence(model, {"loss_chunk_size": 7})
    model.register_forward_hook(lambda m, args, out: seen.append(out))
    model(**batch(23))
    loss, *rest = model(**batch(23), return_dict=False)
    assert loss.dim() == 0 and not any(isinstance(t, DeferredLogits) for t in tree_leaves(rest))
    assert isinstance(seen[0], ModelOutput) and list(seen[0].keys()) == ["loss"]


PER_TOKEN = {
    "log-probability": lambda x, y: -F.log_softmax(x, dim=-1).gather(-1, y[..., None])[..., 0],
    "third dimension": lambda x, y: -torch.log_softmax(x, 2).gather(2, y.unsqueeze(2)).squeeze(2),
    "in another dtype": lambda x, y: (
        -x.log_softmax(dim=2, dtype=torch.float64).gather(-1, y[..., None])[..., 0].float()
    ),
    "z-loss": lambda x, y: x.logsumexp(-1) ** 2 + torch.logsumexp(x, dim=-1, keepdim=True)[..., 0],
    "two losses": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()) + 1e-2 * x.logsumexp(-1).pow(2),
    "accuracy": lambda x, y: (x.logsumexp(-1) * (x.argmax(-1) == y)) + x.argmax(dim=2, keepdim=True)[..., 0],
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_what_makes_one_number_per_token_runs_by_chunks(name):
    class Own(Model):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.embed(input_ids))
            return Output(loss=PER_TOKEN[name](logits, labels.clamp(min=0)).mean())

    model, reference = convert_to_mini_sequence(Own(), LOSS_ONLY), Own()
    assert_same_loss(model, reference, data())
    with LargestTensor(V) as largest:
        model(**data()).loss.backward()
    assert largest.rows <= max(CHUNK, H)


@pytest.mark.parametrize(
    "consume",
    [
        lambda x: x.argmax(0),
        lambda x: x.argmax(),
        lambda x: torch.softmax(x, dim=1).sum(),
        lambda x: x.logsumexp((1, 2)),
        lambda x: x.gather(1, torch.zeros(x.shape[0], 2, V, dtype=torch.long)),
        lambda x: x.gather(-1, torch.zeros(x.shape[0], 2, 3, dtype=torch.long)),
    ],
)
def test_results_across_tokens_are_computed_in_full(consume):
    found = []

    class Own(Model):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.embed(input_ids))
            found.append(consume(logits))
            return Output(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    model, reference = convert_to_mini_sequence(Own(), LOSS_ONLY), Own()
    assert_same_loss(model, reference, data())
    torch.testing.assert_close(found[0], found[1])
