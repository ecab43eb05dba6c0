"""Attention over the tokens of all ranks, by the model's own attention function and mask rule.

Three ways, each from this rank's queries, keys and values to its part of the output:

- gather: keys and values of all tokens are gathered, and this rank's two parts attend to them as chunks of a sequence with a
  cache do. For every attention function, mask and number of heads. Each rank holds the keys and values of all tokens for one
  layer, or for one group of heads with `head_groups`.
- ulysses: all-to-all; each rank attends for a part of the heads over all tokens, in the model's own call.
  Source: DeepSpeed-Ulysses, arXiv 2309.14509.
- ring: keys and values travel round the ranks (`ds_minis.parallel.attention.ring`). Source: Ring Attention, arXiv 2310.01889.

Shapes: B batch, S tokens of the whole sequence, T of a rank, N heads, K KV heads, D and E their widths.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.layer.attention.attention import AttentionRequest
from ds_minis.parallel.attention.gathered import gathered_attention
from ds_minis.parallel.attention.masks import MaskRule, Refused, SequenceMask, is_cutting
from ds_minis.parallel.attention.ring import in_autocast_dtype, ring_attention
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.collectives import exchange, gather_ranks, gather_sequence
from ds_minis.parallel.communication.cut import Cut
from ds_minis.parallel.communication.groups import Group

# Arguments that transformers gives to its attention functions and that change nothing under the ring's own kernel.
_HARMLESS = frozenset(
    ("is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "layer_idx",
     "output_hidden_states", "return_dict", "ignore_index")
)  # fmt: skip
_OF_A_RANK = ("position_ids", "cache_position")  # of its own tokens; flash attention would read documents there
_STANDARD = ("sdpa_attention_forward", "flash_attention_forward")


class ParallelAttention:
    """An attention function that, given a `SequenceMask`, attends to the tokens of all ranks, in one of the three ways.

    A call without one goes to `function` as it is.
    """

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args, **kwargs) -> tuple[Tensor, None]:
        found = [(i, v) for i, v in (*enumerate(args), *kwargs.items()) if isinstance(v, SequenceMask)]
        if not found:
            _require_whole(args, kwargs)
            return self.function(*args, **kwargs)
        (place, mask), *others = found
        rule = getattr(mask, "rule", None)
        if others or rule is None:
            raise Refused(f"sequence_parallel: {type(args[0]).__name__} changes its mask before its attention")
        return AttentionCall(AttentionRequest.of_call(self.function, args, kwargs), place, rule).run(), None


@functools.lru_cache(maxsize=64)
def parallel_attention(function: Callable[..., Any]) -> ParallelAttention:
    """The wrapper of an attention function; the same one each time."""
    return ParallelAttention(function)


def fewer_bytes_by_heads(q: int, k: int, v: int, kv_heads: int, size: int) -> bool:
    """Whether dividing heads among `size` ranks moves fewer bytes in a forward than handing keys and values around.

    Args:
        q, k, v: the widths of all heads together.
    """
    repeats = max(1, size // kv_heads)
    return (q + (k + v) * repeats + q) / size <= k + v


def _require_whole(args: tuple, kwargs: dict) -> None:
    """Refuses an attention in a pass on a part of the sequence whose mask was not made by transformers' functions."""
    if is_cutting():
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        what = "no mask" if mask is None else "a mask that it made itself"
        raise Refused(
            f"sequence_parallel: {type(args[0]).__name__} gives its attention {what}, and not one of transformers' "
            "masking functions, from which the mask for all tokens could be made"
        )


