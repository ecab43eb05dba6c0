"""The seam between a decoder layer and its attention: transformers' attention interface.

Layers look up their attention function in `ALL_ATTENTION_FUNCTIONS` at each call. While a tiled layer runs, that lookup
returns a function of ds_minis, which receives the function and the arguments of the layer's call. transformers is not
imported: a layer that uses its interface has imported it already.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ds_minis.tiling.core.row_args import CONSTANTS, tensors_in

_REGISTRY, _REPLACED = "ALL_ATTENTION_FUNCTIONS", "_mini_sequence_replaced"


class AttentionRequest(NamedTuple):
    """A layer's call of its attention function, `function(module, *tensors, *args, **kwargs)[0]`.

    Attributes:
        tensors: queries `(B, N, T, D)`, keys `(B, K, T, D)` and values `(B, K, T, E)` for T tokens, N heads, K KV heads.
        args, kwargs: the rest: mask, scale, dropout, window, ...
    """

    function: Callable[..., Any]
    module: nn.Module
    tensors: tuple[Tensor, ...]
    args: tuple
    kwargs: Mapping[str, Any]

    @classmethod
    def of_call(cls, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> AttentionRequest:
        """Raises TypeError for a call in another form."""
        module, tensors, rest = args[:1], args[1:4], args[4:]
        if len(tensors) < 3 or [isinstance(t, Tensor) and t.dim() for t in tensors] != [4, 4, 4]:
            raise TypeError("its attention is not called with module, queries, keys and values, in this order")
        return cls(function, *module, tensors, rest, kwargs)

    def for_whole(self, whole_of: Callable[[Any], Any]) -> AttentionRequest:
        """The call for all tokens, without queries, keys and values; `whole_of` maps a chunk's argument to the whole one."""
        kwargs = {name: whole_of(value) for name, value in self.kwargs.items()}
        return self._replace(tensors=(), args=tuple(map(whole_of, self.args)), kwargs=kwargs)

    def per_head(self, num_heads: int) -> str:
        """The name of an argument with a dimension of heads; empty if none has one.

        A mask `(B, N, S, S)`, a bias `(N, S, S)`, slopes `(N, 1)` or sinks `(N,)`.
        """
        for name, value in (*enumerate(self.args), *self.kwargs.items()):
            if isinstance(value, Tensor) and value.dim() > 0:
                each = value.shape[1] if value.dim() == 4 else value.shape[0] if value.dim() in (1, 3) else 1
                if each > 1 and (value.dim() == 4 or each == num_heads):
                    return repr(name)
        return ""

    @property
    def way(self) -> tuple:
        """Cache key: function, class of the module, dtypes, names of the tensor arguments."""
        arguments = (*enumerate(self.args), *self.kwargs.items())
        names = (name for name, value in arguments if isinstance(value, Tensor))
        function = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return function, type(self.module).__qualname__, *(t.dtype for t in self.tensors), *names

    def argument_tensors(self) -> list[Tensor]:
        """All tensors in `args` and `kwargs`, also those in lists and tuples."""
        return tensors_in((self.args, self.kwargs))

    def call(self, tensors: Sequence[Tensor]) -> tuple:
        """Calls the function with these queries, keys and values; returns the output, and the attention weights or None."""
        return self.function(self.module, *tensors, *self.args, **self.kwargs)

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """The attention's output for these queries, keys and values, `(B, T, N, E)`."""
        return self.call(tensors)[0]


_ABSENT = object()


def settings_of(request: AttentionRequest) -> dict[int | str, Any]:
    """The constants among the arguments of an attention's call. For any other value: whether it is a tensor."""
    arguments = (*enumerate(request.args), *request.kwargs.items())
    return {name: value if isinstance(value, CONSTANTS) else isinstance(value, Tensor) for name, value in arguments}


def differing_setting(a: dict, b: dict) -> str:
    """The name of an argument that differs between two calls of the attention; empty if none does."""
    if a == b:
        return ""
    return next((repr(n) for n in {**a, **b} if a.get(n, _ABSENT) != b.get(n, _ABSENT)), "")


class AttentionReached(Exception):
    """Raised to stop a layer at its attention."""


