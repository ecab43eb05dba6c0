"""Whole layers over chunks, however they are used: what is refused, what else holds their tensors, what is left of a step."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import (
    CHUNKS,
    LLAMA_CALLS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    checkpointed,
    count_layers,
    loss_and_grads,
    twins,
    with_class,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ds_minis import convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence
from ds_minis.layer.analysis.analysis import LayerProbe
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.tiling.modules.tiled_module import TiledModule

LAYERS = ("model.layers.0", "model.layers.1")


class MixesTokens(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 0.1 * hidden_states.cumsum(1)


class MixesTokensInBackward(LlamaDecoderLayer):
    """A weight that starts at zero: what is mixed with it does not show in the result."""

    def forward(self, hidden_states, **kwargs):
        mixed = hidden_states.mean(1, keepdim=True) * (
            self.input_layernorm.weight - self.input_layernorm.weight.detach()
        )
        return super().forward(hidden_states, **kwargs) + mixed


class KeepsState(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        self.number_of_tokens = getattr(self, "number_of_tokens", 0) + hidden_states.shape[1]
        return super().forward(hidden_states, **kwargs)


class WritesToItsInput(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states.mul_(1.5), **kwargs)


class AttendsTwice(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(super().forward(hidden_states, **kwargs), **kwargs)


class AttendsToFewer(LlamaDecoderLayer):
    """Its keys are those of other tokens too: a mean of all is one of the arguments of its attention."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mask = attention_mask + hidden_states.detach().mean()
        return super().forward(hidden_states, attention_mask=mask, **kwargs)


class RefusesShortInputs(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] < 12:
            raise ValueError("too short")
        return super().forward(hidden_states, **kwargs)


