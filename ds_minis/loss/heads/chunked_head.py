"""The output-embedding module of one forward pass: computes deferred logits, all at once or by chunks.

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), H hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_minis.loss.heads.head_analysis import HeadAnalysis, analyze_head, call_mode, is_plain
from ds_minis.loss.heads.one_factor import Labelled, OneFactor, columns_of
from ds_minis.loss.heads.row_columns import row_columns
from ds_minis.loss.heads.tiled_sum import sum_rows
from ds_minis.loss.heads.unreadable import UnreadableLogits, unreadable_error
from ds_minis.loss.kernels.cross_entropy import implementation
from ds_minis.tiling.core.exclusive import trackers_aside
from ds_minis.tiling.core.linear import runs_linear_forward
from ds_minis.tiling.core.params import Constants, ParameterSlots, constants_of, whole_shape
from ds_minis.tiling.core.replay import AutocastState, matmul_dtype, patched_forwards
from ds_minis.tiling.core.tiled_op import tile_rows
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.tiled_module import require_weights
from ds_minis.tiling.verify.signature import STALE, module_signature

HEAD = "_mini_sequence_head"
_PROBE_ROWS = 2048  # the same on all ranks; only a few of these rows run with values


class DeferringHead(nn.Module):
    """Mixin for the class of a model's output-embedding module while the model runs forward with labels.

    It overrides `__call__`, not `forward`: FSDP2 and ZeRO-3 gather the weights in hooks around `forward`. They must do so
    once for all chunks, when the logits are computed, and not here, where they are deferred.
    """

    @outside_of_graphs
    def __call__(self, *args, **kwargs):
        head = self.__dict__.get(HEAD)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or head is None or not head.is_in_this_thread():
            return super().__call__(*args, **kwargs)
        logits = head.deferred_logits(args[0])
        return super().__call__(*args) if logits is None else logits


@functools.cache
def _deferring_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(
        base.__name__, (DeferringHead, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


class ChunkedHead:
    """The output-embedding module of one forward pass.

    Args:
        defer: `defer(head, hidden_LH, sample_0V)` creates the deferred `head.logits(hidden_LH)`.
        sharded: says which engine shards the weights after the pass; empty if none does.

    Attributes:
        module: the module.
        deferred: whether logits of this pass were deferred.
        reason: why they were not, if the module was called and must see all tokens.
        scope: an exit stack that is closed at the end of the pass.
        chunking: of the model.
        was_read: whether something was computed from deferred logits, with a gradient.
        without_labels: whether the pass has none, so that whoever called the model reads the logits.
        gather: gathers the weights once more after the pass (FSDP2); None where calling the module does.
    """

    scope: contextlib.ExitStack | None = None
    gather: Callable[[], None] | None = None
    without_labels = False

    def __init__(self, module: nn.Module, chunking: Chunking, sharded: str, defer: Callable[..., Tensor]):
        self.deferred, self.reason, self.was_read = False, "", False
        self.module, self.sharded = module, sharded
        self._in_float32, self._backward_begun = False, False
        self._thread, self._with_grad = threading.get_ident(), torch.is_grad_enabled()
        self._hooks: OrderedDict[int, Callable] = OrderedDict()  # a dict has no weak references, which the handles take
        self._then = {name: param.requires_grad for name, param in module.named_parameters()}
        self._own_call = type(module).__call__
        # Only a plain linear layer is known not to save its result. The loss may overwrite logits, but not views.
        self._keeps_nothing = runs_linear_forward(module)
        self.chunking = chunking
        self._made: list[weakref.ref[Tensor]] = []
        self._outputs: list[tuple[weakref.ref, str]] = []
        self._weights_then: list[tuple] | None = None  # set when the pass ends
        self._defer = defer

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        module, own_class = self.module, type(self.module)
        module.__dict__[HEAD] = self
        module.__class__ = _deferring_class(own_class)
        try:
            yield
        finally:
            module.__class__ = own_class
            del module.__dict__[HEAD]

    def is_in_this_thread(self) -> bool:
        """Whether the pass runs in this thread."""
        return self._thread == threading.get_ident()

    def runs_in(self, in_float32: bool) -> bool:
        """Has the head run in float32, without autocast, if that is asked for; False if it cannot."""
        self._in_float32 = in_float32
        return not in_float32 or all(param.dtype == torch.float32 for param in self.module.parameters())

    def deferred_logits(self, hidden_LH: Tensor) -> Tensor | None:
        """Deferred logits; None if the module must be called as usual."""
        if not self._in_float32:
            return self._deferred_logits(hidden_LH)
        with torch.autocast(hidden_LH.device.type, enabled=False):
            return self._deferred_logits(hidden_LH.float())

    def _deferred_logits(self, hidden_LH: Tensor) -> Tensor | None:
        analysis = self._known(hidden_LH) if is_plain(self.module) else self._analysis_for(hidden_LH)
        if analysis.reason:
            self.reason = f"the LM head, a {type(self.module).__name__}, is run as a whole: {analysis.reason}"
            return None
        if not self.deferred and self.scope is not None:
            # The model's output will hold deferred logits, on which a tracker cannot register hooks.
            self.scope.enter_context(trackers_aside())
        self.deferred = True
        return self._defer(self, hidden_LH, hidden_LH.new_empty((0, analysis.width), dtype=analysis.dtype))

    def _known(self, hidden_LH: Tensor) -> HeadAnalysis:
        """The analysis of a plain linear layer, without gathering its weight."""
        weight = self.module.weight
        shape = whole_shape(weight)
        width = shape[0] if len(shape) == 2 else self.module.out_features  # FSDP1 may hold flat weights
        return HeadAnalysis(width=width, dtype=matmul_dtype(hidden_LH) or hidden_LH.dtype)

    def _analysis_for(self, hidden_LH: Tensor) -> HeadAnalysis:
        """The analysis of any other module, once per kind of call and signature, as for a tiled module.

        It calls the module, so that engines gather its weights. So all ranks must take the same path here.
        """
        heads, signature = self.chunking.heads, module_signature(self.module)
        key = call_mode(self.module, hidden_LH), signature.stable
        known = heads.get(key)
        if known is not None and (not heads.is_stale(known, signature.versions) or heads.often_stale):
            return known if known.versions in (None, signature.versions) else HeadAnalysis(STALE)
        rows_RH = hidden_LH.detach().reshape(-1, hidden_LH.shape[-1])
        index = torch.arange(_PROBE_ROWS, device=rows_RH.device)
        few = (
            rows_RH[index % rows_RH.shape[0]] if rows_RH.shape[0] else rows_RH.new_zeros(_PROBE_ROWS, rows_RH.shape[1])
        )
        if hidden_LH.dim() > 2:
            few = few.view(*[1] * (hidden_LH.dim() - 3), 2, _PROBE_ROWS // 2, -1)
        analysis, with_grads = None, torch.is_grad_enabled()
        own_forward = self.module.__dict__.get("forward")

        def analyze(few_LH: Tensor) -> Tensor:
            nonlocal analysis
            require_weights(self.module)
            with patched_forwards({self.module: own_forward}):
                analysis = analyze_head(self.module, few_LH, with_grads, signature.versions)
            return few_LH

        with torch.no_grad():
            self._call(analyze, few)
        if analysis is None:  # the runs cannot tell, with these weights
            return HeadAnalysis("all of its gradients are zero with these weights, which verifies nothing")
        heads[key] = analysis
        return analysis

    def logits(self, hidden_LH: Tensor) -> Tensor:
        """The logits of all rows, as the model's own head computes them."""
        with self.trained_as_then():
            return self._call(self.module.forward, hidden_LH)

    def tile(self, function: Callable[..., Tensor], sample_0V: Tensor, *rows: Tensor) -> Tensor:
        """`function(*rows)` of each chunk of rows, concatenated: one result per row.

        Args:
            function: gets the logits of a chunk by `of_chunk`.
            sample_0V: has the dtype and the width that the logits have when the loss reads them.
            rows: this head's hidden states `(R, H)`, and other tensors of R rows.
        """
        return self._by_chunks(tile_rows, function, sample_0V, rows)

    def columns(
        self, function: Callable[..., Tensor], sample_0V: Tensor, labelled: Labelled | None, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        """The columns of a `function` that gives `(C, N)` or `(C,)`, with one matmul less than `tile` where possible."""
        labels = None if labelled is None else OneFactor(self.chunking.memory, labelled)
        result = self._by_chunks(functools.partial(row_columns, labels=labels), function, sample_0V, rows)
        return result if type(result) is tuple else columns_of(result)

    def sum(self, function: Callable[..., Tensor], sample_0V: Tensor, expected: Tensor, *rows: Tensor) -> Tensor:
        """The sum of these results over all rows; `expected` is its probable incoming gradient.

        `function` also gets the keyword `expected` if its results are sure to receive that gradient.
        """
        # float16 gradients underflow without the loss scale, which is known only in backward.
        if torch.float16 in (rows[0].dtype, AutocastState(rows[0].device).dtype()):
            return self.tile(function, sample_0V, *rows).sum(0)
        run, function = (functools.partial(f, expected=expected) for f in (sum_rows, function))
        return self._by_chunks(run, function, sample_0V, rows)

    def _by_chunks(self, run, function, sample_0V: Tensor, rows: Sequence[Tensor]) -> Tensor:
        module, own_forward = self.module, self.module.__dict__.get("forward")

        def all_rows(hidden_RH: Tensor) -> Tensor:
            require_weights(module)
            num_rows = hidden_RH.shape[0]
            chunk_rows = self.chunking.loss_rows(
                hidden_RH.numel() * hidden_RH.element_size(), sample_0V.shape[-1] * sample_0V.element_size()
            )
            guard = functools.partial(self.chunking.guarded, "loss_chunk_size", chunk_rows, num_rows)
            with patched_forwards({module: own_forward}):
                return run(function, module, [hidden_RH, *rows[1:]], chunk_rows, guard=guard)

        with self.trained_as_then():
            result = self._call(all_rows, rows[0])
        self.was_read = self.was_read or any(t.requires_grad for t in (result if type(result) is tuple else [result]))
        self.chunking.warnings.once(implementation(rows[0])[1])  # each model is told
        return result

    def of_chunk(self, hidden_CH: Tensor) -> Tensor:
        """The logits of one chunk. Called inside of `tile` or `sum`, of this head or of another one."""
        logits_CV = self.module.forward(hidden_CH)
        return logits_CV if self._keeps_nothing else logits_CV.view_as(logits_CV)

    def is_trained(self) -> bool:
        """Whether the head has weights that are trained."""
        return bool(ParameterSlots(self.module).tensors)

    def settings(self) -> Constants:
        """The settings of the module's parts, such as whether an adapter is on; a plain linear layer has none."""
        return [] if self._keeps_nothing else constants_of(self.module)

    @contextlib.contextmanager
    def trained_as_then(self) -> Iterator[None]:
        """Trains the parameters that were trained in the pass: PEFT freezes adapters while they are off."""
        parameters = [] if self._keeps_nothing else self.module.named_parameters()
        changed = [p for name, p in parameters if self._then.get(name, p.requires_grad) != p.requires_grad]
        for param in changed:
            param.requires_grad_(not param.requires_grad)
        try:
            yield
        finally:
            for param in changed:
                param.requires_grad_(not param.requires_grad)

    def _call(self, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Calls the module with its forward replaced, so that its hooks run once around all chunks."""
        self.require_readable()
        if self._weights_then is not None and self.gather is not None:
            self.gather()
        if not (self._with_grad or self.module._forward_hooks or self.module._forward_pre_hooks):
            return forward(hidden)  # another thread may call the module now
        with patched_forwards({self.module: forward}):
            return self._own_call(self.module, hidden)

    # The methods below serve logits that are read after the pass.

    def note_reader(self, operation: str, in_full: bool = False) -> None:
        """Notes for the report what read the logits."""
        self.chunking.note_reader(operation, in_full)

    def add_hook(self, hook: Callable) -> RemovableHandle:
        """An engine's hook on the logits, with which it learns of backward, on whatever is computed from them."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def register_hooks(self, result: Tensor) -> None:
        """Registers these hooks on something computed from the logits."""
        for hook in self._hooks.values():
            result.register_hook(hook)

    def warn_materialized(self, operation: str) -> None:
        """Warns, once per operation, that all logits are computed for it."""
        self.note_reader(operation, in_full=True)
        self.chunking.warnings.once(
            f"logits are computed in full, without saving memory, for the operation {operation!r} on them"
        )

    def record_output(self, logits: Tensor) -> None:
        """Registers deferred logits of this head."""
        self._made.append(weakref.ref(logits))

    def finish(self) -> None:
        """Marks the end of the forward pass."""
        self._weights_then = _weights_of(self.module)

    def give(self, logits: Tensor, output: Any, name: str) -> None:
        """Sets logits as an attribute of a model's output until backward. They are not an item of it: no engine sees them."""
        if self.sharded:
            output.__dict__[name] = UnreadableLogits(unreadable_error(self.sharded))
        else:
            output.__dict__[name] = logits
            self._outputs.append((weakref.ref(output), name))

    def release(self) -> None:
        """Called when backward reaches the loss: frees the hidden states, which would otherwise stay until its end.

        Logits that somebody else still holds are computed in full, since the weights are about to change.
        """
        if self._weights_then is None:
            return
        self._backward_begun = True
        if self.without_labels:  # whoever holds the logits holds the hidden states too
            return
        for reference, name in self._outputs:
            output = reference()
            if output is not None and self._is_mine(output.__dict__.get(name)):
                output.__dict__[name] = None
        for reference in self._made:
            logits = reference()
            if logits is not None:
                logits.compute_or_refuse(self._unreadable_reason())
        self._outputs, self._made = [], []

    def _is_mine(self, value: Any) -> bool:
        return value is not None and any(ref() is value for ref in self._made)

    def require_readable(self) -> None:
        """Raises RuntimeError with the reason if logits can no longer be computed."""
        unreadable = self._unreadable_reason() if self._weights_then is not None else ""
        if unreadable:
            raise RuntimeError(unreadable)

    def _unreadable_reason(self) -> str:
        """The reason why logits cannot be computed after the pass; empty if they can."""
        if self.sharded:
            readable = self.without_labels and not self._backward_begun
            return "" if readable else unreadable_error(self.sharded)
        changed = self._weights_then != _weights_of(self.module)
        return unreadable_error("the LM head's weights have changed since") if changed else ""


def _weights_of(module: nn.Module) -> list[tuple]:
    tensors = (*module.parameters(), *module.buffers())
    return [(id(t), t.shape, 0 if t.is_inference() else t._version) for t in tensors]
