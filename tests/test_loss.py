"""The tiled loss against the same model's own loss, with all that models and trainers do to logits."""

import collections
import copy
import dataclasses
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from models import add_lora, assert_same_tensors, assert_same_training, batch, build, loss_and_grads, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.tiling.deferred import DeferredLogits
from ds_minis.tiling.loss import returning_logits

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


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-sum": {"label_smoothing": 0.1, "reduction": "sum"},
    "smoothing-none": {"label_smoothing": 0.1, "reduction": "none"},
    "weight": {"weight": torch.linspace(0, 2, V)},
    "weight-sum": {"weight": torch.linspace(0, 2, V), "reduction": "sum"},
    "weight-smoothing": {"weight": torch.linspace(0.1, 2, V), "label_smoothing": 0.2},
    "ignore_index": {"ignore_index": 7},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_cross_entropy(name, bias):
    model, reference = pair(bias=bias, **OPTIONS[name])
    inputs = data()
    if "ignore_index" in OPTIONS[name]:
        inputs["labels"] = inputs["labels"].clamp(min=0)
    assert_same_loss(model, reference, inputs)


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
}


def matching(labels, name):
    if name == "shift":
        return labels[:, 1:].contiguous()
    if name == "slices":
        return labels[:, 2:].contiguous()
    if name == "one row":
        return labels[0]
    return labels.transpose(0, 1).contiguous() if name == "transposed" else labels


@pytest.mark.parametrize("name", PROCESSES)
def test_what_models_do_to_logits_is_deferred(name):
    process = PROCESSES[name]

    class Processed(Model):
        def forward(self, input_ids, labels=None):
            logits = process(self.lm_head(self.embed(input_ids)))
            target = matching(labels, name).reshape(-1)
            return Output(loss=F.cross_entropy(logits.reshape(-1, V), target))

    model, reference = convert_to_mini_sequence(Processed(), LOSS_ONLY), Processed()
    assert_same_loss(model, reference, data())
    with LargestTensor(V) as largest:
        model(**data()).loss.backward()
    assert largest.rows <= max(CHUNK, H)  # H: the head's weight gradient seen as a matrix of H rows


MATERIALIZED = {
    "log_softmax": lambda x: x.log_softmax(-1),
    "vocabulary slice": lambda x: x[..., :30],
    "boolean mask": lambda x: x[torch.arange(x.shape[1]).remainder(3).bool().expand(x.shape[0], -1)],
    "set item": lambda x: exec("x[..., 3] = -5.0") or x,
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


def own_loss(function, **kwargs):
    """A model and its reference whose loss is `function(logits, labels, model)`."""

    class Own(Model):
        def forward(self, input_ids, labels=None):
            return Output(loss=function(self.lm_head(self.embed(input_ids)), labels, self))

    return convert_to_mini_sequence(Own(**kwargs), LOSS_ONLY), Own(**kwargs)


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
        return logits.square().mean()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(2, 23, V)


def test_a_fused_loss_is_refused_and_not_silently_wrong():
    model, _ = own_loss(lambda x, labels, m: FusedLoss.apply(x) + m.embed.weight.square().sum())
    with pytest.raises(RuntimeError, match='fused cross entropy.*"loss": false'):
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


def test_a_global_hook_sees_the_logits():
    model, reference = pair()
    double = lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_same_loss(model, reference, data())
    finally:
        handle.remove()


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


def flat(logits, labels, **kwargs):
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), **kwargs)


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


