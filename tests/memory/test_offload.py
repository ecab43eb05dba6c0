"""Layer inputs in host memory: contents, order, memory. On the CPU, by the code that runs on a GPU too."""

import contextlib
import copy
import gc
import pickle
import random
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from ds_minis.memory import host_memory, offload
from ds_minis.memory.host_memory import BlockPool, host_bytes_needed
from ds_minis.memory.offload import HostStore

BLOCK = 256


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", BLOCK)


def layer_inputs(number, shape=(2, 37, 5)):
    """Several blocks each, the last one filled in part; no two bytes at one place alike by chance alone."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(number)]


def keep_all(store, tensors):
    """Keeps each, and holds none; with what they were."""
    return [store.keep(x.clone()) for x in tensors]


def as_bytes(x):
    return x.contiguous().flatten().view(torch.uint8)


def spoil(kept):
    """From now on the host's copy is not what was kept, so that only what is on the device already can be right."""
    for block in kept.blocks:
        block.fill_(255)


def arrangements():
    base = torch.randn(4, 9, 34, generator=torch.Generator().manual_seed(0))
    with_nan = base.clone()
    with_nan.view(torch.int32)[0, 0, :3] = torch.tensor([0x7FC00001, 0x7F800001, -1])
    return {
        "contiguous": base,
        "transposed": base.transpose(0, 1),
        "view": base[1:3, :, 5:11],
        "expanded": base[:1, :1].expand(3, 7, 34),
        "one": base[0, 0, 0],
        "empty": base[:, :0],
        "NaN payloads": with_nan,
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("name", arrangements())
def test_contents_are_the_same_to_the_bit(name, dtype):
    x = arrangements()[name]
    x = x if dtype == torch.float32 else x.to(dtype)
    store, expected = HostStore(), as_bytes(x).clone()
    kept = store.keep(x)
    for from_host in (False, True):
        y = kept.fetch()
        assert (y.shape, y.dtype, y.device, y.requires_grad) == (x.shape, x.dtype, x.device, False)
        assert y.is_contiguous() and torch.equal(as_bytes(y), expected)
        assert not from_host or not x.numel() or y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("order", ["reversed", "forward", "random", "twice reversed"])
def test_any_order(order):
    lengths = [37, 1, 37, 100, 3, 3, 64]
    tensors = [x for i, n in enumerate(lengths) for x in layer_inputs(i + 1, (2, n, 5))[-1:]]
    kept = keep_all(HostStore(), tensors)
    indices = list(range(len(kept)))
    if order == "random":
        indices = random.Random(0).choices(indices, k=40)
    elif order != "forward":
        indices = indices[::-1] * (2 if order == "twice reversed" else 1)
    for i in indices:
        assert torch.equal(kept[i].fetch(), tensors[i])


def test_the_copy_is_taken_at_once_and_a_write_before_its_end_is_seen_is_an_error():
    store, (a, b, c) = HostStore(), layer_inputs(3)
    first, expected = store.keep(a), a.clone()
    second = store.keep(b)  # has seen that the first is copied
    a.zero_()
    assert torch.equal(first.fetch(), expected)
    b.zero_()
    with pytest.raises(RuntimeError, match="changed in place.*gradients"):
        second.fetch()
    third = store.keep(c)
    c.view(-1)[0] = 1
    with pytest.raises(RuntimeError, match="changed in place"):
        store.keep(a)
    third.release()


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_are_brought_ahead_and_no_more(ahead):
    store, tensors = HostStore(), layer_inputs(9)
    kept = keep_all(store, tensors)
    brought = lambda: [k.is_on_device for k in kept]  # noqa: E731
    for i in reversed(range(9)):
        before = brought()
        assert torch.equal(kept[i].fetch(ahead=ahead), tensors[i])
        assert i in (7, 8) or before[max(i - ahead + 1, 0) : i + 1] == [True] * min(ahead, i + 1)
        assert brought()[:i] == [j >= i - ahead for j in range(i)]
    # A backward that ends early leaves no more than so many behind, however often.
    kept = keep_all(store, tensors)
    for i in (8, 4, 6):
        kept[i].fetch(ahead=ahead)
    assert sum(brought()) <= ahead + 1  # and the one whose copy was the last


def test_one_device_tensor_at_most_is_held_after_its_copy():
    store, tensors = HostStore(), layer_inputs(6)
    held = [weakref.ref(x.untyped_storage()) for x in tensors]
    kept = []
    for i in range(6):
        kept.append(store.keep(tensors[i]))
        tensors[i] = None
        assert [ref() is not None for ref in held[: i + 1]] == [False] * i + [True]
    kept[-1].fetch()
    assert held[-1]() is None


@pytest.mark.parametrize("how", ["release", "drop"])
def test_none_is_held_of_what_is_given_up(how):
    store, (x, y) = HostStore(), layer_inputs(2)
    keep_all(store, [y])
    kept, held = store.keep(x), weakref.ref(x.untyped_storage())
    del x
    assert held() is not None
    if how == "release":
        kept.release()
    else:
        del kept
    assert held() is None


def test_no_graph_is_held():
    (x,) = layer_inputs(1)
    weight = torch.ones(5, requires_grad=True)
    kept = HostStore().keep(x * weight)
    assert not kept.fetch().requires_grad and torch.equal(kept.fetch(), x)


def test_the_one_kept_before_is_brought_while_a_layer_runs_backward():
    tensors = layer_inputs(6)
    kept = keep_all(HostStore(), tensors)
    for i in (5, 4, 3, 2, 1):
        assert torch.equal(kept[i].fetch(), tensors[i])
        spoil(kept[i - 1])
        brought = [k.is_on_device for k in kept]
        assert brought == [j == i - 1 for j in range(6)]
    assert torch.equal(kept[0].fetch(), tensors[0])


def test_so_it_is_in_a_second_backward():
    tensors = layer_inputs(4)
    kept = keep_all(HostStore(), tensors)
    for k in kept[::-1]:
        k.fetch()
    for i in (3, 2, 1):
        assert torch.equal(kept[i].fetch(), tensors[i])
        spoil(kept[i - 1])
    assert torch.equal(kept[0].fetch(), tensors[0])


def test_what_has_been_brought_is_not_brought_again():
    tensors = layer_inputs(3)
    kept = keep_all(HostStore(), tensors)
    kept[2].fetch()
    spoil(kept[1])
    kept[2].fetch()
    assert torch.equal(kept[1].fetch(), tensors[1])


def test_other_orders_leave_one_tensor_on_the_device_at_most():
    kept = keep_all(HostStore(), layer_inputs(8))
    kept[-1].fetch()
    for i in random.Random(1).choices(range(8), k=60):
        kept[i].fetch()
        assert sum(k.is_on_device for k in kept) <= 1


def test_nothing_is_brought_for_an_order_from_first_to_last():
    kept = keep_all(HostStore(), layer_inputs(5))
    for k in kept[:-1]:
        k.fetch()
        assert not any(k.is_on_device for k in kept[:-1])


def test_what_is_released_or_gone_is_not_brought():
    store, tensors = HostStore(), layer_inputs(4)
    kept = keep_all(store, tensors)
    kept[2].release()
    assert torch.equal(kept[3].fetch(), tensors[3])
    assert not kept[2].is_on_device
    del kept[0]
    assert torch.equal(kept[0].fetch(), tensors[1])


def test_release_gives_the_memory_back_once():
    store, tensors = HostStore(), layer_inputs(4)
    kept = keep_all(store, tensors)
    per_tensor = host_bytes_needed(1, [torch.empty(2, 37, 5)])
    assert per_tensor == 6 * BLOCK
    assert store.host_bytes_in_use == store.host_bytes_peak == 4 * per_tensor
    for _ in range(3):
        kept[1].release()
    assert store.host_bytes_in_use == 3 * per_tensor
    with pytest.raises(RuntimeError, match="fetched after its host memory had been released"):
        kept[1].fetch()
    again = keep_all(store, tensors[2:])  # two would share a block if it had been given back twice
    assert store.host_bytes_in_use == store.host_bytes_peak == 5 * per_tensor
    for k, x in zip([kept[0], *kept[2:], *again], [tensors[0], *tensors[2:], *tensors[2:]], strict=True):
        assert torch.equal(k.fetch(), x)
        k.release()
    assert store.host_bytes_in_use == 0
    again = keep_all(store, tensors[:2])
    assert (store.host_bytes_in_use, store.host_bytes_peak) == (2 * per_tensor, 5 * per_tensor)


def test_what_nobody_holds_is_given_back_also_out_of_a_cycle():
    store = HostStore()
    kept = keep_all(store, layer_inputs(3))
    cycle = [kept.pop()]
    cycle.append(cycle)
    del kept
    assert store.host_bytes_in_use == host_bytes_needed(1, [torch.empty(2, 37, 5)])
    del cycle
    gc.collect()
    assert store.host_bytes_in_use == 0


def test_from_the_second_step_on_no_memory_is_allocated():
    store, blocks = HostStore(), []
    for shape in [(2, 37, 5), (2, 37, 5), (1, 70, 5), (3, 17, 7), (2, 37, 5)]:
        tensors = layer_inputs(4, shape)
        kept = keep_all(store, tensors)
        blocks.append({block.data_ptr() for k in kept for block in k.blocks})
        assert all(torch.equal(k.fetch(), x) for k, x in zip(kept[::-1], tensors[::-1], strict=True))
        for k in kept:
            k.release()
    assert len(blocks[0]) == 24 and all(later <= blocks[0] for later in blocks)
    assert store.host_bytes_peak == 24 * BLOCK


def test_small_tensors_take_small_blocks():
    store = HostStore()
    kept = [store.keep(torch.zeros(n, dtype=torch.uint8)) for n in (0, 1, 3, 255, 256, 257)]
    assert store.host_bytes_in_use == 0 + 1 + 4 + 256 + 256 + 512
    assert [len(k.blocks) for k in kept] == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("seq", [1, 12, 13, 64, 1000])
def test_the_need_is_stated_as_it_comes(seq):
    store = HostStore()
    kept = keep_all(store, [torch.zeros(3, seq, 5, dtype=torch.bfloat16)] * 7)
    assert host_bytes_needed(7, [torch.empty(3, seq, 5, dtype=torch.bfloat16)]) == store.host_bytes_in_use
    assert len(kept) == 7


def test_the_need_of_a_large_model(monkeypatch):
    monkeypatch.undo()
    assert host_bytes_needed(32, [torch.empty(1, 524288, 4096, dtype=torch.bfloat16, device="meta")]) == 128 * 2**30
    assert (
        host_bytes_needed(32, [torch.empty(1, 390625, 4096, dtype=torch.bfloat16, device="meta")]) == 32 * 191 * 2**24
    )  # 3.2 GB each, 4 MB over


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_a_store_of_its_own(copied):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for layer in model:
        layer.store = store = model[0].store if hasattr(model[0], "store") else HostStore()
    (x,) = layer_inputs(1)
    kept = store.keep(x.clone())
    other = copied(store)
    assert type(other) is HostStore and other is not store
    assert (other.host_bytes_in_use, other.host_bytes_peak) == (0, 0)
    assert torch.equal(other.keep(x).fetch(), kept.fetch())
    if copied is not copy.copy:
        twin = copied(model)
        assert twin[0].store is twin[1].store is not store and twin[0].store.host_bytes_peak == 0


class Checkpointed(torch.autograd.Function):
    """A layer that keeps its input in the store, and runs again in backward."""

    @staticmethod
    def forward(ctx, store, x, weight):
        ctx.kept = store.keep(x)
        ctx.save_for_backward(weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        x, weight = (t.detach().requires_grad_() for t in (ctx.kept.fetch(), weight))
        with torch.enable_grad():
            return None, *torch.autograd.grad(torch.tanh(x @ weight), [x, weight], grad)


def layers(number=5, width=5):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(width, width, generator=generator) / width**0.5).requires_grad_() for _ in range(number)]


