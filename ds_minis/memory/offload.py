"""Keeps the inputs of decoder layers in host memory until backward; copies overlap with computation.

A device has one stream for copies in both directions: forward only copies out, and backward only copies in. Copies run in
the order of their launch, so a block may be reused while a copy from it is pending. Other devices, including the CPU, run the
same code on `torch.cpu`'s streams, which do nothing, since there a copy is done when it returns.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ds_minis.memory.host_memory import BlockPool, block_layout

_WITH_STREAMS = ("cuda", "xpu", "npu")
_MAX_IN_FLIGHT = 2  # layers


class HostStore:
    """The layer inputs of one model in host memory, which is pinned if the device has streams.

    A copy or a pickle of it, also as part of a model, is an empty store.
    """

    def __init__(self):
        self._lanes: dict[torch.device, Lane] = {}
        self.host_bytes_peak = 0

    def __reduce__(self):
        return HostStore, ()

    @property
    def host_bytes_in_use(self) -> int:
        """Bytes of the blocks in use, without free ones."""
        return sum(lane.pool.bytes_in_use for lane in list(self._lanes.values()))

    @property
    def host_bytes_allocated(self) -> int:
        """Bytes of all blocks, including free ones."""
        return sum(lane.pool.bytes_allocated for lane in list(self._lanes.values()))

    def keep(self, x: Tensor, at_once: int = 1) -> OffloadedTensor:
        """Starts to copy `x` to host memory. Its device memory is freed once the caller and the copy are done with it.

        The caller may read and drop `x`, but must not write to it: the copy overlaps with the current stream's next work. A
        write before the end of the copy was observed raises an error, as for tensors that autograd saves. The next `keep`
        checks for the end. If two copies are in flight then, the device waits for the older one; the host never waits.

        Args:
            at_once: number of copies that one layer starts in a row; twice as many may be in flight.
        """
        lane = self._lanes.get(x.device) or self._lanes.setdefault(x.device, Lane(x.device))
        kept = OffloadedTensor(lane, x, at_once)
        self.host_bytes_peak = max(self.host_bytes_peak, self.host_bytes_in_use)
        return kept


class OffloadedTensor:
    """One offloaded tensor. Created by `HostStore.keep`; freed by `release`, or when nothing refers to it.

    Attributes:
        blocks: its blocks of host memory.
    """

    def __init__(self, lane: Lane, x: Tensor, at_once: int = 1):
        lane.limit_copies(_MAX_IN_FLIGHT * at_once)
        x = x.detach().contiguous()
        self._lane, self._shape, self._dtype, self._num_fetches = lane, x.shape, x.dtype, 0
        self.blocks, self._on_device = lane.pool.take(x.nbytes), _OnDevice()
        self._give_up = weakref.finalize(self, _give_up, lane.pool, self.blocks, self._on_device)
        self._give_up.atexit = False
        self._on_device.put(lane, x, lane.copy((block, piece) for piece, block in self._pieces(x)))
        lane.in_flight.append(self._on_device)
        self._before, lane.last = lane.last, weakref.ref(self)

    @property
    def is_on_device(self) -> bool:
        """Whether the device holds it too: its copy to the host may be running, or it was prefetched."""
        return self._on_device.tensor is not None

    @property
    def last_copy(self):
        """The event recorded after its last copy, in either direction."""
        return self._on_device.event

    def fetch(self, ahead: int = 1) -> Tensor:
        """The tensor on its device, contiguous, ready on the current stream. Starts to prefetch those kept before it.

        Do not write to it: it may be the memory that was kept. May be called any number of times, in any order.

        Args:
            ahead: number of tensors to prefetch: as many as one layer keeps.
        """
        if not self._give_up.alive:
            raise RuntimeError("a layer input was fetched after its host memory had been released")
        self._num_fetches += 1
        if not self.is_on_device:
            self.bring()
        x = self._on_device.take(self._lane.current_stream())
        before = self
        for _ in range(ahead):
            before = before._before()
            # Backward runs from last to first. In another order, the one before may have been fetched already.
            if before is None or before._num_fetches >= self._num_fetches:
                break
            before._prefetch(ahead)
        return x

    def release(self) -> None:
        """Returns the host memory to the pool. A second call does nothing."""
        self._give_up()

    def _prefetch(self, at_most: int) -> None:
        if self._give_up.alive and not self.is_on_device:
            ahead = self._lane.ahead = deque(one for one in self._lane.ahead if one.tensor is not None)
            while len(ahead) >= at_most:  # also if backward ends early or runs in another order
                ahead.popleft().drop()
            self.bring()
            ahead.append(self._on_device)

    def bring(self) -> None:
        """Starts its copy back to the device."""
        x = torch.empty(self._shape, dtype=self._dtype, device=self._lane.device)
        self._on_device.put(self._lane, x, self._lane.copy(self._pieces(x)))

    def _pieces(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a contiguous tensor's bytes, piece by piece, and the part of a block that holds them."""
        size, _ = block_layout(x.nbytes)
        for piece, block in zip(x.flatten().view(torch.uint8).split(size), self.blocks, strict=False):
            yield piece, block[: len(piece)]