ARGUMENTS = {
    "soft labels": lambda x, t, m: F.cross_entropy(x.view(-1, V), F.one_hot(t.clamp(min=0).view(-1), V).float()),
    "one token": lambda x, t, m: F.cross_entropy(x[0, 3], t[1, 3]),
    "legacy arguments": lambda x, t, m: F.cross_entropy(x.view(-1, V), t.view(-1), size_average=False),
    "keywords": lambda x, t, m: F.cross_entropy(input=x.view(-1, V), target=t.view(-1), reduction="sum"),
    "weight and large ignore_index": lambda x, t, m: F.cross_entropy(
        x.view(-1, V), t.masked_fill(t < 0, V + 5).view(-1), torch.linspace(0, 2, V), ignore_index=V + 5
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_cross_entropy(name):
    assert_same_loss(*own_loss(ARGUMENTS[name]), data())


def test_lengths_that_differ_are_an_error_as_in_torch():
    model, _ = own_loss(lambda x, t, m: F.cross_entropy(x.view(-1, V), t.view(-1)[:-1]))
    with pytest.raises(ValueError, match="to match target batch_size"):
        model(**data())


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"weight": torch.linspace(0.5, 2, V, dtype=torch.bfloat16)}]
)
def test_bfloat16_losses_are_summed_in_float32(options):
    model, reference = pair(dtype=torch.bfloat16, **options)
    exact = Model(**options | ({"weight": options["weight"].float()} if "weight" in options else {}))
    exact.load_state_dict(Model(dtype=torch.bfloat16).state_dict())
    loss, expected = model(**data(200)).loss, exact(**data(200)).loss
    assert loss.dtype == reference(**data()).loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss.float(), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batch_without_any_label(reduction):
    model, reference = pair(reduction=reduction)
    inputs = data()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, expected = model(**inputs).loss, reference(**inputs).loss
    assert torch.equal(loss, expected.nan_to_num())  # torch's mean over no token is NaN
    for m, value in ((model, loss), (reference, expected)):
        value.sum().backward()
        assert all(p.grad.eq(0).all() for p in m.parameters())


def test_label_out_of_range_is_an_error_as_in_torch():
    model, _ = pair()
    inputs = data()
    inputs["labels"][1, 3] = V
    with pytest.raises(IndexError):
        model(**inputs)
    assert type(model.lm_head) is nn.Linear and "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("upcast", [False, True])
def test_bfloat16_logits(upcast):
    process = (lambda x: x.float()) if upcast else (lambda x: x)
    model, reference = pair(process=process, dtype=torch.bfloat16)
    loss, expected = model(**data()).loss, reference(**data()).loss
    assert loss.dtype == expected.dtype == (torch.float32 if upcast else torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-5 if upcast else 1e-2, atol=0)


def test_never_more_than_one_chunk_of_logits():
    model, length = build("gemma2"), 60
    convert_to_mini_sequence(model, {"loss_chunk_size": 7})
    V = model.config.vocab_size
    with LargestTensor(V) as largest:
        loss_and_grads(model, batch(length))
        with torch.no_grad():
            model.eval()(**batch(length))
    assert largest.rows <= model.config.hidden_size  # the weight gradient's rows; 120 rows of logits otherwise


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}])
@pytest.mark.parametrize("peft_first", [False, True])
def test_adapters_on_the_lm_head(settings, peft_first):
    model, reference = twins("llama")
    config = {"chunk_size": 10, "loss_chunk_size": 7}
    if peft_first:
        model = convert_to_mini_sequence(add_lora(model, **settings), config)
    else:
        model = add_lora(convert_to_mini_sequence(model, config), **settings)
    reference = add_lora(reference, **settings)
    assert_same_training(model, reference, batch(43))
    with LargestTensor(model.config.vocab_size) as largest:
        loss_and_grads(model, batch(43))
    assert largest.rows <= model.config.hidden_size < 86


def test_head_that_is_replaced_after_conversion():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    for m in (model, reference):
        torch.manual_seed(5)
        m.resize_token_embeddings(150, mean_resizing=False)
    assert_same_training(model, reference, batch(23))


def test_hooks_of_an_engine_run_once_around_all_chunks():
    model, reference = pair()
    calls = []

    def before(module, args):
        calls.append("before")

    def after(module, args, output):
        calls.append("after")

    before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.lm_head.register_forward_pre_hook(before)
    model.lm_head.register_forward_hook(functools.partial(after))
    assert_same_loss(model, reference, data())
    assert calls == ["before", "after"]


def test_a_hook_of_somebody_else_sees_the_logits(caplog):
    model, reference = pair()
    for m in (model, reference):
        m.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with caplog.at_level(logging.WARNING, logger="ds_minis"):
        assert_same_loss(model, reference, data())
    assert "hook that must see the logits" in caplog.text


def test_head_called_by_keyword():
    class Keyword(Model):
        def forward(self, input_ids, labels=None):
            return Output(loss=flat(self.lm_head(input=self.embed(input_ids)), labels))

    assert_same_loss(convert_to_mini_sequence(Keyword(), LOSS_ONLY), Keyword(), data())


def test_positional_labels():
    model, reference = pair()
    inputs = data()
    loss, expected = (m(inputs["input_ids"], inputs["labels"]).loss for m in (model, reference))
    torch.testing.assert_close(loss, expected)
    with LargestTensor(V) as largest:
        model(inputs["input_ids"], inputs["labels"])
    assert largest.rows <= H  # the head's weight, transposed