def loss_of(weights, x, store=None):
    for weight in weights:
        x = torch.tanh(x @ weight) if store is None else Checkpointed.apply(store, x, weight)
    return x.square().sum()


@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_of_a_stack_of_layers(backwards):
    weights, (x,), store = layers(), layer_inputs(1), HostStore()
    expected = torch.autograd.grad(loss_of(weights, x), weights)
    loss = loss_of(weights, x, store)
    for i in range(backwards):
        grads = torch.autograd.grad(loss, weights, retain_graph=i + 1 < backwards)
        assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=True))
    assert store.host_bytes_in_use == store.host_bytes_peak == host_bytes_needed(5, [torch.empty(2, 37, 5)])
    del loss
    assert store.host_bytes_in_use == 0


def test_two_graphs_at_once_and_a_loss_that_is_dropped():
    weights, (x, y, z), store = layers(), layer_inputs(3), HostStore()
    expected = torch.autograd.grad(loss_of(weights, x) + loss_of(weights, y), weights)
    loss = loss_of(weights, x, store)
    dropped = loss_of(weights, z, store)
    loss = loss + loss_of(weights, y, store)
    del dropped
    assert store.host_bytes_in_use == host_bytes_needed(10, [torch.empty(2, 37, 5)])
    grads = torch.autograd.grad(loss, weights)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


class Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.flatten(0, 1).mT @ grad.flatten(0, 1)


def test_as_saved_tensor_hooks_a_backward_gives_memory_back_while_the_loss_is_held():
    store, (x,), (weight,) = HostStore(), layer_inputs(1), layers(1)
    expected = torch.autograd.grad((x @ weight).sum(), weight)[0]
    pack = lambda t: t if t.data_ptr() == weight.data_ptr() else store.keep(t)  # noqa: E731
    unpack = lambda packed: packed if isinstance(packed, torch.Tensor) else packed.fetch()  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = Saved.apply(x, weight).sum()
    for retain in (True, False):
        assert store.host_bytes_in_use == host_bytes_needed(1, [torch.empty(2, 37, 5)])
        torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=retain)[0], expected)
    assert store.host_bytes_in_use == 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


OUT_OF_MEMORY = """
import resource, torch
from ds_minis.memory.offload import HostStore
store, x, kept = HostStore(), torch.ones(2**23), []
kept.append(store.keep(x))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
try:
    while True:
        kept.append(store.keep(x))
except RuntimeError as error:
    print(error)
print(len(kept), store.host_bytes_in_use)
kept.pop().release()
kept.append(store.keep(x))  # in the memory that is free again, and that is all there is
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert all(torch.equal(k.fetch(), x) for k in kept)
print(store.host_bytes_in_use)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_host_memory_left():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    message, counts, after = done.stdout.splitlines()
    number, in_use = map(int, counts.split())
    assert number > 1 and in_use == number * 2**25 == int(after)
    assert f"{in_use:,} bytes hold layer inputs" in message and f"needs {2**25:,}" in message
    assert "shorter sequences" in message and "pinned" not in message


class Streams:
    """Stands for `torch.cuda`: what waits for what is noted, and no copy ends before somebody waits for it."""

    class Stream:
        def __init__(self, device=None):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

        def wait_event(self, event):
            self.waited_for.append(event)

    class Event:
        def record(self, stream):
            self.stream = stream

        def query(self):
            return False

    def __init__(self):
        self.now = self.Stream()

    def current_stream(self, device=None):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        assert stream.waited_for[-1:] == [self.now], "a copy began before what it reads was there"
        stream.waited_for.clear()
        yield


@pytest.fixture
def lane(monkeypatch):
    """The copies of a device with streams, on the CPU."""
    streams = Streams()
    monkeypatch.setattr(torch, "cpu", streams)
    lane = offload.Lane(torch.device("cpu"))
    lane.streams = streams
    return lane


def test_copies_wait_for_what_they_read(lane):
    kept = offload.OffloadedTensor(lane, torch.randn(40))
    assert lane.in_flight[-1].tensor is not None
    kept.fetch()
    kept.fetch()  # brought back, by a second copy


def test_memory_goes_back_behind_the_copy_that_reads_it(lane):
    kept = offload.OffloadedTensor(lane, torch.randn(40))
    on_device = lane.in_flight[-1]
    event = on_device.event
    assert event not in lane.streams.now.waited_for
    on_device.drop()
    assert event in lane.streams.now.waited_for and on_device.tensor is None
    kept.release()


def test_a_stream_waits_for_what_it_is_given(lane):
    """Where it is another than the one that the memory goes back to, that must know of it."""
    kept = offload.OffloadedTensor(lane, torch.randn(40))
    on_device, event = lane.in_flight[-1], lane.in_flight[-1].event
    other, recorded = Streams.Stream(), []
    on_device.asynchronous = True

    class Watched(torch.Tensor):
        def record_stream(self, stream):
            recorded.append(stream)

    on_device.tensor = on_device.tensor.as_subclass(Watched)
    lane.streams.now, first = other, lane.streams.now
    kept.fetch()
    assert event in other.waited_for and event in first.waited_for and recorded == [other]


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_than_two_layers_copies_are_under_way(lane, at_once):
    kept = []
    for _ in range(5 * at_once):
        kept.append(offload.OffloadedTensor(lane, torch.randn(40), at_once))
        assert len(lane.in_flight) <= 2 * at_once
    assert len(lane.in_flight) == 2 * at_once


def test_blocks_taken_before_memory_ran_out_are_free_again(monkeypatch):
    pool, own, made = BlockPool(pinned=False), torch.empty, []

    def empty(*args, **kwargs):
        if len(made) == 2:
            raise RuntimeError("no memory")
        made.append(own(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(RuntimeError, match="no host memory left"):
        pool.take(3 * BLOCK)
    assert pool.bytes_in_use == 0 and pool.bytes_allocated == 2 * BLOCK
    assert len(pool.take(2 * BLOCK)) == 2
