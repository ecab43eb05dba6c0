"""A decoder layer as one autograd node that keeps everything its backward reads, or its input where that is not possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor

from ds_minis.layer.kept.layer_graph import LayerGraph, TooLarge
from ds_minis.layer.passes.layer_args import LayerArgs
from ds_minis.layer.passes.node import LayerNode
from ds_minis.memory.accounts import Reservation
from ds_minis.memory.keep_budget import ALL, KeepBudget
from ds_minis.memory.layer_inputs import LayerInput
from ds_minis.tiling.core.exclusive import alone, trackers_aside
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots, Untrained, constants_of
from ds_minis.tiling.core.replay import has_values, random_states, set_random_states
from ds_minis.tiling.core.tiled_op import TiledOp
from ds_minis.tiling.modules.swap import Tiled, untiled_class, warn_once


class KeptLayer(TiledOp):
    """One call of a layer, run whole with its graph. Its parameters get their gradients together, as in a `LayerNode`.

    Args:
        forward: the layer's own forward.
        call: its arguments; the hidden states are taken out.
        budget: counts what is kept.
        by_chunks: makes the node that is used instead where the graph cannot be kept, from the layer's tensors.
        layer_input: stores the layer's input for that node.
    """

    def __init__(
        self,
        module: Tiled,
        forward: Callable,
        call: LayerArgs,
        budget: KeepBudget,
        by_chunks: Callable[[ParameterSlots, LayerInput], LayerNode],
        layer_input: LayerInput,
    ):
        self.module, self.slots = module, ParameterSlots(module)
        self.constants, self.way = constants_of(module), (ALL, call.key)
        self.memory = module.mini_sequence_chunking.memory
        self._untrained = Untrained(module, self.slots, self.memory.copies)
        self._forward, self._call, self._budget = forward, call, budget
        self._by_chunks, self._layer_input = by_chunks, layer_input
        self._x_needs_grad = False
        self._graph: LayerGraph | None = None
        self._reservation: Reservation | None = None
        self._node: LayerNode | None = None

    def leave_out_idle(self, rows: Sequence[Tensor]) -> None:
        self._x_needs_grad = rows[0].requires_grad
        super().leave_out_idle(rows)

    def saved(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[1:]

    def forward(self, rows: Sequence[Tensor], *, with_backward: bool) -> Tensor:
        x = rows[0]
        y = None
        if with_backward and self._key() in self.module.mini_sequence_chunking.unkept:
            self._budget.fell_back(ALL)
        elif with_backward:
            y = self._with_graph(x)
        return self._forward_by_chunks(x, with_backward) if y is None else y

    def _key(self) -> tuple:
        return untiled_class(type(self.module)).__qualname__, ALL, self.module.training

    def _with_graph(self, x: Tensor) -> Tensor | None:
        """The result, with the graph kept; None if it cannot be kept."""
        budget, module = self._budget, self.module
        limit = budget.limit(x)
        random = random_states(x.device) if module.training and has_values(x) else None
        graph = None
        try:
            with self._running(), alone(module):
                graph = LayerGraph(self._run, x, self._x_needs_grad, self.slots, limit)
        except TooLarge:
            budget.too_large(module, x, limit)
        except Exception as error:
            if budget.account(x) is None or not is_out_of_memory(error):
                raise
            budget.out_of_memory(budget.account(x))
            budget.fell_back(ALL)
        if graph is not None and graph.reason:
            self._refuse(graph.reason)
            graph = None
        elif graph is not None and graph.is_uncertain:
            budget.fell_back(ALL)
            graph = None
        if graph is not None:
            budget.learn_all(module, x, graph.num_bytes, graph.pair_bytes)
            self._reservation = budget.reserve(x, graph.num_bytes)
        if self._reservation is None:
            if random is not None:
                set_random_states(x.device, random)
            return None
        if self.walk is not None:
            self.walk.reached(graph.used)
        self._graph, y = graph, graph.result
        graph.result = None
        return y

    def _refuse(self, reason: str) -> None:
        cls = untiled_class(type(self.module))
        self.module.mini_sequence_chunking.unkept[self._key()] = cls.__name__, reason
        warn_once(self.module, "keeps its input alone", reason)
        self._budget.fell_back(ALL)

    @contextlib.contextmanager
    def _running(self):
        with self.module.mini_sequence_chunking.untiled(), trackers_aside():
            yield

    def _run(self, x: Tensor) -> Tensor:
        args, kwargs = self._call.arguments(x, lambda place, value: value)
        y = self._forward(*args, **kwargs)
        return y[0] if isinstance(y, tuple) else y

    def _forward_by_chunks(self, x: Tensor, with_backward: bool) -> Tensor:
        self._call.hidden = x
        by_chunks, self._by_chunks = self._by_chunks, None  # it refers to the layer's input
        node = by_chunks(self.slots, self._layer_input)
        node.walk = self.walk
        if with_backward:
            self._layer_input.keep(x)
        y = node.forward([x], with_backward=with_backward)
        node.walk = None
        self._node = node if with_backward else None
        return y

    def backward(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
        grad_y, self.grad_output = self.grad_output, None
        if self._node is not None:
            self._node.grad_output = grad_y
            del grad_y
            return self._node.backward(tensors, needs_grad)
        if self._graph is None:
            raise RuntimeError("backward a second time through a layer whose graph was freed: use retain_graph=True")
        graph = self._graph
        if not graph.is_retained():
            self._graph = None
        with alone(self.module), trackers_aside(), self._untrained.as_in_forward():
            grads = graph.backward(grad_y, self.slots, tensors)
        if self._graph is None:
            self._reservation.release()
        return [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
