"""What the report says of the last step: how many chunks it had, or that nothing was cut. And evaluations with labels."""

import pytest
import torch
from models import assert_same_training, batch, build
from transformers import DynamicCache

from ds_minis import convert_to_mini_sequence, mini_sequence_report


def last_step(model) -> str:
    lines = str(mini_sequence_report(model)).splitlines()
    return next((line for line in lines if line.startswith("  the last step: ")), "")


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_a_short_input_with_all_defaults_is_said_to_be_in_one_piece(scope, tiled_calls):
    model, reference = build("llama"), build("llama")
    convert_to_mini_sequence(model, {"scope": scope})
    assert last_step(model) == ""  # nothing has run
    assert_same_training(model, reference, batch(23))
    assert {name for name, _ in tiled_calls} == {"Linear"}
    assert "nothing was cut: 46 tokens fit into one chunk of 1,024" in last_step(model)


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_chunks_of_the_last_step_are_counted(scope):
    model, reference = build("llama"), build("llama")
    convert_to_mini_sequence(model, {"chunk_size": 8, "scope": scope})
    assert_same_training(model, reference, batch(23))
    assert "46 tokens in 6 chunks of at most 8" in last_step(model)
    assert_same_training(model, reference, batch(4))
    assert "nothing was cut: 8 tokens" in last_step(model)
    with torch.no_grad():
        model.eval()(**batch(23))  # an evaluation is no step
    assert "nothing was cut: 8 tokens" in last_step(model)


def test_parts_tell_where_no_layer_is_tiled():
    model, reference = build("llama"), build("llama")
    convert_to_mini_sequence(model, {"chunk_size": 8})
    assert_same_training(model, reference, batch(23))
    assert_same_training(model, reference, batch(5), use_cache=True)  # layers are run as a whole, by parts
    assert "10 tokens in 2 chunks of at most 8" in last_step(model)


def with_cache_by_default(**settings):
    model = build("llama")
    model.config.use_cache = True  # transformers' default
    return convert_to_mini_sequence(model.eval(), settings) if settings else model.eval()


def test_an_evaluation_with_labels_makes_no_cache_and_tiles_its_layers(tiled_calls):
    model, reference = with_cache_by_default(chunk_size=8), with_cache_by_default()
    with torch.no_grad():
        output, expected = model(**batch(23, padding=5)), reference(**batch(23, padding=5))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    assert tiled_calls.count(("LlamaDecoderLayer", 46)) == 2
    assert output.past_key_values is None
    assert mini_sequence_report(model).layers.keys() == {"model.layers.0", "model.layers.1"}


def test_an_evaluation_that_asks_for_a_cache_gets_one(tiled_calls):
    model, reference = with_cache_by_default(chunk_size=8), with_cache_by_default()
    for asked in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with torch.no_grad():
            output, expected = model(**batch(23), **asked), reference(**batch(23), use_cache=True)
        assert output.past_key_values.get_seq_length() == 23
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    assert not any(name == "LlamaDecoderLayer" for name, _ in tiled_calls)


def test_without_labels_a_cache_is_made_as_ever(tiled_calls):
    model, reference = with_cache_by_default(chunk_size=8), with_cache_by_default()
    ids = batch(23)["input_ids"]
    with torch.no_grad():
        output, expected = model(input_ids=ids), reference(input_ids=ids)
        model(**batch(23))  # and an evaluation in between changes nothing
        again = model(input_ids=ids)
    assert output.past_key_values.get_seq_length() == again.past_key_values.get_seq_length() == 23
    assert torch.equal(output.logits, expected.logits) and torch.equal(again.logits, expected.logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4), reference.generate(ids, max_new_tokens=4))
