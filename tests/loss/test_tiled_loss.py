"""The tiled loss against the same model's own loss: options, adapters, hooks, interrupted runs, what is given back."""

import copy
import functools
import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from heads import CHUNK, LOSS_ONLY, H, LargestTensor, Model, Output, V, assert_same_loss, data, flat, own_loss, pair
from models import add_lora, assert_same_training, batch, build, loss_and_grads, twins
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.loss.forward.output_logits import returning_logits

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


def test_a_global_hook_sees_the_logits():
    model, reference = pair()
    double = lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_same_loss(model, reference, data())
    finally:
        handle.remove()


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


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"smoothing", "smoothing-sum", "smoothing-none"}))
def test_nll_loss_of_log_probabilities(name):
    """As in ProphetNet: the loss in two steps."""
    options = {key: value for key, value in OPTIONS[name].items() if key != "label_smoothing"}

    def loss(x, t, m):
        return F.nll_loss(x.view(-1, V).log_softmax(-1, dtype=torch.float32), t.clamp(min=0).view(-1), **options)

    model, reference = own_loss(loss)
    assert_same_loss(model, reference, data())
    with LargestTensor(V) as largest:
        model(**data()).loss.sum().backward()
    assert largest.rows <= max(CHUNK, H)


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


def test_a_hook_that_was_on_the_model_before_sees_what_the_caller_gets():
    model, _ = twins("llama")
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(list(output)))
    convert_to_mini_sequence(model, {"loss_chunk_size": 7})
    assert list(model(**batch(23))) == ["loss"] and seen == [["loss"]]


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


def test_inference_can_be_tiled_on_request(scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {"chunk_size": 4, "tile_inference": True, "scope": scope})
    rows = []
    own = model.model.layers[0].mlp.down_proj.forward
    model.model.layers[0].mlp.down_proj.forward = lambda x: rows.append(x.numel() // x.shape[-1]) or own(x)
    inputs = batch(23)
    del inputs["labels"]
    with torch.no_grad():
        model(**inputs)  # the first call of each class verifies it on some rows
        rows.clear()
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
    # Two tokens of each sequence; a whole layer's last chunk has three, as none is of a single token.
    assert max(rows) == (6 if scope == "layer" else 4)


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
        act_fn = m.model.layers[0].mlp.act_fn
        loss_and_grads(m, batch(23))  # the first call of each module verifies it on some rows
        act_fn.forward = lambda x, own=act_fn.forward: rows.append(x.shape[-2]) or own(x)
        loss_and_grads(m, batch(23))
    assert set(rows) <= {2, 3} and rows  # tokens of each sequence in a chunk: two, the last one three


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


@pytest.mark.engine
def test_a_head_that_fsdp1_wraps_alone_is_refused():
    """Each chunk of the loss would gather it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, reference = twins("llama")
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in heads)
        heads = [model.lm_head, reference.lm_head]
        fsdp = functools.partial(FullyShardedDataParallel, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        assert fsdp(reference)(**batch(23)).loss > 0
        with pytest.raises(RuntimeError, match='FullyShardedDataParallel was applied to an LM head.*"loss": false'):
            fsdp(convert_to_mini_sequence(model, {"loss_chunk_size": 7}))(**batch(23))
    finally:
        dist.destroy_process_group()


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
