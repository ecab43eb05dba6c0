"""The loss of a chunk inside of a step: whose memory it may write over, and what the step needs at its peak."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from heads import CHUNK, LOSS_ONLY, H, Model, Output, V, assert_same_loss, data, pair
from live_bytes import LiveBytes
from models import CHUNKS, batch, twins
from torch import nn

from ds_minis import convert_to_mini_sequence
from ds_minis.config import MiniSequenceConfig
from ds_minis.loss.heads.tiled_sum import sum_rows
from ds_minis.loss.kernels import cross_entropy
from ds_minis.loss.kernels.cross_entropy import token_losses
from ds_minis.tiling.core import grad_accum
from ds_minis.tiling.modules.state import Chunking

MIB = 2**20


def test_the_kernel_under_tritons_interpreter():
    pytest.importorskip("triton")
    file = Path(__file__).with_name("test_cross_entropy_rows.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "35 passed" in run.stdout and "skipped" not in run.stdout, (
        run.stdout[-5000:] + run.stderr[-2000:]
    )


@pytest.mark.parametrize("with_loss, with_gradient", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(capability, with_loss, with_gradient, tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from ds_minis.loss.kernels.cross_entropy_kernel import loss_of_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "normalizers": "*fp32", "gradients": "*bf16"}
    numbers = {"row_stride": "i32", "gradient_stride": "i32", "factor_stride": "i32", "vocab_size": "i32"}
    constants = {"WITH_LOSS": with_loss, "WITH_GRADIENT": with_gradient, "BLOCK": 8192}
    types = pointers | numbers | {"factors": "*fp32", "ignore_index": "i64"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in loss_of_rows.arg_names}
    source = compiler.ASTSource(fn=loss_of_rows, signature=signature, constexprs=constants)
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
    for rows_of in ["logits"] + ["gradients"] * with_gradient:  # the row times its stride, in 64 bits
        assert re.search(rf"%{rows_of}\w* = arith.muli [^\n]* : i64", compiled.asm["ttir"])


@pytest.fixture
def forget_the_kernel():
    """Whether Triton works is found out once in a process."""
    cross_entropy.kernel.cache_clear()
    yield
    cross_entropy.kernel.cache_clear()


def test_without_triton_the_loss_is_computed_by_torch(monkeypatch, forget_the_kernel):
    monkeypatch.delattr("ds_minis.loss.kernels.cross_entropy_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ds_minis.loss.kernels.cross_entropy_kernel", raising=False)
    assert cross_entropy.kernel() == (None, "")


def test_where_the_kernel_cannot_be_launched_the_loss_is_computed_by_torch(monkeypatch, forget_the_kernel):
    """No compiler, say; here there is no device."""
    kernel = types.SimpleNamespace(losses=lambda *_: None)
    monkeypatch.setattr("ds_minis.loss.kernels.cross_entropy_kernel", kernel, raising=False)
    monkeypatch.setitem(sys.modules, "ds_minis.loss.kernels.cross_entropy_kernel", kernel)
    monkeypatch.setattr(torch, "zeros", _fail)
    found, reason = cross_entropy.kernel()
    assert found is None and "cannot be launched here (RuntimeError: Failed to find C compiler)" in reason


def test_each_model_is_told_once_that_torch_computes_its_loss(monkeypatch, caplog):
    """Not each process: the second model's user reads another log."""
    monkeypatch.setattr("ds_minis.loss.heads.chunked_head.implementation", lambda tensor: (None, "no kernel here"))
    for _ in range(2):
        model, _ = twins("llama")
        convert_to_mini_sequence(model, CHUNKS)
        for _ in range(2):
            model(**batch(23)).loss.backward()
    assert caplog.text.count("no kernel here") == 2


def _fail(*_, **__):
    raise RuntimeError("Failed to find C compiler")


def test_triton_is_not_imported_for_the_cpu():
    code = "import sys, torch, ds_minis.loss.forward.forward_hooks; "
    code += "from ds_minis.loss.kernels.cross_entropy import token_losses as t; "
    code += "t(torch.randn(3, 5), torch.tensor([1, 2, 3]), -100); "
    code += "assert 'ds_minis.loss.kernels.cross_entropy_kernel' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What makes the logits of the product x @ w.t(), and whether it leaves them to the loss alone.
