"""What only a GPU can show. Skipped without one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import CHUNKS, assert_same_training, batch, build, checkpointed, loss_and_grads, twins

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.loss.kernels import cross_entropy
from ds_minis.tiling.core import grad_accum

pytestmark = pytest.mark.gpu


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_loss_and_gradients(family):
    model, reference = (checkpointed(m.cuda()) for m in twins(family))
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, on_gpu(batch(43, prompt=5, padding=4)), rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [
        {"head_groups": "auto"},
        {"offload": "cpu"},
        {"keep": "attention"},
        {"keep": "attention", "offload": "cpu"},
        {"head_groups": 2, "offload": "cpu"},
    ],
)
def test_settings_of_layers(settings, attention):
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    model, reference = (m.cuda() for m in twins("llama", attention=attention, **sizes))
    convert_to_mini_sequence(model, CHUNKS | settings)
    for length in (43, 17, 43):  # host memory is used again
        assert_same_training(model, reference, on_gpu(batch(length, prompt=5, padding=4)), rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"offload": "cpu"}, {"scope": "tokens"}], ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_an_attention_that_is_kept_runs_once(padding, settings, monkeypatch):
    """With the kernels that run in bfloat16: what they save beside their output must be known for what it is."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "head_dim": 64}
    model, reference = (checkpointed(m.cuda().bfloat16()) for m in twins("llama", attention="sdpa", **sizes))
    convert_to_mini_sequence(model, {"chunk_size": 50, "keep": "attention"} | settings)
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    for length in (200, 128):
        inputs = on_gpu(batch(length, padding=padding))
        assert_same_training(model, reference, inputs, rtol=5e-2)
        calls.clear()
        loss_and_grads(model, inputs)
        assert len(calls) == 2


@pytest.mark.parametrize("settings", [{}, {"offload": "auto"}], ids=str)
def test_free_memory_is_used_once_a_step_was_seen(settings):
    """By default, and nobody's statistics are set back for it."""
    model, reference = (checkpointed(m.cuda()) for m in twins("llama", attention="sdpa"))
    convert_to_mini_sequence(model, CHUNKS | settings)
    everything = torch.empty(2**27, device="cuda")  # a peak that hides those of steps
    del everything
    peak = torch.cuda.max_memory_allocated()
    for number, length in enumerate((43, 17, 43, 44, 44)):
        assert_same_training(model, reference, on_gpu(batch(length, padding=4)), rtol=1e-4)
        kept = mini_sequence_report(model).last_kept
        assert kept.startswith("2 layers kept everything") == (number not in (0, 3)), (length, kept)
    assert torch.cuda.max_memory_allocated() == peak


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 37, 8191, 8192, 50257, 128256])
def test_the_kernel_of_the_loss(vocab_size, dtype):
    """Against float64: losses, gradients beside the logits, and gradients in their place."""
    pytest.importorskip("triton")
    kernel, _ = cross_entropy.kernel()
    torch.manual_seed(0)
    logits, target = torch.randn(67, vocab_size, device="cuda").mul_(4).to(dtype), torch.arange(67, device="cuda")
    target = (target * 997 % vocab_size).masked_fill(target % 5 == 0, -100)
    wide, weights = logits.double().requires_grad_(), torch.linspace(-1, 2, 67, device="cuda")
    exact = F.cross_entropy(wide, target, reduction="none")
    losses, normalizers = kernel.losses(logits, target, -100, None)
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    rounding = {"rtol": max(1e-4, torch.finfo(dtype).eps), "atol": 1e-6}
    (gradient,) = torch.autograd.grad(exact, wide, weights.double(), retain_graph=True)
    made = kernel.gradients(logits, target, -100, normalizers, weights)
    torch.testing.assert_close(made.double(), gradient, **rounding)
    (gradient,) = torch.autograd.grad(exact.sum(), wide, torch.tensor(0.3, device="cuda").double())
    kernel.losses(logits, target, -100, torch.tensor(0.3, device="cuda"))
    torch.testing.assert_close(logits.double(), gradient, **rounding)


def test_the_kernel_beyond_2_to_the_31_elements():
    """The last rows' offsets do not fit into 32 bits."""
    pytest.importorskip("triton")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    vocab_size, num_rows = 128257, 17000
    logits = torch.zeros(num_rows, vocab_size, device="cuda", dtype=torch.bfloat16)
    target = torch.arange(num_rows, device="cuda")
    last = torch.randn(3, vocab_size, device="cuda").bfloat16()
    logits[-3:] = last
    losses, _ = cross_entropy.kernel()[0].losses(logits, target, -100, torch.tensor(1.0, device="cuda"))
    expected = F.cross_entropy(last.float(), target[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:], expected, rtol=1e-5, atol=1e-5)
    gradient = last.float().softmax(-1) - F.one_hot(target[-3:], vocab_size)
    torch.testing.assert_close(logits[-3:].float(), gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_added_to_a_float32_sum_on_the_device(dtype):
    left, right = (torch.randn(257, n, device="cuda", dtype=dtype) for n in (129, 64))
    sums = grad_accum.GradientSums([torch.empty(129, 64, device="cuda", dtype=dtype).requires_grad_()])
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        sums.add_product(0, left, right)
    assert sums.sums[0].dtype == torch.float32
    exact = 3 * left.double().t() @ right.double()
    assert (sums.sums[0] - exact).norm() <= 1e-5 * exact.norm()  # a product rounded to 16 bits would be off by 1e-3
    assert grad_accum.addmm_takes(left.device, dtype)


def test_the_head_of_a_bfloat16_model():
    """The kernel and the sum in float32, within a step; at most as far from float64 as the plain model."""
    model, reference = (m.cuda().bfloat16() for m in twins("llama"))
    exact = copy.deepcopy(reference).double()
    convert_to_mini_sequence(model, CHUNKS)
    results = {m: loss_and_grads(m, on_gpu(batch(43))) for m in (model, reference, exact)}
    for name, grad in results[exact][1].items():
        errors = [(results[m][1][name].double() - grad).norm() / grad.norm() for m in (model, reference)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3, (name, errors)


def test_peak_memory_falls():
    peaks = []
    for converted in (False, True):
        model = checkpointed(build("llama").cuda())
        if converted:
            convert_to_mini_sequence(model, {"chunk_size": 1024, "loss_chunk_size": 256, "keep": "input"})
        inputs = on_gpu(batch(128, batch_size=256))
        loss_and_grads(model, inputs)
        torch.cuda.reset_peak_memory_stats()
        loss_and_grads(model, inputs)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0], peaks
