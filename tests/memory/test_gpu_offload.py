"""Layer inputs in host memory where copies run beside the computation. Skipped without a CUDA device."""

import gc
import random

import pytest
import torch
from test_offload import keep_all, layers, loss_of

from ds_minis.memory.host_memory import host_bytes_needed
from ds_minis.memory.offload import HostStore

pytestmark = pytest.mark.gpu
MIB = 2**20
BUSY = 200_000_000  # cycles, about a tenth of a second
SHAPE = (3, 1000, 4099)  # 46.9 MiB in float32: three blocks, the last one filled in part


def layer_inputs(number, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(number)]


@pytest.fixture(autouse=True)
def clean_device():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["reversed", "forward", "random", "twice reversed"])
def test_any_order_to_the_bit(order, dtype):
    tensors = layer_inputs(6, dtype=dtype)
    kept = keep_all(HostStore(), tensors)
    indices = list(range(6))
    if order == "random":
        indices = random.Random(0).choices(indices, k=30)
    elif order != "forward":
        indices = indices[::-1] * (2 if order == "twice reversed" else 1)
    for i in indices:
        y = kept[i].fetch()
        assert (y.shape, y.dtype, y.device) == (tensors[i].shape, dtype, tensors[i].device)
        assert torch.equal(y.view(torch.uint8), tensors[i].view(torch.uint8))


@pytest.mark.parametrize("name", ["transposed", "view", "empty", "one"])
def test_other_arrangements(name):
    base = layer_inputs(1)[0]
    views = {"transposed": base.mT, "view": base[1:, 5:, 7:], "empty": base[:0], "one": base[1, 2, 3]}
    store = HostStore()
    kept, _ = store.keep(views[name]), store.keep(base)
    for _ in range(2):
        assert torch.equal(kept.fetch(), views[name])


def keep_and_fetch(store, tensors):
    kept = keep_all(store, tensors)
    fetched = [k.fetch() for k in kept[::-1]]
    for k in kept:
        k.release()
    return fetched


def test_the_host_never_waits():
    """Everything is asked for while the device is busy, and is right when it is not."""
    store, tensors = HostStore(), layer_inputs(5)
    keep_and_fetch(store, tensors)  # allocates all memory, for which CUDA may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * BUSY)
    slept = torch.cuda.Event()
    slept.record()
    fetched = keep_and_fetch(store, tensors)
    assert not slept.query(), "the host has waited for the device"
    assert all(torch.equal(*pair) for pair in zip(fetched, tensors[::-1], strict=True))


def test_copies_run_beside_the_computation():
    store, tensors, slept = HostStore(), layer_inputs(4), torch.cuda.Event()
    keep_and_fetch(store, tensors)
    torch.cuda.synchronize()
    kept = [store.keep(x) for x in tensors]
    torch.cuda._sleep(20 * BUSY)
    slept.record()
    kept[3].last_copy.synchronize()
    assert not slept.query(), "a copy to the host waited for what came after it"
    torch.cuda.synchronize()
    for k in kept[:0:-1]:
        k.fetch()
    torch.cuda._sleep(20 * BUSY)
    slept.record()
    kept[0].last_copy.synchronize()
    assert not slept.query(), "a copy to the device waited for what came after it"