REFUSED = {
    MixesTokens: "depend on others, other than by way of its attention",
    MixesTokensInBackward: "depend on others, other than by way of its attention",
    KeepsState: "it keeps state from one call to the next (number_of_tokens)",
    WritesToItsInput: "it writes to its input, which others may read",
    AttendsTwice: "it calls the attention interface 2 times, not once",
    AttendsToFewer: "its attention's argument 0 is made in the layer",
    RefusesShortInputs: "it fails on a part of the tokens (ValueError: too short)",
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cls", REFUSED)
def test_a_layer_that_cannot_be_tiled_is_run_as_a_whole_and_reported(cls, checkpointing):
    model, reference = (with_class(m, cls) for m in twins("llama"))
    if checkpointing and cls is not WritesToItsInput:  # which torch runs again on what was written
        checkpointed(model), checkpointed(reference)
    convert_to_mini_sequence(model, CHUNKS)
    for batch_size in (2, 1):
        assert_same_training(model, reference, batch(23, batch_size=batch_size))
    report = mini_sequence_report(model)
    assert not report.layers and {report.untiled[layer][0] for layer in LAYERS} == {cls.__name__}
    assert all(REFUSED[cls] in report.untiled[layer][1] for layer in LAYERS)
    assert model.model.layers[0].__dict__.keys() == {
        *reference.model.layers[0].__dict__,
        *(f"mini_sequence_{name}" for name in ("chunking", "name", "analyses")),
    }


class ScalesTokens(LlamaDecoderLayer):
    """An argument with a number for each token, in one of the forms that it may have."""

    def forward(self, hidden_states, scale, **kwargs):
        return super().forward(hidden_states * scale[..., None], **kwargs)


@pytest.mark.parametrize("shape", [(23,), (1, 23), (2, 23)])
def test_arguments_with_a_position_for_each_token(shape):
    layer, plain, x, kwargs = layers_alone(ScalesTokens)
    scale = torch.rand(shape) + 0.5

    def use(layer, x):
        return layer(x, scale=scale, **kwargs)

    assert_same_tensors(grads_of(layer, x, use), grads_of(plain, x, use))
    (analysis,) = layer.mini_sequence_analyses.values()
    assert analysis.reason == ""


def test_an_argument_that_requires_a_gradient():
    """It would get none: the hidden states are all that is differentiated."""
    layer, plain, x, kwargs = layers_alone(ScalesTokens)
    found = []
    for m in (layer, plain):
        scale = torch.linspace(0.5, 1.5, 23).requires_grad_()
        grads = grads_of(m, x, lambda m, x, scale=scale: m(x, scale=scale, **kwargs))
        found.append(grads | {"scale": scale.grad})
    assert_same_tensors(*found)
    (analysis,) = layer.mini_sequence_analyses.values()
    assert analysis.reason == "its argument 'scale' requires a gradient"


class GivesTuple(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs), None


class GivesMore(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs), hidden_states.mean()


def layers_alone(cls=LlamaDecoderLayer, batch_size: int = 2):
    """A converted layer, its unconverted twin, an input, and the rest of the arguments."""
    model, reference = (with_class(m, cls) for m in twins("llama"))
    convert_to_mini_sequence(model, CHUNKS)
    torch.manual_seed(3)
    x = torch.randn(batch_size, 23, 32)
    positions = model.model.rotary_emb(x, torch.arange(23)[None])
    return model.model.layers[0], reference.model.layers[0], x, {"position_embeddings": positions}


def grads_of(layer, x, use):
    """What `use(layer, x)` gives, and the gradients of the input and of all weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = use(layer, x * 1)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}}


@pytest.mark.parametrize(("cls", "tiled"), [(GivesTuple, True), (GivesMore, False)])
def test_layers_that_give_tuples(cls, tiled):
    layer, plain, x, kwargs = layers_alone(cls)

    def use(layer, x):
        y, other = layer(x, **kwargs)
        assert (other is None) == tiled
        return y

    assert_same_tensors(grads_of(layer, x, use), grads_of(plain, x, use))
    (analysis,) = layer.mini_sequence_analyses.values()
    assert analysis.reason == ("" if tiled else "it gives more than hidden states")


class OffloadedTensor:
    """Uses of a layer in which somebody else holds the gradient that comes in, or its memory."""

    def __init__(self):
        self.seen = []

    def keep(self, grad):
        self.seen.append(grad)

    def residual(self, layer, x, kwargs):
        return x + layer(x, **kwargs)

    def hook(self, layer, x, kwargs):
        y = layer(x, **kwargs)
        y.register_hook(self.keep)
        return y * 1

    def hook_that_keeps_a_view(self, layer, x, kwargs):
        y = layer(x, **kwargs)
        y.register_hook(lambda grad: self.keep(grad[0, 3:]))
        return y * 1

    def hook_that_keeps_what_it_is_a_view_of(self, layer, x, kwargs):
        flat = layer(x, **kwargs).view(-1)
        flat.register_hook(self.keep)
        return flat * 1

    def hook_that_keeps_the_storage(self, layer, x, kwargs):
        y = layer(x, **kwargs)
        y.register_hook(lambda grad: self.keep(torch.empty(0).set_(grad.untyped_storage(), 0, grad.shape)))
        return y * 1

    def retained(self, layer, x, kwargs):
        y = layer(x, **kwargs)
        y.retain_grad()
        self.keep(y)
        return y * 1

    def two_uses(self, layer, x, kwargs):
        y = layer(x, **kwargs)
        z = y.view(-1)
        return torch.cat([z, y.flatten() * 2]).view(2, -1)

    def twice_through_it(self, layer, x, kwargs):
        return layer(layer(x, **kwargs), **kwargs)

    def backward_hook_of_the_module(self, layer, x, kwargs):
        handle = layer.register_full_backward_hook(lambda module, before, after: self.keep(after[0]))
        y = layer(x, **kwargs)
        handle.remove()
        return y * 1


USES = [name for name in vars(OffloadedTensor) if not name.startswith("_") and name != "keep"]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", USES)
def test_a_gradient_that_somebody_holds_is_not_written_over(name, batch_size):
    layer, plain, x, kwargs = layers_alone(batch_size=batch_size)
    found = []
    for m in (layer, plain):
        kept = OffloadedTensor()
        grads = grads_of(m, x, lambda m, x, kept=kept: getattr(kept, name)(m, x, kwargs))
        seen = [t.grad if t.requires_grad else t for t in kept.seen]
        found.append(grads | {f"kept {i}": t.detach().clone() for i, t in enumerate(seen)})
    assert_same_tensors(*found)
    assert len(found[0]) == 11 + (name not in ("residual", "two_uses", "twice_through_it"))


def test_a_gradient_that_the_caller_gave_is_not_written_over():
    layer, _, x, kwargs = layers_alone()
    grad = torch.randn_like(x)
    before = grad.clone()
    layer(x.requires_grad_(), **kwargs).backward(grad)
    assert torch.equal(grad, before)


@pytest.mark.parametrize(
    "use", [lambda y: y.sum(), lambda y: (y.transpose(0, 1) * torch.arange(23.0)[:, None, None]).sum()]
)
def test_a_gradient_that_is_not_laid_out_like_the_input(use):
    layer, plain, x, kwargs = layers_alone()
    found = []
    for m in (layer, plain):
        leaf = x.clone().requires_grad_()
        use(m(leaf * 1, **kwargs)).backward()
        found.append({"x": leaf.grad, **{n: p.grad for n, p in m.named_parameters()}})
    assert_same_tensors(*found)


@pytest.mark.parametrize("view", [False, True])
def test_a_gradient_that_nobody_holds_is_written_over(view):
    """The gradient of the layer's input takes its memory."""
    layer, _, x, kwargs = layers_alone()
    x, places = x.requires_grad_() * 1, []
    x.register_hook(lambda grad: places.append(grad.data_ptr()))
    y = layer(x, **kwargs)
    y.register_hook(lambda grad: places.append(grad.data_ptr()))
    ((y.view(-1) if view else y) * 2).sum().backward()
    assert len(places) == 2 and places[0] == places[1]


def test_backward_twice():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    found = []
    for m in (model, reference):
        loss = m(**batch(23)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({n: p.grad for n, p in m.named_parameters()})
    assert_same_tensors(*found)
    assert count_layers(model) == 2


def test_a_loss_on_all_hidden_states():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    found = []
    for m in (model, reference):
        out = m(**batch(23), output_hidden_states=True)
        assert len(out.hidden_states) == 3
        for hidden in out.hidden_states:
            hidden.retain_grad()
        (out.loss + sum(h.square().mean() for h in out.hidden_states)).backward()
        found.append({n: p.grad for n, p in m.named_parameters()})
        found[-1] |= {f"hidden {i}": h.grad for i, h in enumerate(out.hidden_states)}
    assert_same_tensors(*found)
    assert count_layers(model) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_given_by_the_caller_get_their_gradient(checkpointing):
    model, reference = twins("llama")
    if checkpointing:
        checkpointed(model), checkpointed(reference)
    convert_to_mini_sequence(model, CHUNKS)
    found = []
    for m in (model, reference):
        embeds = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        m(inputs_embeds=embeds, labels=batch(23)["labels"]).loss.backward()
        found.append({"embeds": embeds.grad, **{n: p.grad for n, p in m.named_parameters() if p.grad is not None}})
    assert_same_tensors(*found)


@pytest.mark.parametrize("frozen", [("embed",), ("embed", "layers.0"), ("embed", "layers.0", "layers.1.self_attn")])
def test_frozen_first_layers(frozen):
    model, reference = twins("llama")
    for m in (model, reference):
        for name, param in m.named_parameters():
            param.requires_grad_(not any(part in name for part in frozen))
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 2


def test_weights_frozen_after_the_first_step():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    for part in ("", "layers.0", "mlp", "k_proj"):
        for m in (model, reference):
            for name, param in m.named_parameters():
                param.requires_grad_(not part or part not in name)
        assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 2


def test_one_layer_called_twice():
    model, reference = twins("llama")
    for m in (model, reference):
        m.model.layers[1] = m.model.layers[0]
    convert_to_mini_sequence(model, CHUNKS)
    for _ in range(2):
        assert_same_training(model, reference, batch(23))
    assert count_layers(model) == 1


def test_earlier_tokens_in_a_cache(tiled_calls):
    """A call with a cache is run as it is, and is right."""
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    inputs, found = batch(40), []
    for m in (model, reference):
        m.zero_grad()
        with torch.no_grad():
            cache = m(inputs["input_ids"][:, :17], use_cache=True).past_key_values
        rest = {name: inputs[name][:, 17:] for name in ("input_ids", "labels")}
        tiled_calls.clear()
        loss = m(**rest, past_key_values=cache, use_cache=True).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in m.named_parameters()}})
        assert not any(name == "LlamaDecoderLayer" for name, _ in tiled_calls)
    assert_same_tensors(*found)
    assert_same_training(model, reference, batch(23))
    assert ("LlamaDecoderLayer", 46) in tiled_calls