MAKERS = {
    "product": (lambda y: y, True),
    "cast": (lambda y: y.float(), True),
    "scale": (lambda y: y * 0.5, True),
    "softcap": (lambda y: 3 * torch.tanh(y / 3), True),
    "tanh": (torch.tanh, False),
    "exp": (torch.exp, False),
    "square": (lambda y: y.square(), False),
    "view": (lambda y: y.view_as(y), False),
    "slice": (lambda y: y[:, 1:], False),
    "cast that does nothing": (lambda y: y.view_as(y).to(y.dtype), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_only_memory_that_is_nobody_elses_is_written_over(name, dtype):
    make, written = MAKERS[name]
    torch.manual_seed(0)
    x, w = torch.randn(7, H, dtype=dtype, requires_grad=True), torch.randn(V, H, dtype=dtype, requires_grad=True)
    target = torch.randint(0, V - 1, (7,))
    logits = make(x @ w.t())
    before, factor = logits.detach().clone(), torch.tensor(0.3)
    losses = token_losses(logits, target, -100, expected=factor)
    assert torch.equal(logits, before) is not written
    grads = torch.autograd.grad(losses.sum(), [x, w], factor)
    reference = F.cross_entropy(make(x @ w.t()).float(), target, reduction="none")
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, torch.autograd.grad(reference.sum(), [x, w], factor), strict=True):
        error = (grad - expected).float().norm() / expected.float().norm()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_nothing_is_written_over_where_the_gradient_is_not_known():
    x = torch.randn(7, H, requires_grad=True)
    logits = x @ torch.randn(H, V)
    before = logits.detach().clone()
    losses, weights = token_losses(logits, torch.arange(7), -100), torch.linspace(-1, 2, 7)
    for _ in range(2):
        (grad,) = torch.autograd.grad(losses, x, weights, retain_graph=True)
        (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(7), reduction="none"), x, weights, True)
        torch.testing.assert_close(grad, expected)
        assert torch.equal(logits, before)


