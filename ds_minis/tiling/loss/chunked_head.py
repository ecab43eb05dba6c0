"""The output-embedding module of one forward pass: computes deferred logits, all at once or by chunks.

Shapes: leading dimensions `*L` (batch, sequence; R rows when flattened), H hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.exclusive import trackers_aside
from ds_minis.tiling.core.replay import AutocastState, has_values, matmul_dtype, patched_forwards
from ds_minis.tiling.core.row_args import RowArgs
from ds_minis.tiling.core.tiled_op import tile_rows
from ds_minis.tiling.core.tiled_sum import sum_rows
from ds_minis.tiling.loss.cross_entropy import implementation
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.tiled_module import require_weights
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.signature import STALE, module_signature
from ds_minis.tiling.verify.token_wise import token_wise_fallback_reason

HEAD = "_mini_sequence_head"
_PROBE_ROWS = 2048  # the same on all ranks; only a few of these rows run with values


@dataclass(frozen=True)
class HeadAnalysis:
    """The analysis of an LM head: why it must see all tokens (empty if it need not), and width and dtype of its rows."""

    reason: str = ""
    width: int = 0
    dtype: torch.dtype | None = None
    versions: tuple | None = None  # of the tensors that it depends on (`signature`)


class DeferringHead(nn.Module):
    """Mixin for the class of a model's output-embedding module while the model runs forward with labels.

    It overrides `__call__`, not `forward`: FSDP2 and ZeRO-3 gather the weights in hooks around `forward`. They must do so
    once for all chunks, when the logits are computed, and not here, where they are deferred.
    """

    @outside_of_graphs
    def __call__(self, *args, **kwargs):
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return super().__call__(*args, **kwargs)
        logits = self.__dict__[HEAD].deferred_logits(args[0])
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
        deferred: whether logits of this pass were deferred.
        reason: why they were not, if the module was called and must see all tokens.
        scope: an exit stack that is closed at the end of the pass.
    """

    scope: contextlib.ExitStack | None = None

    def __init__(self, module: nn.Module, chunking: Chunking, sharded: str, defer: Callable[..., Tensor]):
        self.deferred, self.reason = False, ""
        self._module = module
        self._own_call = type(module).__call__
        self._chunking = chunking
        self._made: list[weakref.ref[Tensor]] = []
        self._outputs: list[tuple[weakref.ref, str]] = []
        self._weights_then: list[tuple] | None = None  # set when the pass ends
        self._sharded, self._defer = sharded, defer

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        module, own_class = self._module, type(self._module)
        module.__dict__[HEAD] = self
        module.__class__ = _deferring_class(own_class)
        try:
            yield
        finally:
            module.__class__ = own_class
            del module.__dict__[HEAD]

    def deferred_logits(self, hidden_LH: Tensor) -> Tensor | None:
        """Deferred logits; None if the module must be called as usual."""
        analysis = self._known(hidden_LH) if _is_plain(self._module) else self._analysis_for(hidden_LH)
        if analysis.reason:
            self.reason = f"the LM head, a {type(self._module).__name__}, is run as a whole: {analysis.reason}"
            return None
        if not self.deferred and self.scope is not None:
            # The model's output will hold deferred logits, on which a tracker cannot register hooks.
            self.scope.enter_context(trackers_aside())
        self.deferred = True
        return self._defer(self, hidden_LH, hidden_LH.new_empty((0, analysis.width), dtype=analysis.dtype))

    def _known(self, hidden_LH: Tensor) -> HeadAnalysis:
        """The analysis of a plain linear layer, without gathering its weight."""
        weight = self._module.weight
        shape = getattr(weight, "ds_shape", weight.shape)
        width = shape[0] if len(shape) == 2 else self._module.out_features  # FSDP1 may hold flat weights
        return HeadAnalysis(width=width, dtype=matmul_dtype(hidden_LH) or hidden_LH.dtype)

    def _analysis_for(self, hidden_LH: Tensor) -> HeadAnalysis:
        """The analysis of any other module, once per kind of call and signature, as for a tiled module.

        It calls the module, so that engines gather its weights. So all ranks must take the same path here.
        """
        heads, signature = self._chunking.heads, module_signature(self._module)
        key = _mode(self._module, hidden_LH), signature.stable
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
        own_forward = self._module.__dict__.get("forward")

        def analyze(few_LH: Tensor) -> Tensor:
            nonlocal analysis
            require_weights(self._module)
            with patched_forwards({self._module: own_forward}):
                analysis = _analyzed(self._module, few_LH, with_grads, signature.versions)
            return few_LH

        with torch.no_grad():
            self._call(analyze, few)
        if analysis is None:  # the runs cannot tell, with these weights
            return HeadAnalysis("all of its gradients are zero with these weights, which verifies nothing")
        heads[key] = analysis
        return analysis

    def logits(self, hidden_LH: Tensor) -> Tensor:
        """The logits of all rows, as the model's own head computes them."""
        return self._call(self._module.forward, hidden_LH)

    def tile(self, function: Callable[..., Tensor], hidden_LH: Tensor, sample_0V: Tensor, *aligned_R: Tensor) -> Tensor:
        """`function(logits_CV, *aligned_C)` of each chunk of rows, concatenated: one result per row.

        `sample_0V` has the dtype and the width that the logits have when the loss reads them.
        """
        return self._by_chunks(tile_rows, function, hidden_LH, sample_0V, aligned_R)

    def sum(
        self,
        function: Callable[..., Tensor],
        hidden_LH: Tensor,
        sample_0V: Tensor,
        expected: Tensor,
        *aligned_R: Tensor,
    ) -> Tensor:
        """The sum of these results over all rows; `expected` is its probable incoming gradient.

        `function` also gets the keyword `expected` if its results are sure to receive that gradient.
        """
        # float16 gradients underflow without the loss scale, which is known only in backward.
        if torch.float16 in (hidden_LH.dtype, AutocastState(hidden_LH.device).dtype()):
            return self.tile(function, hidden_LH, sample_0V, *aligned_R).sum(0)
        run, function = (functools.partial(f, expected=expected) for f in (sum_rows, function))
        return self._by_chunks(run, function, hidden_LH, sample_0V, aligned_R)

    def _by_chunks(self, run, function, hidden_LH: Tensor, sample_0V: Tensor, aligned_R: Sequence[Tensor]) -> Tensor:
        module, own_forward = self._module, self._module.__dict__.get("forward")
        # Only a plain linear layer is known not to save its result. The loss may overwrite logits, but not views.
        keeps_nothing = type(module).forward is nn.Linear.forward and own_forward is None

        def losses(hidden_CH: Tensor, *aligned_C: Tensor) -> Tensor:
            logits_CV = module.forward(hidden_CH)
            return function(logits_CV if keeps_nothing else logits_CV.view_as(logits_CV), *aligned_C)

        def all_losses(hidden_RH: Tensor) -> Tensor:
            require_weights(module)
            num_rows = hidden_RH.shape[0]
            chunk_rows = self._chunking.loss_rows(
                hidden_RH.numel() * hidden_RH.element_size(), sample_0V.shape[-1] * sample_0V.element_size()
            )
            guard = functools.partial(self._chunking.guarded, "loss_chunk_size", chunk_rows, num_rows)
            with patched_forwards({module: own_forward}):
                return run(losses, module, [hidden_RH, *aligned_R], chunk_rows, guard=guard)

        result = self._call(all_losses, hidden_LH.reshape(-1, hidden_LH.shape[-1]))
        self._chunking.warnings.once(implementation(hidden_LH)[1])  # each model is told
        return result

    def _call(self, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Calls the module with its forward replaced, so that its hooks run once around all chunks."""
        unreadable = self._unreadable_reason() if self._weights_then is not None else ""
        if unreadable:
            raise RuntimeError(unreadable)
        with patched_forwards({self._module: forward}):
            return self._own_call(self._module, hidden)

    # The methods below serve logits that are read after the pass.

    def warn_materialized(self, operation: str) -> None:
        """Warns, once per operation, that all logits are computed for it."""
        self._chunking.warnings.once(
            f"logits are computed in full, without saving memory, for the operation {operation!r} on them"
        )

    def record_output(self, logits: Tensor) -> None:
        """Registers deferred logits of this head."""
        self._made.append(weakref.ref(logits))

    def finish(self) -> None:
        """Marks the end of the forward pass."""
        self._weights_then = _weights_of(self._module)

    def give(self, logits: Tensor, output: Any, name: str) -> None:
        """Sets logits as an attribute of a model's output until backward. They are not an item of it: no engine sees them."""
        if self._sharded:
            output.__dict__[name] = UnreadableLogits(_unreadable(self._sharded))
        else:
            output.__dict__[name] = logits
            self._outputs.append((weakref.ref(output), name))

    def release(self) -> None:
        """Called when backward reaches the loss: frees the hidden states, which would otherwise stay until its end.

        Logits that somebody else still holds are computed in full, since the weights are about to change.
        """
        if self._weights_then is None:
            return
        for reference, name in self._outputs:
            output = reference()
            if output is not None and self._is_mine(output.__dict__.get(name)):
                output.__dict__[name] = None
        for reference in self._made:
            logits = reference()
            if logits is not None:
                logits.settle(self._unreadable_reason())
        self._outputs, self._made = [], []

    def _is_mine(self, value: Any) -> bool:
        return value is not None and any(ref() is value for ref in self._made)

    def _unreadable_reason(self) -> str:
        """The reason why logits cannot be computed after the pass; empty if they can."""
        if self._sharded:
            return _unreadable(self._sharded)
        changed = self._weights_then != _weights_of(self._module)
        return _unreadable("the LM head's weights have changed since") if changed else ""


def _unreadable(reason: str) -> str:
    return (
        f"the model's logits cannot be computed any more: {reason}. With labels, ds_minis computes them only as far as the "
        'loss needs them; "return_logits": true in the mini-sequence configuration gives all of them'
    )


class UnreadableLogits:
    """Replaces logits that cannot be computed after the forward pass; any use raises RuntimeError with the reason."""

    def __init__(self, reason: str):
        self.__dict__["reason"] = reason

    def __repr__(self) -> str:
        return f"UnreadableLogits({self.reason!r})"

    def __getattr__(self, name: str):
        if name.startswith("__") and name.endswith("__"):  # copy, pickle and traversals of outputs probe these
            raise AttributeError(name)
        raise RuntimeError(self.reason)

    def _refuse(self, *_, **__):
        raise RuntimeError(self.reason)

    __getitem__ = __len__ = __iter__ = __float__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __matmul__ = _refuse

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        next(v for v in values if isinstance(v, cls))._refuse()


def _weights_of(module: nn.Module) -> list[tuple]:
    tensors = (*module.parameters(), *module.buffers())
    return [(id(t), t.shape, 0 if t.is_inference() else t._version) for t in tensors]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes only `x @ weight.T + bias`, with a weight that is a plain parameter."""
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return False
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight)


def _mode(module: nn.Module, hidden_LH: Tensor) -> tuple:
    autocast = AutocastState(hidden_LH.device).dtype()
    return module.training, torch.is_grad_enabled(), hidden_LH.dtype, hidden_LH.dim() > 2, hidden_LH.shape[-1], autocast


def _analyzed(module: nn.Module, few_LH: Tensor, with_grads: bool, versions: tuple) -> HeadAnalysis | None:
    """Analyzes a head on a few rows; None if they cannot tell."""
    reach = Reach()
    if has_values(few_LH):
        call = RowArgs((few_LH,), {})
        reason = token_wise_fallback_reason(module, module.forward, call, with_grads=with_grads, reach=reach)
        if reason != "":
            return None if reason is None else HeadAnalysis(reason, versions=versions if reach.versions else None)
    logits_LV = module.forward(few_LH[..., :1, :])
    return HeadAnalysis("", logits_LV.shape[-1], logits_LV.dtype, versions if reach.versions else None)