def test_memory_that_is_dropped_at_once_is_not_used_before_it_is_copied():
    """What is computed next gets the memory of what was kept: in the order of the streams, never of the host."""
    store, tensors = HostStore(), layer_inputs(6)
    kept = []
    for x in tensors:
        torch.cuda._sleep(BUSY // 10)
        y = x.clone()
        kept.append(store.keep(y))
        del y
        for _ in range(3):
            torch.full(SHAPE, -1.0, device="cuda")
    for k, x in zip(kept[::-1], tensors[::-1], strict=True):
        assert torch.equal(k.fetch(), x)
        torch.full(SHAPE, -2.0, device="cuda")


def test_blocks_are_used_again_only_behind_the_copies_out_of_them():
    store, tensors = HostStore(), layer_inputs(8)
    for _ in range(3):
        kept = keep_all(store, tensors[:4])
        fetched = [k.fetch() for k in kept[::-1]]
        for k in kept:
            k.release()
        others = keep_all(store, tensors[4:])  # into the same blocks, while those copies may be under way
        assert all(torch.equal(*pair) for pair in zip(fetched, tensors[3::-1], strict=True))
        assert all(torch.equal(k.fetch(), x) for k, x in zip(others[::-1], tensors[:3:-1], strict=True))


def test_what_is_dropped_while_it_is_brought_is_not_used_before():
    store, tensors = HostStore(), layer_inputs(4)
    for _ in range(5):
        kept = keep_all(store, tensors)
        for k in kept[:1:-1]:
            k.fetch()
        del k, kept  # while a tensor is being brought into its memory
        ones = [torch.ones(SHAPE, device="cuda") for _ in range(4)]
        assert all(bool((x == 1).all()) for x in ones)
    assert store.host_bytes_in_use == 0


def test_device_memory_of_two_at_most_is_held_in_forward_and_backward():
    store, (x,) = HostStore(), layer_inputs(1)
    size = x.nbytes + 2 * MIB
    torch.cuda.reset_peak_memory_stats()
    before, kept = torch.cuda.memory_allocated(), []
    for i in range(12):
        kept.append(store.keep(x + i))
    assert torch.cuda.memory_allocated() - before <= 2 * size
    assert torch.cuda.max_memory_allocated() - before <= 3 * size
    torch.cuda.reset_peak_memory_stats()
    for i in reversed(range(12)):
        y = kept.pop().fetch()
        assert torch.equal(y[0, 0], x[0, 0] + i)
        del y
    assert torch.cuda.max_memory_allocated() - before <= 2 * size
    assert torch.cuda.memory_allocated() == before


def test_pinned_memory_is_as_stated_and_allocated_once():
    store, tensors, pointers = HostStore(), layer_inputs(4), []
    for _ in range(3):
        kept = keep_all(store, tensors)
        assert all(block.is_pinned() for k in kept for block in k.blocks)
        assert store.host_bytes_in_use == store.host_bytes_peak == host_bytes_needed(4, [torch.empty(SHAPE)])
        pointers.append({block.data_ptr() for k in kept for block in k.blocks})
        assert len(pointers[0]) == 12 and pointers[-1] == pointers[0]
        for k in kept[::-1]:
            k.fetch()
            k.release()
    assert store.host_bytes_in_use == 0


def test_a_write_into_what_is_being_copied_is_an_error():
    store, (x, y) = HostStore(), layer_inputs(2)
    torch.cuda._sleep(BUSY)
    store.keep(x)
    kept = store.keep(y)
    y.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        kept.fetch()


@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_of_a_stack_of_layers(backwards):
    weights = [w.detach().cuda().requires_grad_() for w in layers(number=6, width=512)]
    x = torch.randn(4, 8192, 512, device="cuda")
    expected, store = torch.autograd.grad(loss_of(weights, x), weights), HostStore()
    for _ in range(3):
        loss = loss_of(weights, x, store)
        for i in range(backwards):
            grads = torch.autograd.grad(loss, weights, retain_graph=i + 1 < backwards)
            for grad, other in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-3)
        del loss
    assert store.host_bytes_in_use == 0


def test_a_computation_on_a_stream_of_its_own():
    store, tensors = HostStore(), layer_inputs(4)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(BUSY)
        kept = keep_all(store, tensors)
        assert all(torch.equal(k.fetch(), x) for k, x in zip(kept[::-1], tensors[::-1], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices():
    store, tensors = HostStore(), layer_inputs(4)
    tensors = [x.to(f"cuda:{i % 2}") for i, x in enumerate(tensors)]
    kept = keep_all(store, tensors)
    for k, x in zip(kept[::-1], tensors[::-1], strict=True):
        y = k.fetch()
        assert y.device == x.device and torch.equal(y, x)
