"""A model's own mask rule, evaluated at the positions of the whole sequence.

transformers' models ask a function of `ALL_MASK_ATTENTION_FUNCTIONS` for their masks and give it their rule,
`rule(batch, head, query, key) -> bool`. While a model runs on a part of a sequence, that function is replaced: it gives a
`SequenceMask`, from which the attention makes the mask of any tokens later, by the model's own function and rule.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_minis.parallel.communication.cut import Cut

_REGISTRY = "ALL_MASK_ATTENTION_FUNCTIONS"
_SAME = frozenset("clone detach to contiguous __getitem__ float half bfloat16 double type _lazy_clone".split())


class Refused(RuntimeError):
    """Something that sequence parallelism cannot run with the result of one process."""


class Sequence:
    """What is known of the whole sequence in one forward pass.

    Attributes:
        cut: how its S tokens are cut among the ranks.
        padding: `(B, S)`, False where a token is padding of the user's; None if there is none.
        documents: `(B, S)`, the number of each token's document in a packed row; None if rows hold one each.
        parallel: the ranks that share the sequence, and how they attend.
    """

    def __init__(self, cut: Cut, padding: Tensor | None, documents: Tensor | None, parallel: Any):
        self.cut, self.padding, self.documents, self.parallel = cut, padding, documents, parallel

    @functools.cached_property
    def padded_documents(self) -> Tensor | None:
        """The documents of the padded sequence, in which padding is of none."""
        return None if self.documents is None else self.cut.pad(self.documents, fill=-1)

    @functools.cached_property
    def documents_on_cpu(self) -> Tensor | None:
        """The same, where the ring reads which blocks see each other."""
        return None if self.documents is None else self.padded_documents.cpu()

    @functools.cached_property
    def padding_is_behind(self) -> bool:
        """Whether no real token comes after padding, so that a causal mask hides padding from all of them."""
        return self.padding is None or bool((self.padding.long().diff(dim=1) <= 0).all())


class MaskRule:
    """How a model makes a mask: its function, its rule, and the other arguments of its call."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any], sequence: Sequence):
        self.make, self.arguments, self.sequence = make, arguments, sequence
        self._made: dict[tuple, Any] = {}

    @property
    def rule(self) -> Callable[..., Tensor]:
        """The model's rule, without documents and padding."""
        return self.arguments["mask_function"]

    def mask(self, start: int, stop: int, num_keys: int) -> Any:
        """The mask for the queries from `start` to `stop` and the first `num_keys` keys, as the model's attention takes it.

        It is made once in a forward pass, for all layers that share the rule.
        """
        place = start, stop, num_keys
        if place not in self._made:
            self._made[place] = self._make(start, stop, num_keys)
        return self._made[place]

    def _make(self, start: int, stop: int, num_keys: int) -> Any:
        arguments = dict(self.arguments)
        documents, padding = self.sequence.padded_documents, self.sequence.padding
        if documents is not None:
            arguments["mask_function"] = _within(documents, self.rule)
            arguments["allow_is_causal_skip"] = False
        if padding is not None:  # what the cut puts behind a sequence is not masked: a row of nothing would be NaN
            padding = self.sequence.cut.pad(padding, fill=True)[:, :num_keys]
        return self.make(**arguments | {
            "q_length": stop - start, "kv_length": num_keys, "q_offset": start, "kv_offset": 0, "attention_mask": padding,
        })  # fmt: skip

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether no token attends to a later one, by the rule for a few tokens."""
        few = torch.arange(min(self.sequence.cut.num_tokens, 64))
        device = self.arguments.get("device") or "cpu"
        allowed = self._allowed(few.to(device), few.to(device))
        return not bool(allowed.triu(1).any())

    @functools.cached_property
    def window(self) -> int | None:
        """The sliding window of the rule; 0 for causal attention without one, None if the rule is another one.

        A window of w: a token attends to itself and the w - 1 before it. The rule is read off its last row, and compared at
        up to 64 other rows.
        """
        device, last = self.arguments.get("device") or "cpu", self.sequence.cut.num_tokens - 1
        keys = torch.arange(last + 1, device=device)
        rows = torch.unique(torch.cat([torch.linspace(0, last, 48).long(), torch.arange(max(0, last - 15), last + 1)]))
        rows = rows.to(device)
        allowed = self._allowed(rows, keys)
        window = int(allowed[-1].sum())
        expected = (keys <= rows[:, None]) & (keys > rows[:, None] - window)
        if not torch.equal(allowed, expected):
            return None
        return 0 if window == last + 1 else window

    def _allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=keys.device)
        allowed = self.rule(zero, zero, queries[:, None], keys[None])
        return torch.as_tensor(allowed, device=keys.device).expand(len(queries), len(keys))


def _within(documents: Tensor, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_one_document(batch, head, query, key):
        return rule(batch, head, query, key) & (documents[batch, query] == documents[batch, key])

    return of_one_document


class SequenceMask(torch.Tensor):
    """A mask `(1, 1, 1, 1)` that masks nothing, with the rule of the true one.

    It goes through a model as its mask would. What is computed from it is an ordinary tensor without the rule.
    """

    @staticmethod
    def of(rule: MaskRule, dtype: torch.dtype, device: Any) -> SequenceMask:
        mask = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device).as_subclass(SequenceMask)
        mask.rule = rule
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or getattr(func, "__name__", "") == "__get__":
            return result
        rule = next((a.rule for a in args if isinstance(a, SequenceMask) and hasattr(a, "rule")), None)
        if getattr(func, "__name__", "") in _SAME and result.shape == (1, 1, 1, 1) and rule is not None:
            result = result.as_subclass(SequenceMask)
            result.rule = rule
            return result
        return result.as_subclass(Tensor) if isinstance(result, SequenceMask) else result


class _Sequences(threading.local):
    """The sequence of each pass in progress in this thread, innermost last."""

    def __init__(self):
        self.stack: list[Sequence] = []


_sequences = _Sequences()
_lock = threading.Lock()
_num_replacing = 0  # in all threads
_replaced: dict[str, Any] = {}


@contextlib.contextmanager
def masks_of(sequence: Sequence) -> Iterator[None]:
    """Inside, masks that transformers' models make in this thread are `SequenceMask`s."""
    _set_replacing(1)
    _sequences.stack.append(sequence)
    try:
        yield
    finally:
        _sequences.stack.pop()
        _set_replacing(-1)


def is_cutting() -> bool:
    """Whether a model runs on a part of a sequence in this thread."""
    return bool(_sequences.stack)


def _set_replacing(step: int) -> None:
    global _num_replacing
    registry = getattr(sys.modules.get("transformers.masking_utils"), _REGISTRY, None)
    if registry is None:
        return
    with _lock:
        before, _num_replacing = _num_replacing, _num_replacing + step
        if before == 0:
            _replaced.update(registry._local_mapping)
            for name in list(registry):
                registry[name] = functools.partial(_made, registry[name])
        elif _num_replacing == 0:
            registry._local_mapping.clear()
            registry._local_mapping.update(_replaced)
            _replaced.clear()


def _made(make: Callable[..., Any], *args, **kwargs) -> Any:
    if not _sequences.stack or args or "mask_function" not in kwargs:
        return make(*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise Refused(
            "sequence_parallel: the model adds a mask function of its own to the causal one, which may read the tokens of "
            "one rank as if they were all. Leave sequence_parallel out for this input"
        )
    rule = MaskRule(make, kwargs, _sequences.stack[-1])
    return SequenceMask.of(rule, kwargs.get("dtype") or torch.float32, kwargs.get("device"))