class AttentionCall:
    """One call of an attention."""

    def __init__(self, request: AttentionRequest, place: int | str, rule: MaskRule):
        self._request, self._place, self._rule = request, place, rule
        self._parallel: Parallel = rule.sequence.parallel
        self._group = self._parallel.group()
        self._cut = rule.sequence.cut

    def run(self) -> Tensor:
        """This rank's output, `(B, T, N, E)`."""
        mode, reason = self.mode()
        self._parallel.note(mode, reason)
        q, k, v = self._request.tensors
        if mode == "gather":
            return self._by_gather(q, k, v)
        if mode == "ulysses":
            return self._by_heads(self._group, self._cut, self._whole)
        if mode == "ring":
            return self._by_ring(q, k, v, self._group, self._cut)
        inner, outer = self._parallel.grid()
        cut = Cut(self._cut.padded, outer.size, outer.rank)
        return self._by_heads(inner, cut, lambda q, k, v, cut: self._by_ring(q, k, v, outer, cut))

    @property
    def _scale(self) -> float:
        scale = self._request.kwargs.get("scaling")
        return self._request.tensors[0].shape[-1] ** -0.5 if scale is None else scale

    def mode(self) -> tuple[str, str]:
        """The way of this call, and the reason if another was asked for."""
        wanted, size = self._parallel.settings.mode, self._group.size
        if wanted == "gather":
            return wanted, ""
        no_ring, no_heads = self._ring_fallback_reason, self._heads_fallback_reason(size)
        if wanted == "ring":
            return ("gather", no_ring) if no_ring else ("ring", "")
        if wanted == "ulysses":
            return ("gather", no_heads) if no_heads else ("ulysses", "")
        if wanted == "auto":
            return self._cheapest(no_ring, no_heads), ""
        reason = no_ring or self._heads_fallback_reason(self._parallel.settings.grid[0])
        return ("gather", reason) if reason else ("hybrid", "")

    def _cheapest(self, no_ring: str, no_heads: str) -> str:
        """The allowed way that moves the fewest bytes in a forward; the ring before gather, which holds more."""
        q, k, v = (t.shape[1] * t.shape[3] for t in self._request.tensors)
        fewer = fewer_bytes_by_heads(q, k, v, self._request.tensors[1].shape[1], self._group.size)
        if not no_heads and (fewer or no_ring):
            return "ulysses"
        return "gather" if no_ring else "ring"

    @functools.cached_property
    def _ring_fallback_reason(self) -> str:
        """The reason why the ring's kernel would not compute what this function does; empty if it does."""
        request, rule = self._request, self._rule
        name = getattr(request.function, "__name__", type(request.function).__name__)
        if name not in _STANDARD:
            return (
                f"{name} is not one of transformers' sdpa and flash attention functions, whose result the ring computes"
            )
        if not rule.is_causal or rule.window is None:
            return "its mask is neither causal nor a sliding window"
        others = dict(request.kwargs)
        for known in ("dropout", "scaling", "attention_mask"):
            others.pop(known, None)
        if request.kwargs.get("dropout"):
            return "it has dropout"
        if not rule.sequence.padding_is_behind:
            return "the batch has padding on the left"
        given = next((n for n, v in others.items() if n not in _HARMLESS and v is not None and v is not False), "")
        if len(request.args) > 1 or given:
            return f"its argument {given or len(request.args) + 3!r} is not known to the ring"
        q, k, _ = request.tensors
        return "" if q.shape[1] % k.shape[1] == 0 else "its heads are no multiple of its KV heads"

    def _heads_fallback_reason(self, size: int) -> str:
        """The reason why its heads cannot be divided among `size` ranks; empty if they can."""
        q, k, v = self._request.tensors
        if q.shape[1] % size:
            return f"{q.shape[1]} heads cannot be divided among {size} ranks"
        if k.shape[1] % size and size % k.shape[1]:
            return f"{k.shape[1]} KV heads can neither be divided among nor repeated for {size} ranks"
        if k.shape[1] != v.shape[1]:
            return "its keys and values have different numbers of heads"
        name = self._request.per_head(q.shape[1])
        return f"its argument {name} has a part for each head" if name else ""

    def _call(self, tensors: tuple[Tensor, ...], mask: Any) -> Tensor:
        """The model's function, with this mask in place of the rule."""
        args, kwargs = list(self._request.args), dict(self._request.kwargs)
        if isinstance(self._place, int):
            args[self._place - 4] = mask
        else:
            kwargs[self._place] = mask
        for name in _OF_A_RANK:
            kwargs.pop(name, None)
        return self._request.function(self._request.module, *tensors, *args, **kwargs)[0]

    def _by_gather(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._ring_fallback_reason:  # the same attention, whose mask would have a byte for each query and key
            q, k, v = in_autocast_dtype(q, k, v)
            keys, values = (gather_ranks(t, self._group) for t in (k, v))
            window, documents = self._rule.window or None, self._rule.sequence.documents_on_cpu
            return gathered_attention(q, keys, values, self._group.rank, self._scale, window, documents)
        k, v = (gather_sequence(t, _whole_cut(self._cut), self._group, 2) for t in (k, v))
        outs = []
        for queries, start in zip(q.split(self._cut.part, 2), self._cut.starts, strict=True):
            stop = start + self._cut.part
            num_keys = stop if self._rule.is_causal else self._cut.num_tokens
            mask = self._rule.mask(start, stop, num_keys)
            outs.append(self._call((queries, k[:, :, :num_keys], v[:, :, :num_keys]), mask))
        return torch.cat(outs, 1)

    def _by_heads(self, group: Group, cut: Cut, attend: Callable[..., Tensor]) -> Tensor:
        """All tokens of the group's ranks for a part of the heads: `attend(q, k, v, cut)`, and back."""
        inner = Cut(2 * group.size * self._cut.part, group.size, group.rank)
        q, k, v = self._request.tensors
        repeats = max(1, group.size // k.shape[1])
        k, v = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
        mine = [inner.in_order(exchange(list(t.chunk(group.size, 1)), group), 2) for t in (q, k, v)]
        del q, k, v
        with _kv_groups(self._request.module, mine[0].shape[1] // mine[1].shape[1]):
            of_ranks = inner.by_rank(attend(*mine, cut), 1)
        del mine
        return torch.cat(exchange(of_ranks, group), 2)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> Tensor:
        """The model's own call for all tokens."""
        num_tokens = cut.num_tokens
        q, k, v = (t[:, :, :num_tokens] for t in (q, k, v))
        return cut.pad(self._call((q, k, v), self._rule.mask(0, num_tokens, num_tokens)), 1)

    def _by_ring(self, q: Tensor, k: Tensor, v: Tensor, group: Group, cut: Cut) -> Tensor:
        documents = self._rule.sequence.documents_on_cpu
        return ring_attention(
            q, k, v, group=group.handle, scale=self._scale, window=self._rule.window or None, documents=documents
        )


def _whole_cut(cut: Cut) -> Cut:
    """The same cut of the padded sequence: padding is gathered too, as each part attends up to its own end."""
    return Cut(cut.padded, cut.size, cut.rank)


@contextlib.contextmanager
def _kv_groups(module: nn.Module, repeats: int) -> Iterator[None]:
    """Inside, the module's attention function repeats keys and values for this rank's share of the heads."""
    before = module.__dict__.get("num_key_value_groups")
    if before is None or before == repeats:
        yield
        return
    module.num_key_value_groups = repeats
    try:
        yield
    finally:
        module.num_key_value_groups = before
