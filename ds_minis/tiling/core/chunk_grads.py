"""Backward of one chunk: the step that all loops over chunks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_minis.tiling.core.grad_accum import GradientSums, drain

Run = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor | None]]]


def backward_of_chunk(
    run: Run,
    chunk: Sequence[Tensor],
    places: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    sums: Sequence[GradientSums],
    *,
    add: bool = False,
) -> None:
    """Runs a chunk with a graph, writes its inputs' gradients to `places`, and adds its parameters' gradients to `sums`.

    The graph and the gradients of a chunk are freed before the next chunk runs.

    Args:
        run: returns the chunk's outputs and their incoming gradients.
        chunk: the chunk's inputs, detached.
        places: one tensor for the gradient of each input; None where no gradient is needed. The first may share the
            incoming gradient's memory, so it is written last.
        leaves: the parameters, in the order of the leaves of all `sums`.
        sums: accumulate the parameters' gradients.
        add: add to `places`. Otherwise they are overwritten, with zeros where there is no gradient.
    """
    inputs = [t for t in (*chunk, *leaves) if t.requires_grad]
    outputs, incoming = run()
    if inputs and any(t.requires_grad for t in outputs):
        grads = drain(torch.autograd.grad(outputs, inputs, incoming, allow_unused=True))
    else:  # the trainable tensors were not used, such as those of a disabled adapter
        grads = iter([None] * len(inputs))
    del outputs, incoming
    write = add_ if add else copy_or_zero_
    first = next(grads) if places[0] is not None else None
    for place in places[1:]:
        if place is not None:
            write(place, next(grads))
    for own in sums:
        own.add(grads)
    if places[0] is not None:
        write(places[0], first)


def copy_or_zero_(place: Tensor, grad: Tensor | None) -> None:
    """Copies a gradient to its place, or zeros if it is None."""
    if grad is None:
        place.zero_()
    else:
        place.copy_(grad)


def add_(place: Tensor, grad: Tensor | None) -> None:
    """Adds a gradient to its place; does nothing if it is None."""
    if grad is not None:
        place.add_(grad)