def test_a_wrapper_that_computes_the_loss_itself_is_tiled():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, labels=None):
            return Output(loss=flat(self.inner(input_ids)["logits"], labels))

    model, reference = convert_to_mini_sequence(Outer(), LOSS_ONLY), Outer()
    assert_same_loss(model, reference, data())
    with LargestTensor(V) as largest:
        model(**data())
    assert largest.rows <= H  # the head's weight, transposed


def test_head_whose_forward_was_replaced_on_the_instance():
    """As accelerate's device hooks do."""
    model, reference = pair()
    for m in (model, reference):
        own = m.lm_head.forward
        m.lm_head.forward = lambda x, own=own: own(x) * 2
    assert_same_loss(model, reference, data())
    assert model.lm_head.__dict__["forward"](torch.zeros(1, H)).eq(0).all()


def test_forward_without_labels_and_generation_are_bit_identical():
    model, reference = twins("gemma2")
    convert_to_mini_sequence(model, {"chunk_size": 3, "loss_chunk_size": 3})
    inputs = batch(23)
    del inputs["labels"]
    for m in (model, reference):
        m.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    generated = [m.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True) for m in (model, reference)]
    assert torch.equal(*generated)


def test_inference_can_be_tiled_on_request():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {"chunk_size": 3, "tile_inference": True})
    rows = []
    own = model.model.layers[0].mlp.down_proj.forward
    model.model.layers[0].mlp.down_proj.forward = lambda x: rows.append(x.numel() // x.shape[-1]) or own(x)
    inputs = batch(23)
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
    assert max(rows) == 3


def test_logits_are_given_back_on_request():
    model, reference = twins("llama")
    with torch.no_grad():
        expected = reference(**batch(23)).logits
        convert_to_mini_sequence(model, {"loss_chunk_size": 7})
        assert "logits" not in model(**batch(23))
        with returning_logits():
            assert torch.equal(model(**batch(23)).logits, expected)
        assert "logits" not in model(**batch(23))
        model = convert_to_mini_sequence(copy.deepcopy(reference), {"return_logits": True, "chunk_size": 7})
        torch.testing.assert_close(model(**batch(23)).logits, expected)


def test_nobody_sees_deferred_logits():
    model, seen = build("llama"), []
    convert_to_mini_sequence(model, {"loss_chunk_size": 7})
    model.register_forward_hook(lambda m, args, out: seen.append(out))
    model(**batch(23))
    loss, *rest = model(**batch(23), return_dict=False)
    assert loss.dim() == 0 and not any(isinstance(t, DeferredLogits) for t in tree_leaves(rest))
    assert isinstance(seen[0], ModelOutput) and list(seen[0].keys()) == ["loss"]


def test_error_in_forward_disarms_the_head():
    model, _ = pair(process=lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**data())
    assert type(model.lm_head) is nn.Linear and not [k for k in model.__dict__ if k.startswith("_mini_sequence_a")]


def test_interrupted_inference_leaves_other_models_tiled():
    model, other = twins("llama")
    for m in (model, other):
        convert_to_mini_sequence(m, {"chunk_size": 3})
    handle = model.model.layers[0].mlp.act_fn.register_forward_pre_hook(lambda *_: raise_(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(batch(23)["input_ids"])
    handle.remove()
    rows = []
    for m in (other, model):
        m.model.layers[0].mlp.act_fn.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
        loss_and_grads(m, batch(23))
    assert set(rows) <= {1, 3}


def raise_(error):
    raise error


def test_interrupted_forward_is_cleaned_up_by_the_next():
    interrupt = [True]

    def process(x):
        if interrupt.pop() if interrupt else False:
            raise KeyboardInterrupt
        return x

    model, reference = pair(process=process)
    with pytest.raises(KeyboardInterrupt):
        model(**data())
    assert_same_loss(model, reference, data())
    assert type(model.lm_head) is nn.Linear


def test_a_trainer_with_its_own_head_is_told_once(caplog):
    model, _ = twins("llama")
    convert_to_mini_sequence(model, {"loss_chunk_size": 7})

    def fused(input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        loss = F.cross_entropy((hidden @ model.lm_head.weight.t()).flatten(0, 1), labels.flatten())
        return Output(loss=loss)

    model.forward = fused
    with caplog.at_level(logging.WARNING, logger="ds_minis"):
        model(**batch(23)), model(**batch(23))
    assert len(caplog.records) == 1 and "steps aside" in caplog.text
    assert "not tiled" in mini_sequence_report(model).loss