def _give_up(pool: BlockPool, blocks: list[Tensor], on_device: _OnDevice) -> None:
    on_device.drop()
    pool.give_back(blocks)


class Lane:
    """The stream, the pool and the pending copies between one device and the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.asynchronous = device.type in _WITH_STREAMS
        self._streams = torch.get_device_module(device) if self.asynchronous else torch.cpu
        self._stream = self._streams.Stream(**{"device": device} if self.asynchronous else {})
        self.pool = BlockPool(pinned=self.asynchronous)
        self.in_flight: deque[_OnDevice] = deque()
        self.ahead: deque[_OnDevice] = deque()
        self.last = lambda: None

    def current_stream(self):
        return self._streams.current_stream(self.device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]):
        """Copies pairs of (target, source) after all work queued on the current stream so far.

        Returns:
            The event recorded after the copies.
        """
        self._stream.wait_stream(self.current_stream())
        with self._streams.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=self.asynchronous)
        event = self._streams.Event()
        event.record(self._stream)
        return event

    def limit_copies(self, at_most: int) -> None:
        """Drops finished copies, and the oldest pending ones until fewer than `at_most` are in flight."""
        while self.in_flight and (len(self.in_flight) >= at_most or self.in_flight[0].is_copied()):
            self.in_flight.popleft().take(self.current_stream())


class _OnDevice:
    """Holds a tensor while a copy from or to it may run; its memory may be reused only after that copy.

    Attributes:
        tensor: None once nothing holds it.
        event: recorded after the copy.
        asynchronous: whether the device has streams.
    """

    tensor: Tensor | None = None

    def put(self, lane: Lane, tensor: Tensor, event) -> None:
        self.tensor, self._version, self.event = tensor, tensor._version, event
        self._stream = lane.current_stream()  # the stream that its memory returns to
        self.asynchronous = lane.asynchronous

    def is_copied(self) -> bool:
        return self.tensor is None or self.event.query()

    def drop(self) -> None:
        if self.tensor is not None:
            self._stream.wait_event(self.event)
            self.tensor = None

    def take(self, stream) -> Tensor | None:
        """Returns the tensor for use on a stream, and drops it here."""
        tensor = self.tensor
        if tensor is None:
            return None
        stream.wait_event(self.event)
        if self.asynchronous and stream != self._stream:
            tensor.record_stream(stream)  # or its memory would be reused while this stream still reads it
        self.drop()
        if tensor._version != self._version:
            raise RuntimeError(
                "the input of a decoder layer was changed in place while it was copied to host memory, so backward would "
                "compute wrong gradients. Make the operation that changed it give a new tensor, or turn "
                '"offload" off in the mini-sequence configuration'
            )
        return tensor
