"""What the report at conversion says of chunk sizes and of what they save, and what it leaves out."""

import types

import pytest
import torch
from models import add_lora, batch, build
from torch.utils._python_dispatch import TorchDispatchMode

from ds_minis import convert_to_mini_sequence, mini_sequence_report

CHUNKS = {"chunk_size": 16, "loss_chunk_size": 8}


def test_nothing_is_said_of_parts_of_layers_where_all_layers_are_tiled():
    text = str(mini_sequence_report(convert_to_mini_sequence(build("llama"))))
    assert "tiled as a whole: 2 x LlamaDecoderLayer" in text and "where their layer is not" not in text
    text = str(mini_sequence_report(convert_to_mini_sequence(build("llama"), exclude=["layers.0"])))
    assert "tiled where their layer is not: 1 x LlamaMLP" in text


def test_chunk_sizes_behind_the_defaults():
    model = build("llama", max_position_embeddings=4096)
    report = mini_sequence_report(convert_to_mini_sequence(model))
    sizes = report.sizes
    # By the rules of "auto": 1,024 tokens of hidden states; of logits as many rows as half of the hidden states' bytes make,
    # and no fewer than 256.
    assert (sizes.num_tokens, sizes.chunk_tokens, sizes.loss_tokens) == (4096, 1024, 500)
    lines = str(report).splitlines()
    assert lines[0].endswith(": all defaults") and lines[1] == "  chunks: 1,024 tokens, of the loss 500"
    assert lines[2].startswith(
        "  saves: a step of 4,096 tokens (float32) holds 1.8 MiB of logits less at its loss, and "
    )


class Largest(TorchDispatchMode):
    """Rows of the largest tensor of some width."""

    def __init__(self, width: int):
        super().__init__()
        self._width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == self._width:
            rows = result.numel() // self._width
            self.rows = max(self.rows, rows if rows != 32 else 0)  # no weight: the hidden size
        return result


def largest(model, inputs, width: int) -> int:
    with Largest(width) as seen:
        model(**inputs).loss.backward()
    return seen.rows


def test_what_is_said_to_be_saved_is_what_a_step_does_not_hold():
    """Rows of logits and of the MLP's activations that exist at once, plain and converted."""
    inputs = batch(64)
    rows = inputs["input_ids"].numel()
    for width, chunk in ((131, 8), (48, 16)):  # vocabulary, intermediate size
        plain, model = build("llama"), convert_to_mini_sequence(build("llama"), CHUNKS)
        model(**inputs).loss.backward()  # the first call verifies
        assert largest(plain, inputs, width) == rows and largest(model, inputs, width) == chunk
    sizes = mini_sequence_report(model).sizes
    assert sizes.num_tokens == 128
    assert sizes.logit_bytes == (128 - 8) * 131 * 4 and sizes.activation_bytes == (128 - 16) * 2 * 48 * 4


def test_what_the_loss_of_somebody_else_did_at_the_last_step():
    model = convert_to_mini_sequence(build("llama"), CHUNKS)
    inputs = batch(23)
    del inputs["labels"]
    for loss, said in (
        (lambda x: x.float().sum(), "by chunks (sum)"),
        (lambda x: x.logsumexp(-1).sum() + x.sort(-1).values.sum(), "by chunks (logsumexp) and from all logits (sort)"),
    ):
        loss(model(**inputs).logits).backward()
        report = mini_sequence_report(model)
        assert report.last_loss == said and f"the loss of the last step: {said}" in str(report)
    model(**inputs)
    assert mini_sequence_report(model).last_loss == ""


def test_a_forward_that_may_compute_the_loss_itself():
    """Somebody may put theirs on the instance before the model is converted, and may or may not use it."""
    model = build("llama")
    own = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: own(*args, **kwargs), model)
    report = mini_sequence_report(convert_to_mini_sequence(model, CHUNKS))
    assert f"{__name__} replaced that forward, and may compute the loss itself" in report.loss
    assert report.loss.startswith("tiled where the model's own forward computes it") and report.sizes.logit_bytes == 0
    assert "logits" not in model(**batch(23))  # the model's own


def test_the_forward_of_trl_is_answered():
    utils = pytest.importorskip("trl.trainer.utils")
    model = build("llama")
    utils.add_fused_lm_head(model)
    report = mini_sequence_report(convert_to_mini_sequence(model, CHUNKS))
    assert "calls with fused_lm_head=True (TRL's trainers) are answered" in report.loss and report.sizes.logit_bytes > 0


def test_a_forward_that_calls_the_models_own_is_no_other_loss():
    model = build("llama")
    model.forward = model.forward
    assert mini_sequence_report(convert_to_mini_sequence(model, CHUNKS)).loss.startswith("tiled, LM head Linear")


def test_a_step_that_is_one_chunk_saves_nothing():
    sizes = mini_sequence_report(convert_to_mini_sequence(build("llama"), loss=False)).sizes
    assert "a step of 128 tokens (float32) holds nothing less, as it is one chunk" in str(sizes)


def test_what_is_saved_is_not_told_where_it_was_not_counted():
    """Bart's projections are in the layers' own forwards: its norms alone are cut."""
    model = convert_to_mini_sequence(build("bart"), chunk_size=10, loss=False)
    assert str(mini_sequence_report(model).sizes) == "  chunks: 10 tokens"


def test_adapters_and_the_papers_number_of_chunks():
    plain = mini_sequence_report(convert_to_mini_sequence(build("llama"), num_mini_sequences=4)).sizes
    adapted = mini_sequence_report(convert_to_mini_sequence(add_lora(build("llama")), num_mini_sequences=4)).sizes
    assert plain == adapted and plain.chunk_tokens == 32
