"""The arguments of a decoder layer's call: finds those with a position per token, and rebuilds the call for some tokens.

B batch, S tokens of the whole sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_minis.tiling.core.params import untouched
from ds_minis.tiling.core.row_args import CONSTANTS, FEW, spread


class LayerArgs:
    """The arguments of a call, seen as positions of tokens.

    The first tensor is the hidden states, `(B, S, H)`. Another tensor is cut with it if its second dimension, or its only
    one, has size S. Masks are never cut: arguments of the attention are passed whole.

    Attributes:
        hidden: the hidden states; set to None by a caller that keeps the object until later.
        key: place, kind and token dimension of each other argument; calls with equal keys run the same way.
        reason: why the call cannot be run for some of its tokens; empty if it can.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self._args, self._kwargs = list(args), dict(kwargs)
        self.hidden: Tensor | None = None
        self.reason = ""
        self._place: int | str = 0
        self._batch = self._num_tokens = -1
        self._watched: list[tuple[int | str, Tensor, int]] = []
        key = []
        for place, value in (*enumerate(args), *kwargs.items()):
            if self.hidden is None and isinstance(value, Tensor):
                self.hidden, self._place = value, place
                (self._args if isinstance(place, int) else self._kwargs)[place] = None
                if value.dim() == 3 and value.is_floating_point():
                    self._batch, self._num_tokens, _ = value.shape
                continue
            reason, kind = _described(value)
            if reason and not self.reason:
                self.reason = f"its argument {place!r} {reason}"
            key.append((place, kind, self._dims(place, value)))
        self.key = tuple(key)
        if self._num_tokens < 0:
            self.reason = "its first tensor is not (batch, tokens, hidden size)"

    def with_tokens(self, x: Tensor, start: int, stop: int) -> ChunkArgs:
        """The same call for the tokens from `start` to `stop`, whose hidden states are `x`."""
        return ChunkArgs(self, x, start, stop)

    def narrowed(self, batch: int, tokens: int, replace: Callable[[Tensor], Tensor]) -> LayerArgs:
        """The call for the first tokens of the first sequences; masks stay whole.

        A call of too few tokens repeats them. `replace` maps the hidden states to other values; it gets tokens from the
        beginning, the middle and the end.
        """
        num_tokens, x = self.hidden.shape[1], self.hidden[:batch].detach()
        if x.shape[0] * min(num_tokens, tokens) < FEW:
            index = torch.arange(tokens, device=x.device) % num_tokens
            args, kwargs = self.arguments(x[:, index], lambda place, v: self._repeated(place, v, index))
            longer = LayerArgs(tuple(args), kwargs)
            return longer.narrowed(batch, tokens, replace)
        x = x[:, spread(torch.arange(min(num_tokens, tokens)), num_tokens)]
        few = ChunkArgs(self, replace(x), 0, x.shape[1], batch=x.shape[0])
        return LayerArgs(tuple(few.args), few.kwargs)

    def _repeated(self, place: int | str, value: Any, index: Tensor) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._repeated(place, v, index) for v in value)
        dim = self.dim_of_tokens(place, value) if isinstance(value, Tensor) else None
        return value if dim is None else value.index_select(dim, index)

    def arguments(self, x: Tensor, part: Callable[[int | str, Any], Any]) -> tuple[list, dict[str, Any]]:
        """The arguments, with `x` as the hidden states and `part(place, value)` as every other one."""
        args = [x if place == self._place else part(place, v) for place, v in enumerate(self._args)]
        return args, {place: x if place == self._place else part(place, v) for place, v in self._kwargs.items()}

    def placed(self, x: Tensor, args: list, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """Copies of these arguments, with `x` as the hidden states."""
        args = [list(v) if type(v) is list else v for v in args]
        kwargs = {name: list(v) if type(v) is list else v for name, v in kwargs.items()}
        (args if isinstance(self._place, int) else kwargs)[self._place] = x
        return args, kwargs

    def until_backward(self) -> None:
        """Call this before forward if backward recomputes the call: protects its arguments from changes until then.

        Masks and indices may be written to between forward and backward, as in a plain model. They are replaced by
        copy-on-write clones. Versions of floating-point tensors are checked, as autograd does.
        """
        self._args, self._kwargs = self.arguments(None, self._until_backward)

    def _until_backward(self, place: int | str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._until_backward(place, v) for v in value)
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return untouched(value)
        if not value.is_inference():
            self._watched.append((place, value, value._version))
        return value

    def require_unchanged(self) -> None:
        """Raises RuntimeError if an argument was changed in place since `until_backward`."""
        for place, value, version in self._watched:
            if value._version != version:
                raise RuntimeError(
                    f"the argument {place!r} of a decoder layer was changed in place between forward and backward, which "
                    "runs the layer once more. Change it after backward, or give each forward pass a tensor of its own"
                )

    def _dims(self, place: int | str, value: Any) -> Any:
        """The token dimension of each tensor in a value, for the key."""
        if isinstance(value, tuple | list):
            return tuple(self._dims(place, v) for v in value)
        return self.dim_of_tokens(place, value) if isinstance(value, Tensor) else None

    def dim_of_tokens(self, place: int | str, value: Tensor) -> int | None:
        """The dimension of an argument that has size S; None for one that each chunk gets whole."""
        if "mask" in str(place):
            return None
        if value.dim() >= 2 and value.shape[1] == self._num_tokens and value.shape[0] in (1, self._batch):
            return 1
        return 0 if value.dim() == 1 and value.shape[0] == self._num_tokens else None


class ChunkArgs:
    """The arguments of a call for some of the tokens.

    Attributes:
        args, kwargs: the arguments.
    """

    def __init__(self, call: LayerArgs, x: Tensor | None, start: int, stop: int, batch: int | None = None):
        self._call, self._slice, self._batch = call, slice(start, stop), batch
        self._whole_of: dict[int, Tensor] = {}  # id of a part -> the whole argument
        self.args, self.kwargs = call.arguments(x, self._part)

    def given(self, x: Tensor) -> tuple[list, dict[str, Any]]:
        """The arguments with `x` as the hidden states. `self` keeps none, if it was made with None."""
        return self._call.placed(x, self.args, self.kwargs)

    def _part(self, place: int | str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._part(place, v) for v in value)
        if not isinstance(value, Tensor):
            return value
        dim = self._call.dim_of_tokens(place, value)
        part = value
        if dim is not None:
            part = value[:, self._slice] if dim == 1 else value[self._slice]
            if self._batch is not None and dim == 1:
                part = part[: self._batch]
        if self._batch is not None and part.is_inference():
            part = part.clone()  # the analysis takes gradients, in inference mode too
        self._whole_of[id(part)] = value
        return part

    def whole_of(self, value: Any) -> Any:
        """The whole argument that a chunk's argument is a part of."""
        if isinstance(value, tuple | list):
            return type(value)(map(self.whole_of, value))
        return self._whole_of.get(id(value), value) if isinstance(value, Tensor) else value

    def is_argument(self, value: Tensor) -> bool:
        """Whether the layer passed on this tensor exactly as it got it."""
        return id(value) in self._whole_of


def _described(value: Any) -> tuple[str, Any]:
    """The reason why a value cannot be an argument of a tiled layer (empty if it can), and its kind."""
    if isinstance(value, tuple | list):
        parts = [_described(v) for v in value]
        return next((reason for reason, _ in parts if reason), ""), tuple(kind for _, kind in parts)
    if isinstance(value, Tensor):
        reason = "requires a gradient" if value.requires_grad and torch.is_grad_enabled() else ""
        return reason, (value.dim(), value.dtype)
    if isinstance(value, CONSTANTS):
        return "", value if isinstance(value, bool | str | type(None)) else type(value)
    if type(value).__name__ == "BlockMask":  # flex attention's
        return "", "BlockMask"
    return f"is a {type(value).__name__}, which may hold anything", type(value)
