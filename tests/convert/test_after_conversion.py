"""What is done to a model after its conversion, beside training: it stays tiled and exact."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from models import CHUNKS, LLAMA_CALLS, add_lora, assert_same_training, batch, build, checkpointed, twins

from ds_minis import convert_to_mini_sequence

INPUTS = batch(23, prompt=2, padding=3)


def assert_tiled_and_exact(model, reference, tiled_calls, scope, *, rtol=1e-5, inputs=INPUTS):
    tiled_calls.clear()
    assert_same_training(model, reference, inputs, rtol=rtol)
    assert Counter(name for name, _ in tiled_calls) == LLAMA_CALLS[scope]


CASTS = {
    "to(float64)": lambda m: m.to(torch.float64),
    "double": lambda m: m.double(),
    "to(bfloat16) and back": lambda m: m.to(torch.bfloat16).float(),
    "half and back": lambda m: m.half().float(),
    "to a device": lambda m: m.to("cpu"),
    "to(memory_format)": lambda m: m.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast, tiled_calls, scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_tiled_and_exact(CASTS[cast](model), CASTS[cast](reference), tiled_calls, scope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_a_lower_precision(dtype, tiled_calls, scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert_tiled_and_exact(model.to(dtype), reference.to(dtype), tiled_calls, scope, rtol=0.05)
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_frozen_base_in_bfloat16_with_float32_adapters(tiled_calls, scope):
    model, reference = (add_lora(m.to(torch.bfloat16)) for m in twins("llama"))
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_tiled_and_exact(model, reference, tiled_calls, scope, rtol=0.05)


@pytest.mark.parametrize("vocab_size", [160, 140])
@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
@pytest.mark.parametrize("adapted", [False, True])
def test_resized_embeddings(vocab_size, family, adapted, tiled_calls, scope):
    models = []
    for m in twins(family):
        if not models:
            convert_to_mini_sequence(m, {**CHUNKS, "scope": scope})
        torch.manual_seed(3)
        m.resize_token_embeddings(vocab_size)
        models.append(add_lora(m, modules_to_save=["lm_head", "embed_tokens"]) if adapted else m)
    assert models[0].get_output_embeddings().weight.shape[0] == vocab_size
    inputs = {key: value.clone() for key, value in INPUTS.items()}
    inputs["input_ids"][0, :5] = inputs["labels"][0, :5] = vocab_size - 1
    tiled_calls.clear()
    assert_same_training(*models, inputs)
    assert len(tiled_calls) == sum(LLAMA_CALLS[scope].values())
    assert_same_training(*map(checkpointed, models), inputs)


def test_a_run_goes_on_in_an_unconverted_model_and_back(scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    for source, target in ((model, reference), (reference, model), (model, reference)):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (source, target)]
        source.zero_grad()
        source(**INPUTS).loss.backward()
        optimizers[0].step()
        target.load_state_dict(source.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for _ in range(2):
            assert_same_training(model, reference, INPUTS)
            for optimizer in optimizers:
                optimizer.step()


def test_copies_of_a_model_in_the_middle_of_a_step(tiled_calls, scope):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    loss = model(**INPUTS).loss  # nothing of a forward pass may stay on the modules that could not be copied
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert_tiled_and_exact(duplicate(model), reference, tiled_calls, scope)
    loss.backward()
    for param, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_assigned_weights_from_a_meta_model(tiled_calls, scope):
    reference = build("llama")
    with torch.device("meta"):
        model = type(reference)(reference.config)
    model.config._attn_implementation = "eager"
    convert_to_mini_sequence(model.train(), {**CHUNKS, "scope": scope})
    model.load_state_dict({name: w.clone() for name, w in reference.state_dict().items()}, assign=True)
    model.model.rotary_emb = copy.deepcopy(reference.model.rotary_emb)
    assert_tiled_and_exact(model, reference, tiled_calls, scope)
