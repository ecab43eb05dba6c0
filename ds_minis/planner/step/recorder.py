"""Writes down what is alive during a step, at each allocation, as multiples of the step's lengths."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_minis.planner.step.lengths import SYMBOLS, Lengths
from ds_minis.planner.step.result_shapes import ResultShapes
from ds_minis.planner.step.stubs import FLOPS, copy_between, grouped_product

_aten = torch.ops.aten
_MATMULS = {_aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2)}
_MATMULS[_aten._grouped_mm] = 0, 1
# Columns of an event beside those of SYMBOLS: bytes of gradients so far, and of those since the last layer's attention.
GRADIENTS, OF_LAYER = len(SYMBOLS), len(SYMBOLS) + 1
_TOKENS, _CHUNK, _REST, _ATTENTION = (SYMBOLS.index(name) for name in ("tokens", "chunk", "rest", "attention"))
MOST_OPERATIONS = 200_000  # a few layers take some 10,000; those that run token by token would take hours


class TooManyOperations(Exception):
    """The step runs token by token."""


class WithoutValues(TorchDispatchMode):
    """Runs operations on tensors without values, also those that torch refuses.

    Attributes:
        operations: counted.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0
        self._shapes = ResultShapes()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around each operation: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise TooManyOperations
        out = copy_between(func, args, kwargs)
        out = grouped_product(func, args, kwargs) if out is None else out
        return self._shapes.run(func, args, kwargs) if out is None else out


class Recorder(WithoutValues):
    """Bytes of all storages made inside and not yet freed, at each allocation. Parameters are not counted.

    Calls of the attention divide the step into segments: a segment is named by the calls before and after it, each as
    (what, which layer, which call of that layer).

    Attributes:
        segments: (call before, call after, events); an event: bytes for each of SYMBOLS, then GRADIENTS, OF_LAYER.
        widest: symbol -> the most elements for each of it in one tensor, and that tensor's shape and operation.
        loss_segment: index of the segment in which the loss is computed.
        matmul_flops, attention_flops: counted.
    """

    def __init__(self, lengths: Lengths, apart: list[Tensor]):
        super().__init__()
        self.segments: list[tuple[tuple, tuple, list[list[float]]]] = []
        self.widest: dict[int, tuple[float, tuple[int, ...], str]] = {}
        self.matmul_flops = self.attention_flops = self.loss_segment = 0
        self._lengths = lengths
        self._now = [0.0] * (len(SYMBOLS) + 2)
        self._live: dict[int, tuple[int, float]] = {}
        self._born: dict[int, int] = {}  # of this segment: how many events came before
        self._more_chunks: dict[int, float] = {}
        self._apart = [tensor.untyped_storage() for tensor in apart]  # held, or their addresses might be given again
        self._keys_apart = {storage._cdata for storage in self._apart}
        self._factors: dict[tuple, tuple[int, float]] = {}
        self._events: list[list[float]] = []
        self._mark: tuple = ("start", 0, 0)
        self._layers: dict[nn.Module, int] = {}
        self._calls: dict[tuple[str, int], int] = {}
        self._gradients_at_layer = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func.overloadpacket
        if packet in _MATMULS:
            a, b = (args[i] for i in _MATMULS[packet])
            self.matmul_flops += 2 * math.prod(a.shape) * b.shape[-1]
        elif packet in FLOPS:
            self.attention_flops += FLOPS[packet](args)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.hold(tensor, str(packet))
        if packet in FLOPS:
            self._now[_ATTENTION] = 0.0
        return out

    def hold(self, tensor: Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._keys_apart:
            return
        nbytes, shape = storage.nbytes(), tuple(tensor.shape)
        kind = nbytes, shape
        if kind not in self._factors:
            self._factors[kind] = self._lengths.factor(nbytes, shape)
            self._note_width(*self._factors[kind], tensor, made_by)
        index, number = self._live[key] = self._factors[kind]
        self._born[key] = len(self._events)
        weakref.finalize(storage, self._free, key)
        self._now[index] += number
        self._events.append(list(self._now))

    def _free(self, key: int) -> None:
        index, number = self._live.pop(key)
        self._now[index] -= number
        self._born.pop(key, None)
        _add_chunks(self._now, -self._more_chunks.pop(key, 0.0))

    def _note_width(self, index: int, number: float, tensor: Tensor, made_by: str) -> None:
        elements = number / tensor.element_size()
        if index and elements > self.widest.get(index, (0,))[0]:
            self.widest[index] = elements, tuple(tensor.shape), made_by

    def count_gradient(self, parameter: Tensor) -> None:
        """To be called when a parameter has its gradient, which is one from then on."""
        key = parameter.grad.untyped_storage()._cdata
        if key in self._live and self._live[key][0] < GRADIENTS:
            index, number = self._live[key]
            nbytes = parameter.grad.untyped_storage().nbytes()
            self._now[index] -= number
            self._live[key] = GRADIENTS, nbytes
            self._now[GRADIENTS] += nbytes
            self._now[OF_LAYER] = self._now[GRADIENTS] - self._gradients_at_layer
            self._events.append(list(self._now))

    def on_attention(self, what: str, module: nn.Module) -> None:
        layer = self._layers.setdefault(module, len(self._layers))
        call = self._calls[what, layer] = self._calls.get((what, layer), -1) + 1
        if what == "backward":
            self._gradients_at_layer, self._now[OF_LAYER] = self._now[GRADIENTS], 0.0
        self._end_segment((what, layer, call))
        self._now[_ATTENTION] = 1.0
        self._events.append(list(self._now))

    def _count_more_chunks(self) -> None:
        """Counts tensors that stay for each chunk as tensors of all tokens: a longer sequence has more than two whole chunks.

        From the first one on: of a longer sequence these are its last chunks, and there are those before them already.
        """
        by_size: dict[float, tuple[list[int], list[int]]] = {}
        for key in self._born:
            index, number = self._live[key]
            if index in (_CHUNK, _REST):
                by_size.setdefault(number, ([], []))[index == _REST].append(key)
        for number, (chunks, rests) in by_size.items():
            for key in chunks[: min(len(chunks) // 2, len(rests))]:
                self._more_chunks[key] = number
                for events in (*self._events[self._born[key] :], self._now):
                    _add_chunks(events, number)
        self._born.clear()

    def _end_segment(self, mark: tuple) -> None:
        self._count_more_chunks()
        self.segments.append((self._mark, mark, [*self._events, list(self._now)]))
        self._mark, self._events = mark, []

    def end_forward(self) -> None:
        """To be called when the loss is there: it was computed in this segment."""
        self._count_more_chunks()
        self.loss_segment = len(self.segments)

    def finish(self) -> None:
        """To be called at the end of the step; no more is written down."""
        self._end_segment(("end", 0, 0))


def _add_chunks(event: list[float], number: float) -> None:
    """Adds the chunks that a sequence has beside two whole ones and the last."""
    event[_TOKENS] += number
    event[_CHUNK] -= 2 * number
    event[_REST] -= number