def test_a_cache_that_is_asked_for_and_one_that_is_there_by_default(tiled_calls):
    model, reference = twins("llama")
    for m in (model, reference):
        m.config.use_cache = True
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    assert ("LlamaDecoderLayer", 46) in tiled_calls
    tiled_calls.clear()
    assert_same_training(model, reference, batch(23), use_cache=True)
    assert {name for name, _ in tiled_calls} == {"LlamaMLP", "LlamaRMSNorm", "Linear"}
    # `past_key_values` before transformers 5.24, `cache` from then on
    assert "is a DynamicCache, which may hold anything" in mini_sequence_report(model).untiled[LAYERS[0]][1]
    tiled_calls.clear()
    assert_same_training(checkpointed(model), checkpointed(reference), batch(23))  # which goes without a cache
    assert ("LlamaDecoderLayer", 46) in tiled_calls


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("wrap", [lambda model: model, add_lora], ids=["model", "adapted"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_made_after_the_first_step(duplicate, wrap):
    """What was found out about a layer names its modules: a copy begins without, and finds out about its own."""
    model, reference = (wrap(m) for m in twins("gemma2"))
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    twin = duplicate(model)
    own = set(twin.modules())
    assert not any(m.mini_sequence_analyses for m in twin.modules() if isinstance(m, TiledLayer))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert_same_training(twin, reference, batch(23))
    analyses = [f for m in twin.modules() if isinstance(m, TiledLayer) for f in m.mini_sequence_analyses.values()]
    unread = [f.dead_values for f in analyses]
    assert analyses and all(u.outputs and {m for m, *_ in u.outputs} | {*u.values_pre_attention} <= own for u in unread)
    assert count_layers(twin) == 2


def class_with(activation):
    """Each of the same name, in the same module."""

    class Layer(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return activation(super().forward(hidden_states, **kwargs))

    return Layer


def test_what_is_not_read_is_asked_of_each_layer(monkeypatch):
    """The third layer only seems to be made as the others: it reads its MLP's result for a gradient."""
    asked, run = [], LayerProbe.by_chunks
    monkeypatch.setattr(LayerProbe, "by_chunks", lambda self, *args: asked.append(self.layer) or run(self, *args))
    model, reference = twins("llama", num_hidden_layers=3)
    for m in (model, reference):
        for layer, activation in zip(m.model.layers, (torch.clone, torch.clone, torch.sin), strict=True):
            layer.__class__ = class_with(activation)
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    layers = list(model.model.layers)
    analyses = [analyses_of(layer)[0] for layer in layers]
    read = [m.mlp.down_proj not in f.dead_values.values_post_attention for m, f in zip(layers, analyses, strict=True)]
    assert read == [False, False, True]
    assert list(map(asked.count, layers)) == [2, 2, 2], "as it is, and without all that nothing reads"


def analyses_of(layer) -> list:
    return list(layer.mini_sequence_analyses.values())


def test_projections_that_need_memory_of_their_own_though_nobody_reads_them(monkeypatch):
    """Rotations of complex numbers take pairs of a projection's elements, which one value in their place does not have."""

    def rotated(queries, keys, cos, sin, **_):
        rotation = torch.complex(cos, sin)[:, None, :, : cos.shape[-1] // 2]

        def rotate(t):
            pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * rotation).flatten(-2)

        return rotate(queries), rotate(keys)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    for layer in model.model.layers:
        attention, dead = layer.self_attn, analyses_of(layer)[0].dead_values
        assert {m for m, *_ in dead.outputs} == {attention.v_proj, layer.input_layernorm}
        assert dead.values_post_attention == (layer.mlp.down_proj,)


def test_a_projection_that_draws_random_numbers_in_one_layer_alone():
    """Which is not seen while a layer is asked: dropout is off then."""
    model, _ = twins("llama")
    for layer, p in zip(model.model.layers, (0.0, 0.3), strict=True):
        layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj, torch.nn.Dropout(p))
    convert_to_mini_sequence(model, CHUNKS)
    loss_and_grads(model, batch(23))
    left_out = [
        layer.self_attn.q_proj in {m for m, *_ in analyses_of(layer)[0].dead_values.outputs}
        for layer in model.model.layers
    ]
    assert left_out == [True, False]


def test_reverted_after_a_step():
    model, reference = twins("llama")
    before = [type(m) for m in model.modules()], [sorted(m.__dict__) for m in model.modules()]
    convert_to_mini_sequence(checkpointed(model), CHUNKS)
    assert_same_training(model, reference, batch(23))
    revert_mini_sequence(model).gradient_checkpointing_disable()
    assert [type(m) for m in model.modules()] == before[0]
    assert_same_training(model, reference, batch(23))
    assert_same_training(checkpointed(model), checkpointed(reference), batch(23))


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_inputs_are_gone_after_backward(batch_size, checkpointing, scope):
    """Also while the loss is still there: it holds the graph, and the graph may hold none of them."""
    model, _ = twins("llama")
    if checkpointing != "off":
        checkpointed(model, use_reentrant=checkpointing == "reentrant")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    seen = []

    def watch(module, args, kwargs):
        seen.append((type(module).__name__, weakref.ref((*args, *kwargs.values())[0])))

    loss_and_grads(model, batch(23, batch_size=batch_size))
    layers = [m for m in model.modules() if isinstance(m, TiledLayer)]
    parts = {
        part for layer in layers for part in layer.modules()
    }  # hooks on them would keep their layer from being tiled
    for module in [*layers, *(m for m in model.modules() if isinstance(m, TiledModule) and m not in parts)]:
        module.register_forward_pre_hook(watch, with_kwargs=True)
    loss = model(**batch(23, batch_size=batch_size)).loss
    loss.backward()
    gc.collect()
    assert {name for name, _ in seen} >= LLAMA_CALLS[scope].keys() - {"Linear"}
    assert count_layers(model) == len(layers) == LLAMA_CALLS[scope].get("LlamaDecoderLayer", 0)
    assert not [name for name, ref in seen if ref() is not None]
    assert loss.grad_fn is not None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_saves_its_input_alone(family):
    """Bytes that autograd holds between forward and backward, attention included: no more than one tensor a layer."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model, _ = twins(family)
    convert_to_mini_sequence(model, {**CHUNKS, "loss": False})
    loss_and_grads(model, batch(100))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(2, 100, 32).requires_grad_()
    positions = model.model.rotary_emb(x, torch.arange(100)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[0](x, position_embeddings=positions)
    assert sum(size for place, size in saved.items() if place not in weights) == x.nbytes
