"""Finds arguments of a module's forward by name, whether a call passes them by position or by keyword."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The argument names of the class's forward, without `self`."""
    return _names(type(module).forward)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of that name."""
    return name in argument_names(module)


@functools.cache
def _names(forward: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


@functools.cache
def takes_any_keyword(forward: Callable) -> bool:
    """Whether a function has `**kwargs`."""
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def argument(module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """The value that a call passes for an argument; None if it passes none."""
    return kwargs.get(name, dict(zip(argument_names(module), args, strict=False)).get(name))


def with_argument(module: nn.Module, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call with one of them replaced or added."""
    position = argument_names(module).index(name)
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
