"""Backward of one chunk: the step that every loop over chunks has in common."""

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
    """Runs a chunk with a graph; its inputs' gradients go to their places, those of parameters are summed.

    The graph, and each gradient, is freed before the next is made: nothing of one chunk is there beside the next one's.

    Args:
        run: gives the chunk's outputs and the gradients that come in for them.
        chunk: the chunk's inputs, detached.
        places: where the gradient of each goes; None where it needs none. The first may be the memory of the incoming
            gradient, so it is written last.
        leaves: the parameters, in the order of those of all `sums`.
        sums: of the parameters' gradients.
        add: add to the places; otherwise they are overwritten, with zeros where there is no gradient.
    """
    inputs = [t for t in (*chunk, *leaves) if t.requires_grad]
    outputs, incoming = run()
    if inputs and any(t.requires_grad for t in outputs):
        grads = drain(torch.autograd.grad(outputs, inputs, incoming, allow_unused=True))
    else:  # trainable tensors that took no part, such as a disabled adapter's
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
    """Writes a gradient to its place; zeros for none."""
    if grad is None:
        place.zero_()
    else:
        place.copy_(grad)


def add_(place: Tensor, grad: Tensor | None) -> None:
    """Adds a gradient to what is in its place."""
    if grad is not None:
        place.add_(grad)
