"""What a note on torch's out-of-memory error says: the place where memory ran out, and what needs less there."""

import copy

import pytest
import torch
from models import assert_same_training, batch, build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ds_minis import convert_to_mini_sequence, mini_sequence_report

NOTED_CHUNKS = {"chunk_size": 10, "loss_chunk_size": 8}
TOKENS = 46  # 2 x 23


class Attention:
    """Raises in forward or in backward, for all tokens of a batch and not for the few of a first call's questions."""

    fails, error = "", torch.OutOfMemoryError("tried to allocate 2 GiB")

    def __init__(self):
        self.heads: list[int] = []

    def __call__(self, module, query, key, value, *args, **kwargs):
        out, weights = eager_attention_forward(module, query, key, value, *args, **kwargs)
        if query.shape[2] * query.shape[0] == TOKENS:
            self.heads.append(query.shape[1])
            if self.fails == "forward":
                raise type(self.error)(*self.error.args)
            out = _Backward.apply(out, self)
        return out, weights


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, attention):
        ctx.attention = attention
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.attention.fails == "backward":
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return grad, None


@pytest.fixture
def attention(monkeypatch):
    own = Attention()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "of_this_test", own)
    return own


class Full(TorchDispatchMode):
    """There is no memory for what one operation gives, in one shape."""

    def __init__(self, name: str, shape: tuple[int, ...], error: Exception | None = None):
        super().__init__()
        self._name, self._shape, self.raised = name, shape, 0
        self._error = error or torch.OutOfMemoryError("tried to allocate 2 GiB")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == self._name and result.shape == self._shape:
            self.raised += 1
            raise self._error
        return result


def converted(**settings):
    model = build("llama", attention="of_this_test" if settings.pop("own_attention", False) else "eager")
    return convert_to_mini_sequence(copy.deepcopy(model), NOTED_CHUNKS | settings), model


@pytest.fixture(scope="module")
def warm_model():
    """Behind its first call; an error leaves nothing behind."""
    model, _ = converted()
    model(**batch(23)).loss.backward()
    return model


def note(model, inputs) -> str:
    """The one note on the error of a training step, whose type and message are torch's."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(**inputs).loss.backward()
    assert caught.value.args == ("tried to allocate 2 GiB",)
    (found,) = caught.value.__notes__
    return found


@pytest.mark.parametrize(
    ("settings", "says", "is_silent_of"),
    [
        ({}, ['"head_groups": "auto"', "all heads at once", '"offload": "cpu"', "sequence parallelism"], []),
        ({"head_groups": 2}, ['"head_groups": "auto"', "now 2 groups"], []),
        ({"head_groups": "auto", "offload": "cpu"}, ["shorter sequences"], ["head_groups", "offload"]),
        ({"keep": "attention"}, ['"keep": "input"'], ["head_groups"]),
    ],
    ids=["defaults", "two groups", "all that there is", "kept"],
)
def test_the_attention(attention, settings, says, is_silent_of):
    model, twin = converted(own_attention=True, **settings)
    inputs = batch(23)
    model(**inputs).loss.backward()
    model.zero_grad()
    for attention.fails in ("forward", "backward"):
        text = note(model, inputs)
        assert f"in the attention of a LlamaDecoderLayer, which is run for all {TOKENS} tokens" in text
        assert "no chunk size changes that" in text and all(words in text for words in says)
        assert not any(words in text for words in is_silent_of)
    attention.fails = ""
    model.zero_grad()
    assert_same_training(model, twin, inputs)


def test_a_first_call_asks_with_a_few_tokens():
    def forward(x):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    model, _ = converted()
    model.model.layers[0].mlp.act_fn.forward = forward
    assert "while a few tokens were asking whether a module can be tiled" in note(model, batch(23))


@pytest.mark.parametrize(
    ("operation", "shape", "says"),
    [
        ("new_empty", (2, 23, 32), ["for the input or the result of a LlamaDecoderLayer", '"offload": "cpu"']),
        ("new_empty", (2, 23, 4, 8), ["in the attention of a LlamaDecoderLayer"]),  # queries
        ("mm", (48, 32), ["for the gradients of weights, which no chunk size changes", "LoRA"]),
        ("mm", (10, 48), ["in a chunk, of 10 of 46 rows", 'smaller "chunk_size"']),
        ("mm", (8, 131), ["in a chunk of the loss, of 8 of 46 rows", 'smaller "loss_chunk_size"']),
    ],
    ids=["layer input", "queries", "weight gradients", "chunk", "loss"],
)
def test_every_other_place(warm_model, operation, shape, says):
    model, inputs = warm_model, batch(23)
    with Full(operation, shape) as memory:
        text = note(model, inputs)
    assert memory.raised == 1 and all(words in text for words in says), text
    assert ("chunk_size" in text) == any("chunk_size" in words for words in says)


def test_too_little_memory_for_a_group_of_heads_is_no_reason_to_take_all_at_once(attention):
    model, _ = converted(own_attention=True, head_groups=2)
    inputs = batch(23)
    model(**inputs).loss.backward()
    attention.fails, attention.error = "forward", RuntimeError("DefaultCPUAllocator: can't allocate memory")
    attention.heads.clear()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        model(**inputs)
    assert "in the attention of a LlamaDecoderLayer" in caught.value.__notes__[0]
    assert attention.heads == [2] and not mini_sequence_report(model).one_call


@pytest.mark.parametrize("cpu", [True, False])
def test_the_error_of_torchs_allocator_on_a_cpu_has_no_type_of_its_own(warm_model, cpu):
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes" if cpu else "another error"
    with Full("mm", (10, 48), RuntimeError(words)), pytest.raises(RuntimeError, match=words) as caught:
        warm_model(**batch(23))
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == cpu and all("in a chunk, of 10 of 46 rows" in note for note in notes)


def test_the_papers_setting_is_named_where_it_is_what_was_set():
    model = convert_to_mini_sequence(build("llama"), {"num_mini_sequences": 4})
    model(**batch(23)).loss.backward()
    with Full("mm", (12, 48)):
        assert 'A larger "num_mini_sequences"' in note(model, batch(23))


def test_what_ran_as_without_ds_minis_since_nothing_was_cut(attention):
    """As was seen: "outside of what is tiled: no chunk size changes that", where a smaller one does."""
    model, _ = converted(own_attention=True, chunk_size=50)  # a layer, in its attention
    attention.fails = "forward"
    texts = [note(model, batch(23))]
    model = convert_to_mini_sequence(build("llama"), {"scope": "mlp", "chunk_size": 50})
    with Full("mm", (46, 48)):
        texts.append(note(model, batch(23)))
    for text in texts:
        assert "in a chunk, of 46 rows, all that there are" in text and 'A smaller "chunk_size"' in text
        assert "outside" not in text


def test_outside_of_what_is_tiled(attention):
    model, _ = converted(own_attention=True, exclude=["layers.1", "layers.1.*"])
    model(**batch(23)).loss.backward()
    attention.fails = "forward"
    attention_of = type(model.model.layers[1].self_attn).__name__
    model.model.layers[0].forward = lambda x, *args, **kwargs: x  # the first one is tiled
    text = note(model, batch(23))
    assert f"in a {attention_of}, outside of what is tiled: no chunk size changes that" in text
    assert "mini_sequence_report(model)" in text and "activation checkpointing" in text and '"scope"' not in text


def test_outside_of_a_narrower_scope(attention):
    model, _ = converted(own_attention=True, scope="tokens")
    attention.fails = "forward"
    assert '"scope": "layer" (now "tokens")' in note(model, batch(23))