Handler = Callable[[Callable[..., Any], tuple, dict[str, Any]], tuple]


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Answers(threading.local):
    """The handlers of attention calls in this thread, innermost last; how many contexts ask for unwrapped functions."""

    def __init__(self):
        self.stack: list[Handler] = []
        self.unwrapped = 0


_answers = _Answers()
_lock = threading.Lock()
_num_answering = 0  # in all threads
_default_wrapper: Wrapper | None = None


def attention_answered_by(answer: Callable[[AttentionRequest], Tensor]) -> attention_handled_by:
    """Inside, `answer` replaces each call of an attention function in this thread, and returns its output."""

    def handler(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
        return answer(AttentionRequest.of_call(function, args, kwargs)), None

    return attention_handled_by(handler)


@contextlib.contextmanager
def attention_replaced() -> Iterator[None]:
    """Inside, `attention_handled_by` is cheap: the lookup stays replaced from one handler to the next."""
    _set_answering(1)
    try:
        yield
    finally:
        _set_answering(-1)


class attention_handled_by:
    """Inside, this thread runs `handler(function, args, kwargs)` instead of the attention `function(*args, **kwargs)`."""

    def __init__(self, handler: Handler):
        self._handler = handler

    def __enter__(self) -> None:
        _set_answering(1)
        _answers.stack.append(self._handler)

    def __exit__(self, *_: object) -> None:
        _answers.stack.pop()
        _set_answering(-1)


def wrap_attention(wrap: Wrapper) -> None:
    """From now on, every lookup of an attention function gives `wrap(function)`, in all threads; a handler gets that too.

    The wrapped function must pass on calls that do not concern it. Calling this again changes nothing.
    """
    global _default_wrapper
    if _default_wrapper is None:
        _set_answering(1)
    _default_wrapper = wrap


@contextlib.contextmanager
def attention_unwrapped() -> Iterator[None]:
    """Inside, this thread's lookups give the functions themselves."""
    _answers.unwrapped += 1
    try:
        yield
    finally:
        _answers.unwrapped -= 1


def _set_answering(step: int) -> None:
    """Replaces the lookup while any thread has a handler or a wrapper. The replacement looks for those of its own thread."""
    global _num_answering
    with _lock:
        before, _num_answering = _num_answering, _num_answering + step
        if before and _num_answering:
            return
        registry = getattr(sys.modules["transformers.modeling_utils"], _REGISTRY)
        if before == 0:
            registry.__dict__[_REPLACED] = registry.__dict__.get("get_interface")
            registry.__dict__["get_interface"] = functools.partial(_answering, registry.get_interface)
        else:
            own = registry.__dict__.pop(_REPLACED)
            if own is None:
                del registry.__dict__["get_interface"]
            else:
                registry.__dict__["get_interface"] = own


def _answering(get_interface: Callable[..., Callable], *args, **kwargs) -> Callable:
    function = get_interface(*args, **kwargs)
    if _default_wrapper is not None and not _answers.unwrapped:
        function = _default_wrapper(function)
    if not _answers.stack:
        return function
    handler = _answers.stack[-1]

    def attention(*args, **kwargs):
        return handler(function, args, kwargs)

    attention.__wrapped__ = function  # its signature

    return attention


def interface_fallback_reason() -> str:
    """The reason why attention calls cannot be replaced here; empty if they can."""
    transformers, modeling = map(sys.modules.get, ("transformers", "transformers.modeling_utils"))
    registry = getattr(modeling, _REGISTRY, None)
    if registry is None or hasattr(registry, "get_interface"):
        return ""
    version = getattr(transformers, "__version__", "of this version")
    return f"transformers {version} lacks the attention interface that this needs (`get_interface`, since 5.1)"


def num_attentions(layer: nn.Module) -> int:
    """How many submodules of a layer look up their attention function in the interface."""
    return sum(_uses_interface(type(part)) for part in layer.modules())


@functools.cache
def _uses_interface(cls: type[nn.Module]) -> bool:
    functions = (f for base in cls.__mro__ if base is not nn.Module for f in vars(base).values() if callable(f))
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in functions)
    return any(code is not None and _REGISTRY in code.co_names for code in codes)
