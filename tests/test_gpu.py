"""What only a GPU can show. Skipped without one."""

import copy

import pytest
import torch
from models import assert_same_training, batch, build, checkpointed, loss_and_grads, twins

from ds_minis import convert_to_mini_sequence

pytestmark = pytest.mark.gpu
CHUNKS = {"chunk_size": 10, "loss_chunk_size": 7}


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_loss_and_gradients(family):
    model, reference = (checkpointed(m.cuda()) for m in twins(family))
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, on_gpu(batch(43, prompt=5, padding=4)), rtol=1e-4)


def test_dropout_replays_the_random_state_of_the_device():
    """A gradient that used another mask than forward did would differ from the one of a second, equal run."""
    model = build("llama").cuda()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))
    convert_to_mini_sequence(model, CHUNKS | {"scope": "mlp"})
    reference = copy.deepcopy(model)
    runs = []
    for m in (model, checkpointed(reference)):
        torch.manual_seed(0)
        runs.append(loss_and_grads(m, on_gpu(batch(43))))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    for name, grad in runs[0][1].items():
        torch.testing.assert_close(grad, runs[1][1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_bfloat16_autocast():
    model, reference = (m.cuda() for m in twins("llama"))
    convert_to_mini_sequence(model, CHUNKS)
    results = []
    for m in (model, reference):
        with torch.autocast("cuda", torch.bfloat16):
            loss = m(**on_gpu(batch(43))).loss
        m.zero_grad()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in m.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=0)
    for name, grad in results[1][1].items():
        assert (results[0][1][name] - grad).norm() <= 0.03 * grad.norm(), name


def test_peak_memory_falls():
    peaks = []
    for converted in (False, True):
        model = checkpointed(build("llama").cuda())
        if converted:
            convert_to_mini_sequence(model, {"chunk_size": 1024, "loss_chunk_size": 256})
        inputs = on_gpu(batch(128, batch_size=256))
        loss_and_grads(model, inputs)
        torch.cuda.reset_peak_memory_stats()
        loss_and_grads(model, inputs)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0], peaks
