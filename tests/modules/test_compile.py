"""`torch.compile` of converted models: the loss and every gradient are those of the unconverted, uncompiled model."""

import itertools
import subprocess
import sys

import pytest
import torch
from models import (
    CHUNKS,
    add_lora,
    assert_same_tensors,
    batch,
    checkpointed,
    loss_and_grads,
    twins,
)
from torch._dynamo.utils import counters
from trainers import STEPS, trainer_of

from ds_minis import convert_to_mini_sequence, mini_sequence_report

# In rows (batch size 2), a chunk being 10: not divisible, below one chunk, divisible, exactly one.
LENGTHS = (23, 4, 20, 5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def decoder_layers(model):
    return [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]


def compile_function(model, backend):
    return torch.compile(model, backend=backend)


def compile_method(model, backend):
    model.compile(backend=backend)
    return model


def compile_layers(model, backend):
    for layer in decoder_layers(model):
        layer.compile(backend=backend)
    return model


def compile_attention(model, backend):
    for layer in decoder_layers(model):
        layer.self_attn.compile(backend=backend)
    return model


WAYS = {
    "torch.compile": compile_function,
    "model.compile": compile_method,
    "layer by layer": compile_layers,
    "attention alone": compile_attention,
}


def assert_same_training_when_compiled(compiled, reference, inputs):
    loss, grads = loss_and_grads(compiled, inputs)
    expected_loss, expected = loss_and_grads(reference, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_tensors({name.replace("_orig_mod.", ""): grad for name, grad in grads.items()}, expected)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "lora", "checkpointing"),
    [("torch.compile", *kind) for kind in itertools.product((False, True), repeat=2)]
    + [(way, kind, kind) for way in WAYS if way != "torch.compile" for kind in (False, True)],
)
def test_every_way_to_compile(way, lora, checkpointing, scope, tiled_calls):
    model, reference = twins("llama")
    if lora:
        model, reference = add_lora(model), add_lora(reference)
    if checkpointing:
        checkpointed(model), checkpointed(reference)
    model = WAYS[way](convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}), "eager")
    # Each length may be compiled anew: all of them for one way, whose graphs the other ways' are parts of.
    for length in LENGTHS if (way, lora, checkpointing) == ("torch.compile", False, False) else LENGTHS[:1]:
        tiled_calls.clear()
        assert_same_training_when_compiled(model, reference, batch(length, prompt=2, padding=length // 3))
        assert (("LlamaMLP", 2 * length) in tiled_calls) == (2 * length > CHUNKS["chunk_size"])
    # torch runs a checkpointed layer with a graph break in it uncompiled.
    assert graphs() > 0 or (checkpointing and way == "layer by layer")


def compile_forward(layer):
    layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")


def compile_part(layer):
    layer.mlp = torch.compile(layer.mlp, backend="eager")


def compile_in_place(layer):
    layer.self_attn.compile(backend="eager")


@pytest.mark.parametrize("compile_inside", [compile_forward, compile_part, compile_in_place])
def test_a_layer_with_a_compiled_part_is_not_tiled_as_a_whole(compile_inside):
    """Its graphs would be compiled anew for every chunk. (As was seen: 105 frames and 16 graphs, not 2.)"""
    model, reference = twins("llama", attention="sdpa")
    convert_to_mini_sequence(model, CHUNKS)
    compile_inside(model.model.layers[1])
    assert_same_training_when_compiled(model, reference, batch(23))
    report = mini_sequence_report(model)
    assert list(report.layers) == ["model.layers.0"]
    assert "is compiled by itself" in report.untiled["model.layers.1"][1]


@pytest.mark.parametrize("way", ["torch.compile", "layer by layer"])
def test_compiled_before_the_conversion(way, tiled_calls):
    model, reference = twins("llama")
    compiled = WAYS[way](model, "eager")
    assert_same_training_when_compiled(compiled, reference, batch(23))
    assert not tiled_calls
    convert_to_mini_sequence(compiled, CHUNKS)
    for length in LENGTHS:
        assert_same_training_when_compiled(compiled, reference, batch(length))
    assert ("LlamaMLP", 2 * 23) in tiled_calls


@pytest.mark.parametrize(("backend", "checkpointing"), [("aot_eager", False), ("inductor", True)])
def test_backends_that_compile_the_backward_too(backend, checkpointing):
    model, reference = twins("llama", attention="sdpa")
    if checkpointing:
        checkpointed(model), checkpointed(reference)
    compiled = torch.compile(convert_to_mini_sequence(model, CHUNKS), backend=backend)
    for length in (23, 31, 4):
        assert_same_training_when_compiled(compiled, reference, batch(length))
    assert graphs() > 0


@pytest.mark.parametrize("way", ["torch.compile", "layer by layer", "attention alone"])
def test_another_length_or_number_of_chunks_compiles_nothing_anew(way):
    model, reference = twins("llama")
    model = WAYS[way](convert_to_mini_sequence(model, CHUNKS), "eager")
    for length in (23, 24):  # once as constants, once with lengths as variables
        assert_same_training_when_compiled(model, reference, batch(length))
    before = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (25, 7, 40, 31, 12, 61, 20, 15, 33, 28):
            assert_same_training_when_compiled(model, reference, batch(length))
    assert graphs() == before > 0


def test_passes_without_gradients_are_those_of_the_unconverted_model_and_have_no_break_in_a_layer():
    model, reference = twins("llama")
    compiled = torch.compile(convert_to_mini_sequence(model, CHUNKS), backend="eager")
    inputs = {"input_ids": batch(23)["input_ids"]}
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, reference(**inputs).logits)
    assert not counters["graph_break"]
    assert_same_training_when_compiled(compiled, reference, batch(23))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, reference(**inputs).logits)
        tokens = [
            m.eval().generate(inputs["input_ids"], max_new_tokens=5, do_sample=False) for m in (compiled, reference)
        ]
    assert torch.equal(*tokens)


def test_trainer_with_torch_compile(tmp_path, tiled_calls):
    losses, weights = [], []
    for model, settings in zip(
        twins("llama"), ({"torch_compile": True, "torch_compile_backend": "inductor"}, {}), strict=True
    ):
        if settings:
            convert_to_mini_sequence(model, CHUNKS)
        trainer = trainer_of(
            model, tmp_path, max_steps=STEPS, logging_steps=1, optim="sgd", learning_rate=0.05, **settings
        )
        trainer.train()
        losses.append(
            [log["loss"] for log in trainer.state.log_history if "loss" in log] + [trainer.evaluate()["eval_loss"]]
        )
        weights.append(dict(model.named_parameters()))
    assert graphs() > 0 and tiled_calls
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_tensors(*weights)


def test_import_of_the_product_does_not_import_the_compiler():
    code = "import sys, ds_minis.convert; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
