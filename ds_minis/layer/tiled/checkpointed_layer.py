"""Layers that do their own activation checkpointing, because a tiled layer needs none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_CHECKPOINT = "_gradient_checkpointing_func"


class ItsOwnCheckpointing:
    """Mixin for a decoder layer's class, before `Tiled`: moves activation checkpointing into the layer's forward."""

    @property
    def is_checkpointed(self) -> bool:
        """Whether activation checkpointing is enabled for it in training."""
        return _CHECKPOINT in self.__dict__ and self.gradient_checkpointing

    def _as_it_is(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], gated: bool = False) -> Any:
        """Runs the class's own forward, checkpointed if that is enabled.

        `gated`: one node returns all parameters' gradients. It then uses non-reentrant checkpointing, which keeps the node's
        place in the graph.
        """
        if not (self.is_checkpointed and self.training):
            return forward(*args, **kwargs)
        checkpoint = self.__dict__[_CHECKPOINT]
        if gated and isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
            checkpoint = functools.partial(checkpoint, use_reentrant=False)
        return checkpoint(functools.partial(forward, **kwargs), *args)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """The function that transformers checkpoints the layer with. It is given one that checkpoints nothing."""
        if _CHECKPOINT not in self.__dict__:
            raise AttributeError(_CHECKPOINT)
        return _run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        self.__dict__[_CHECKPOINT] = value


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
