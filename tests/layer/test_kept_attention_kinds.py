"""What reviews of `keep: "attention"` found, and what attentions of another kind than transformers' own may do."""

import gc
import weakref

import pytest
import torch
from kept import SETTINGS, Attention, assert_same_gradients_twice, converted, unmasked
from models import assert_same_tensors, assert_same_training, batch, checkpointed, loss_and_grads
from torch.autograd.graph import saved_tensors_hooks
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_minis import mini_sequence_report
from ds_minis.layer.attention import kept_attention
from ds_minis.layer.attention.kept_attention import KeptAttention
from ds_minis.memory.offload import OffloadedTensor
from ds_minis.memory.rematerialize import Copy, Layout, View, copy_of

LAYERS = SETTINGS["layer"]


@pytest.fixture
def attention():
    return Attention()


def two_steps(model, reference, inputs, **kwargs):
    for _ in range(2):
        assert_same_training(model, reference, inputs, **kwargs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_argument_that_is_made_of_weights(settings, reentrant, attention):
    """Of which the reentrant kind of checkpointing shows nothing the first time."""
    model, reference = converted(SETTINGS[settings], attention=attention.name)

    def gated(module, query, key, value, *args, gate=None, **kwargs):
        return sdpa(module, query, key, value + gate, *args, **kwargs)

    sdpa, attention.run = attention.run, gated
    for m in (model, reference):
        checkpointed(m, use_reentrant=reentrant).enable_input_require_grads()
        for layer in m.model.layers:
            part = layer.self_attn
            part.gate = torch.nn.Parameter(torch.linspace(-1, 1, 16))
            part.register_forward_pre_hook(_with_gate, with_kwargs=True)
    two_steps(model, reference, unmasked(23))
    assert model.model.layers[0].self_attn.gate.grad.any()


def _with_gate(module, args, kwargs):
    return args, {**kwargs, "gate": torch.sigmoid(module.gate)}


def _scaled_by_chance(*args, scaling=None, **kwargs):
    return sdpa_attention_forward(*args, scaling=scaling * (1 + float(torch.rand(()))), **kwargs)


def test_random_numbers_of_an_attention_in_a_tiled_layer(attention):
    """They come from a seed of their own: whether its output is kept makes no difference."""
    attention.run = _scaled_by_chance
    runs = []
    for keep in ("attention", "input"):
        model, _ = converted({"keep": keep}, attention=attention.name)
        loss_and_grads(model, unmasked(23))
        torch.manual_seed(7)
        attention.calls = 0
        runs.append((*loss_and_grads(model, unmasked(23)), attention.calls))
    assert [run[2] for run in runs] == [2, 4]
    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert_same_tensors(runs[0][1], runs[1][1])


@pytest.mark.parametrize("how", [torch.contiguous_format, torch.preserve_format])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("settings", ["layer"])
def test_saved_tensor_hooks_that_copy(settings, family, how):
    """Queries, keys and values then come back in other places (phi3 and gpt_neox: of one tensor all three)."""
    model, reference = (checkpointed(m, use_reentrant=True) for m in converted(SETTINGS[settings], family))
    for m in (model, reference):
        m.enable_input_require_grads()
    with saved_tensors_hooks(lambda t: t.detach().clone(memory_format=how), lambda t: t):
        two_steps(model, reference, unmasked(23))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_single_token(settings):
    """The output is the values then."""
    inputs = unmasked(1, batch_size=3)
    two_steps(*converted(SETTINGS[settings]), inputs | {"shift_labels": inputs["input_ids"]})


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_loss_that_is_given_up_leaves_nothing_behind(settings, monkeypatch):
    model, _ = converted(SETTINGS[settings])
    inputs, made = batch(23, padding=5), []
    loss_and_grads(model, inputs)
    init = KeptAttention.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append([weakref.ref(self), *map(weakref.ref, self.arguments)])

    monkeypatch.setattr(KeptAttention, "__init__", watched)
    loss = model(**inputs).loss
    del loss
    gc.collect()
    assert len(made) == 2 and all(len(refs) > 1 for refs in made)
    assert all(ref() is None for refs in made for ref in refs)
    made.clear()
    with torch.no_grad():  # scoring, by a model that is being trained
        model(**inputs)
    assert not made


def test_gradients_of_gradients_are_refused():
    model, _ = converted(LAYERS)
    loss = model(unmasked(23)["input_ids"]).logits.float().square().mean()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_backward_twice_through_the_reentrant_kind_of_checkpointing():
    model, reference = (checkpointed(m, use_reentrant=True) for m in converted(LAYERS))
    for m in (model, reference):
        m.enable_input_require_grads()
    assert_same_gradients_twice(model, reference, unmasked(23))


def whole_layers(model) -> set[str]:
    report = mini_sequence_report(model)
    assert not report.layers
    return {reason for name, reason in report.untiled.values() if name == "LlamaDecoderLayer"}


@pytest.mark.parametrize("keep", ["attention", "input"])
def test_an_attention_that_writes_into_its_queries(attention, keep):
    sdpa = attention.run
    attention.run = lambda module, query, *args, **kwargs: sdpa(module, query.mul_(2), *args, **kwargs)
    model, reference = converted({"keep": keep}, attention=attention.name)
    two_steps(model, reference, unmasked(23))
    assert whole_layers(model) == {"its attention function writes to its queries, keys or values"}


@pytest.mark.parametrize("keep", ["attention", "input"])
def test_an_attention_that_is_checkpointed_by_itself(attention, keep):
    sdpa = attention.run

    def checkpointing(module, query, key, value, mask, **kwargs):
        run = lambda *heads: sdpa(module, *heads, mask, **kwargs)[0]  # noqa: E731
        return torch.utils.checkpoint.checkpoint(run, query, key, value, use_reentrant=True), None

    attention.run = checkpointing
    model, reference = converted({"keep": keep}, attention=attention.name)
    two_steps(model, reference, unmasked(23))
    (reason,) = whole_layers(model)
    assert reason.startswith("its attention's backward fails where it is run apart from the layer's (RuntimeError")


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_of_no_numbers_changes_nothing_for_the_next(settings, sdpa_masks):
    model, reference = converted(SETTINGS[settings])
    assert_same_training(model, reference, batch(23, padding=5))
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    before = weight.clone()
    weight.fill_(float("nan"))
    loss_and_grads(model, batch(23, padding=5))
    weight.copy_(before)
    assert_same_training(model, reference, batch(23, padding=5))
    sdpa_masks.clear()
    loss_and_grads(model, batch(23, padding=5))
    assert len(sdpa_masks) == 2


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_attention_that_reads_a_weight_of_its_module(settings, trained, attention, told):
    """An added weight is not saved, but has a gradient; a frozen one is saved, and an engine may have taken it away."""
    model, reference = converted(SETTINGS[settings], attention=attention.name)
    sdpa = attention.run

    def reading(module, query, key, value, *args, **kwargs):
        value = value + module.weight if trained else value * module.weight
        return sdpa(module, query, key, value, *args, **kwargs)

    attention.run = reading
    for m in (model, reference):
        for layer in m.model.layers:
            layer.self_attn.weight = torch.nn.Parameter(torch.linspace(0.5, 1, 16), requires_grad=trained)
    two_steps(model, reference, unmasked(23))
    assert told() == ["its attention reads weights"]


def test_a_mask_is_kept_by_nobody_a_second_time():
    """Neither as it is given, as numbers, nor made from one of booleans."""
    model, _ = converted({"offload": "cpu"})
    store = model.model.layers[0].mini_sequence_chunking.layer_inputs
    masks = torch.zeros(2, 1, 23, 23).masked_fill(torch.ones(23, 23).triu(1) > 0, -1e9)
    for inputs in (batch(23, padding=5), unmasked(23) | {"attention_mask": masks}):
        loss = model(**inputs).loss
        # Inputs and outputs of 64 numbers for each token, a log-sum-exp for each of 4 heads, in blocks of powers of two.
        assert store.host.host_bytes_in_use == 2 * (2**14 + 2**14 + 2**10)
        loss.backward()


def test_kept_tensors_are_brought_back_once_each_in_the_order_of_backward(monkeypatch):
    model, _ = converted({"offload": "cpu"}, num_hidden_layers=4)
    loss_and_grads(model, unmasked(23))
    loss, brought, kept, init, bring = None, [], [], OffloadedTensor.__init__, OffloadedTensor.bring
    monkeypatch.setattr(OffloadedTensor, "__init__", lambda self, *args: kept.append(self) or init(self, *args))
    monkeypatch.setattr(OffloadedTensor, "bring", lambda self: brought.append(kept.index(self)) or bring(self))
    loss = model(**unmasked(23)).loss
    loss.backward()
    assert len(kept) == 12
    assert brought == sorted(set(brought), reverse=True) and set(brought) >= set(range(6))


HEADS = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
COPIES = {
    "as it is": HEADS.clone(),
    "transposed": HEADS.transpose(1, 2).contiguous(),
    "in another order": HEADS.transpose(1, 2).contiguous().transpose(1, 2),
    "repeated": HEADS.repeat_interleave(2, 1),
    "repeated and transposed": HEADS.repeat_interleave(2, 1).transpose(1, 2).contiguous(),
    "rounded": HEADS.bfloat16(),
    "no numbers": None,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_made_again_to_the_bit(name):
    heads = HEADS.clone()
    if name == "no numbers":
        heads[0, 0, 0, 0], heads[0, 0, 0, 1] = float("nan"), -0.0
    t = heads.clone() if name == "no numbers" else COPIES[name]
    copy = copy_of(t, [(torch.zeros(2, 3, 5, 4), View.like(heads, "zeros", 0)), (heads, View.like(heads, "heads", 0))])
    again = copy.of({"heads": [heads]})
    assert (again.shape, again.stride(), again.dtype) == (t.shape, t.stride(), t.dtype)
    assert torch.equal(again.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
    t[-1, -1, -1, -1] += 1
    assert copy_of(t, [(heads, View.like(heads, "heads", 0))]) is None


def test_masks_are_made_again():
    mask = torch.ones(2, 1, 5, 5).tril() > 0
    numbers = torch.zeros(2, 1, 5, 5).masked_fill(~mask, -torch.inf).expand(2, 3, 5, 5)
    copy = copy_of(numbers, [(mask, View.like(mask, "arguments", 0))])
    again = copy.of({"arguments": [mask]})
    assert torch.equal(again, numbers) and again.stride() == numbers.stride()


def test_layouts():
    """Two of one tensor, and an expanded one."""

    def three():
        both = torch.arange(48.0).view(2, 4, 6)
        return [both[:, :, :2], both[:, :, 2:], torch.arange(3.0).view(3, 1).expand(3, 4)]

    tensors = three()
    layout = Layout(tensors)
    assert layout.of(tensors) is tensors
    placed = layout.of([t.clone() for t in three()])
    assert all(map(torch.equal, placed, tensors))
    assert [t.stride() for t in placed] == [t.stride() for t in tensors]
    assert torch.equal(placed[0].as_strided((2, 4, 4), (24, 6, 1), 2), tensors[1])


def test_values_are_searched_at_the_first_call_alone(monkeypatch):
    """Keys and values, repeated for each query head: later calls compare with what was found, whatever the length."""
    model, reference = converted(LAYERS, num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=8)
    searched, compared = [], []
    search, compare = kept_attention.copy_of, Copy.is_of
    monkeypatch.setattr(kept_attention, "copy_of", lambda *args: searched.append(1) or search(*args))
    monkeypatch.setattr(Copy, "is_of", lambda *args: compared.append(1) or compare(*args))
    assert_same_training(model, reference, batch(37, padding=5))
    assert searched
    searched.clear()
    for length in (37, 23, 51):
        compared.clear()
        assert_same_training(model, reference, batch(length, padding=5))
        assert not searched and 0 < len(compared) <= 3 * len(model.model.layers)


def test_what_was_a_copy_once_and_is_none_now_is_kept(attention):
    """A factor of one at first: nothing is taken for granted."""
    factor = torch.ones(())
    sdpa = attention.run
    attention.run = lambda module, q, k, v, *args, **kwargs: sdpa(module, q, k * factor, v * factor, *args, **kwargs)
    model, reference = converted(LAYERS, attention=attention.name)
    for value in (1.0, 0.5, 2.0, 1.0):
        factor.fill_(value)
        assert_same_training(model, reference, unmasked(23))
