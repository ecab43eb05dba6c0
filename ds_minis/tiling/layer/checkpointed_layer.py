"""Layers that see to their activation checkpointing themselves: a tiled layer needs none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_CHECKPOINT = "_gradient_checkpointing_func"


class ItsOwnCheckpointing:
    """Mixed into the class of a decoder layer, in front of `Tiled`: where it is checkpointed, its forward does so."""

    def _as_it_is(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], gated: bool = False) -> Any:
        """The class's own forward, checkpointed if that was asked for.

        `gated`: the parameters' gradients come from one node, whose place in the graph is lost with the reentrant kind.
        """
        checkpoint = self.__dict__.get(_CHECKPOINT)
        if checkpoint is None or not (self.gradient_checkpointing and self.training):
            return forward(*args, **kwargs)
        if gated and isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
            checkpoint = functools.partial(checkpoint, use_reentrant=False)
        return checkpoint(functools.partial(forward, **kwargs), *args)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """What transformers checkpoints a layer with; for transformers, nothing."""
        if _CHECKPOINT not in self.__dict__:
            raise AttributeError(_CHECKPOINT)
        return _run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        self.__dict__[_CHECKPOINT] = value


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
