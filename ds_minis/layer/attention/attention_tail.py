"""Skips what an attention module does before its attention, in runs that are given the attention's output.

Such a run of a layer would compute queries, keys and values a second time, only to throw them away: the projections are dead
values, but views, rotations and norms of heads would still run. Most attention modules do nothing after their attention but
apply one projection to its output. This is seen in the first chunk of each call, by the identity of tensors and not by their
values: any operation in between would give another tensor. Then later runs call the projection alone.

Shapes: B batch, C tokens of a chunk, N heads, E width of a value's head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.replay import has_values, patched_forwards, random_states


class AttentionTail:
    """What an attention module does with its attention's output, in one call of its layer.

    Args:
        module: the attention module.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._projection: nn.Module | None = None
        self._num_more = -1  # further results, all None; -1 for one tensor that is no tuple
        self._reached: list[Tensor] | None = None
        self._is_known = False
        self.skipped: list[nn.Module] = []  # the first run alone has called them, in front of its attention

    def answer(self, out: Tensor) -> Tensor:
        """Gives the attention's output to a run that has reached the attention."""
        self._reached = _random_states(out)
        return out

    def run(self, out: Tensor) -> contextlib.AbstractContextManager[None]:
        """Context for a run with this attention's output, `(B, C, N, E)`: watches the first run, shortens later ones."""
        if out.is_inference():  # writes to it are not counted
            return contextlib.nullcontext()
        if not self._is_known:
            self._is_known = True
            return self._watched(out)
        if self._projection is None:
            return contextlib.nullcontext()
        return patched_forwards({self._module: functools.partial(self.forward, out)})

    @contextlib.contextmanager
    def _watched(self, out: Tensor) -> Iterator[None]:
        children = [child for child in self._module._modules.values() if child is not None]
        calls: list[tuple[nn.Module, tuple, dict, Any, int]] = []
        results: list[Any] = []
        before: list[list[Tensor]] = []
        before_attention: list[nn.Module] = []
        version = _version(out)

        def watch_child(child: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def watching(*args, **kwargs):
                y = forward(*args, **kwargs)
                if self._reached is None:
                    before_attention.append(child)
                else:
                    calls.append((child, args, kwargs, y, _version(y)))
                return y

            return watching

        def watch_module(forward: Callable[..., Any]) -> Callable[..., Any]:
            def watching(*args, **kwargs):
                before.append(_random_states(out))
                results.append(forward(*args, **kwargs))
                return results[-1]

            return watching

        forwards = {child: watch_child(child, child.forward) for child in children}
        self._reached = None
        with patched_forwards(forwards | {self._module: watch_module(self._module.forward)}):
            yield
        reached, self._reached = self._reached, None
        if reached is None or len(results) != 1 or len(calls) != 1 or not all(map(torch.equal, before[0], reached)):
            return
        child, args, kwargs, y, y_version = calls[0]
        first, *more = results[0] if isinstance(results[0], tuple) else (results[0],)
        unchanged = isinstance(y, Tensor) and first is y and y._version == y_version and _version(out) == version
        if unchanged and not kwargs and len(args) == 1 and is_flat(args[0], out) and all(v is None for v in more):
            self._projection, self.skipped = child, before_attention
            self._num_more = len(more) if isinstance(results[0], tuple) else -1

    def forward(self, out: Tensor, *args, **kwargs) -> Any:
        y = self._projection(out.flatten(-2))
        return y if self._num_more < 0 else (y, *[None] * self._num_more)


def _random_states(out: Tensor) -> list[Tensor]:
    return random_states(out.device) if has_values(out) else []


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def is_flat(t: Any, out: Tensor) -> bool:
    """Whether `t` is `out.flatten(-2)`, in the same memory."""
    return (
        isinstance(t, Tensor)
        and t.dtype == out.dtype
        and t.shape == (*out.shape[:-2], out.shape[-2] * out.shape[-1])
        and t.is_contiguous()
        and t.untyped_storage()._cdata == out.untyped_storage()._cdata
        and t.storage_offset() == out.storage_offset()
    )