def test_a_head_that_keeps_its_logits_keeps_them():
    class Keeps(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.kept = linear, []

        def forward(self, x):
            self.kept.append(self.linear(x))
            return self.kept[-1]

    class Own(Model):
        def __init__(self):
            super().__init__()
            self.lm_head = Keeps(self.lm_head)

    model, reference = convert_to_mini_sequence(Own(), LOSS_ONLY), Own()
    assert_same_loss(model, reference, data())
    kept = torch.cat([logits.flatten(0, -2) for logits in model.lm_head.kept if logits.shape[0]])[-46:]
    torch.testing.assert_close(kept, reference.lm_head.kept[-1].flatten(0, 1))


PROCESSES = {
    "upcast": lambda x: x.float(),
    "softcap": lambda x: 3 * torch.tanh(x / 3),
    "softcap in float32": lambda x: 3 * torch.tanh(x.float() / 3),
    "softcap, upcast": lambda x: (3 * torch.tanh(x / 3)).float(),
    "tanh": lambda x: x.tanh(),
    "tanh in place": lambda x: x.tanh_(),
    "upcast, tanh": lambda x: x.float().tanh(),
    "upcast, slice": lambda x: x.float()[..., : V - 3],
    "upcast in two steps": lambda x: x.half().float(),
    "upcast, downcast": lambda x: x.float().bfloat16(),
    "upcast to float64": lambda x: x.double(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PROCESSES)
def test_what_is_done_to_bfloat16_logits_before_the_loss(name, bias):
    model, reference = pair(process=PROCESSES[name], dtype=torch.bfloat16, bias=bias)
    inputs = data()
    inputs["labels"] = inputs["labels"].clamp(max=V - 4)
    grads = []
    for m in (model, reference):
        loss = m(**inputs).loss
        loss.backward()
        grads.append((loss.detach(), m.lm_head.weight.grad, m.embed.weight.grad))
    assert grads[0][0].dtype == grads[1][0].dtype
    for actual, expected in zip(*grads, strict=True):
        assert (actual - expected).float().norm() <= 0.01 * expected.float().norm()


CASTS = {  # of the model, then of its logits: whether the loss may take them as they were before the last cast
    "upcast": (torch.bfloat16, lambda x: x.float(), True),
    "by to": (torch.float16, lambda x: x.to(torch.float32), True),
    "by type_as": (torch.bfloat16, lambda x: x.type_as(torch.zeros(1)), True),
    "upcast, view": (torch.bfloat16, lambda x: x.float().view(-1, V), True),
    "upcast, scale": (torch.bfloat16, lambda x: x.float() * 2, False),
    "upcast, slice": (torch.bfloat16, lambda x: x.float()[..., 1:], False),
    "rounded": (torch.float32, lambda x: x.bfloat16(), False),
    "rounded after an upcast": (torch.bfloat16, lambda x: (x.float() * 3).half(), False),
    "to float64": (torch.bfloat16, lambda x: x.double(), False),
    "from float64": (torch.float64, lambda x: x.float(), False),
    "none": (torch.float32, lambda x: x.float(), False),
}


@pytest.mark.parametrize("name", CASTS)
def test_only_a_last_cast_that_rounds_nothing_is_left_out(name):
    dtype, cast, left_out = CASTS[name]
    seen = []

    def process(logits):
        result = cast(logits)
        seen.append(
            (
                result.dtype,
                result.expression().before_upcast() is not result.expression(),
                result.expression().before_upcast().sample_0V.dtype,
            )
        )
        return result

    model, _ = pair(process=process, dtype=dtype)
    inputs = data()
    model(inputs["input_ids"], labels=inputs["labels"].clamp(max=V - 2))
    ((result_dtype, changed, dtype_before),) = seen
    assert changed is left_out
    assert dtype_before == (dtype if left_out else result_dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_with_a_loss_scale(reduction):
    """Of 40,000 tokens: without the scale, which comes in backward, the mean's gradient would have few bits."""
    grads = []
    for dtype, converted in ((torch.float16, True), (torch.float16, False), (torch.float64, False)):
        model = Model(dtype=torch.float16, reduction=reduction).to(dtype)
        if converted:
            convert_to_mini_sequence(model, {"loss_chunk_size": 7000})
        loss = model(**data(20_000)).loss
        (loss.float().sum() * (2.0**14 if reduction == "mean" else 0.1)).backward()
        grads.append({name: p.grad.double() for name, p in model.named_parameters()})
    actual, plain, exact = grads
    for name, grad in exact.items():
        errors = [(mine[name] - grad).norm() / grad.norm() for mine in (actual, plain)]
        assert errors[0] <= 1.5 * errors[1] < 0.1, (name, errors)


@pytest.mark.parametrize("process", [None, "softcap", "tanh"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"ignore_index": 7}])
@pytest.mark.parametrize("chunk_rows", [CHUNK, 1000])
def test_a_graph_that_is_kept_and_used_again(process, options, chunk_rows):
    process = PROCESSES[process] if process else lambda x: x
    model, reference = (Model(process=process, **options) for _ in range(2))
    convert_to_mini_sequence(model, {"loss_chunk_size": chunk_rows})
    inputs = data() if "ignore_index" not in options else {k: v.clamp(min=0) for k, v in data().items()}
    losses = [m(**inputs).loss.sum() for m in (model, reference)]
    for factor in (1.0, -2.0, 3.0):
        for loss in losses:
            (loss * factor).backward(retain_graph=True)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_a_head_in_autocast(dtype):
    """The head's gradient is summed in float32: nearer to the exact one than torch's own, which is rounded first."""
    results = []
    for m in pair(bias=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = m(**data(200)).loss
        loss.backward()
        results.append((loss.detach(), m.lm_head.weight.grad, m.lm_head.bias.grad, m.embed.weight.grad))
    assert results[0][1].dtype == torch.float32
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()


class Head(nn.Module):
    """What `sum_rows` is given: a head and the loss of its logits."""

    def __init__(self, vocab_size, hidden_size, dtype):
        super().__init__()
        self.linear = nn.Linear(hidden_size, vocab_size, bias=False, dtype=dtype)

    def losses(self, hidden, target, expected=None):
        return token_losses(self.linear.forward(hidden), target, -100, expected)


def step(num_rows, vocab_size, hidden_size, chunk_rows, dtype):
    head, hidden = Head(vocab_size, hidden_size, dtype), torch.randn(num_rows, hidden_size, dtype=dtype)
    hidden.requires_grad_()
    target, factor = torch.randint(0, vocab_size, (num_rows,)), torch.tensor(1 / num_rows)
    function = lambda *chunk: head.losses(*chunk, expected=factor)  # noqa: E731
    with LiveBytes(apart=(hidden, target, factor, head.linear.weight)) as live:
        sum_rows(function, head, [hidden, target], chunk_rows, factor).backward(factor)
    return live.peak, head, hidden, target, factor


@pytest.mark.parametrize("chunk_rows", [512, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_buffer_of_logits_and_one_sum_of_the_weight_gradient(dtype, chunk_rows, monkeypatch):
    monkeypatch.setattr(grad_accum, "PRODUCT_ELEMENTS", 2**18)
    monkeypatch.setitem(cross_entropy.BLOCK_ELEMENTS, "meta", cross_entropy.BLOCK_ELEMENTS["cpu"])
    num_rows, vocab_size, hidden_size = 2048, 4001, 512
    with torch.device("meta"):  # products in bfloat16 take a minute on some processors
        peak, *_ = step(num_rows, vocab_size, hidden_size, chunk_rows, dtype)
    size = dtype.itemsize
    logits, hidden_grad = chunk_rows * vocab_size * size, num_rows * hidden_size * size
    weight_sum, weight_grad = vocab_size * hidden_size * 4, vocab_size * hidden_size * (2 if size == 2 else 0)
    if chunk_rows == num_rows:  # nothing to sum
        weight_sum, weight_grad = vocab_size * hidden_size * size, 0
    # Beside the logits: a chunk's gradient of its hidden states, or blocks: 2**18 logits in float32 a few times.
    beside = max(chunk_rows * hidden_size * size, 3 * MIB)
    assert peak < max(logits + beside, weight_grad) + weight_sum + hidden_grad + MIB


@pytest.mark.parametrize("chunk_rows", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradients_of_that_step(dtype, chunk_rows):
    _, head, hidden, target, factor = step(256, 1001, 64, chunk_rows, dtype)
    reference = F.cross_entropy(F.linear(hidden, head.linear.weight).float(), target, reduction="sum") * factor
    expected = torch.autograd.grad(reference, [hidden, head.linear.weight])
    for actual, exact in zip((hidden.grad, head.linear.weight.grad), expected, strict=True):
        assert (actual - exact).float().norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * exact.float().norm()


@pytest.mark.parametrize("in_blocks", [True, False])
def test_the_weight_gradient_of_many_chunks_is_summed_in_float32(in_blocks, monkeypatch):
    """Summed in bfloat16, 128 chunks would be 2% off."""
    if in_blocks:
        monkeypatch.setattr(grad_accum, "PRODUCT_ELEMENTS", 100)
    _, head, hidden, target, factor = step(2048, 101, 64, 16, torch.bfloat16)
    wide = head.linear.weight.detach().double().requires_grad_()
    (F.cross_entropy(F.linear(hidden.double(), wide), target, reduction="sum") * factor).backward()
    assert (head.linear.weight.grad - wide.grad).norm() <= 5e-3 * wide.grad.norm()


def test_the_loss_stage_at_the_size_of_llama_3_8b(monkeypatch):
    """On meta tensors: at most 3 bytes x hidden size per token above the hidden states, the weight's buffers aside."""
    num_rows, vocab_size, hidden_size = 262_144, 128_256, 4096
    chunk_rows = Chunking(MiniSequenceConfig(), hidden_size).loss_rows(2 * num_rows * hidden_size, 2 * vocab_size)
    monkeypatch.setitem(cross_entropy.BLOCK_ELEMENTS, "meta", 2**25)  # fewer blocks: quicker here
    monkeypatch.setattr(grad_accum, "PRODUCT_ELEMENTS", 2**26)
    with torch.device("meta"):
        peak, *_ = step(num_rows, vocab_size, hidden_size, chunk_rows, torch.bfloat16)
    weight_sum = 4 * vocab_size * hidden_size
    assert peak - weight_sum <= 3 * num_rows * hidden_size


def test_the_loss_of_a_model_holds_no_float32_copy_of_a_chunk():
    """transformers casts all logits to float32 before the loss."""
    num_tokens, vocab_size, hidden_size = 16384, 1001, 64

    class Upcast(Model):
        def forward(self, input_ids, labels=None):
            hidden = self.embed(input_ids)
            with LiveBytes(apart=(hidden, labels, self.lm_head.weight)) as self.live:
                loss = F.cross_entropy(self.lm_head(hidden).float().flatten(0, 1), labels.flatten())
            return Output(loss=loss)

    model = Upcast()
    model.embed, model.lm_head = nn.Embedding(V, hidden_size), nn.Linear(hidden_size, vocab_size, bias=False)
    model.to(torch.bfloat16)
    convert_to_mini_sequence(model, {"loss_chunk_size": num_tokens // 2})
    model(**data(num_tokens // 2))
    one_chunk, hidden_grad = num_tokens // 2 * vocab_size * 2, num_tokens * hidden_size * 2
    assert model.live.peak < one_chunk + hidden_grad + 4 * MIB  # 15.6 + 2 + 4; a float32 copy would be 31 more
