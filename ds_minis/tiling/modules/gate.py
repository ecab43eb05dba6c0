"""Runs an untiled call so that its parameters get their gradients together, as in a tiled call.

ZeRO-1 and ZeRO-2 reduce gradients in the order of their arrival. A tiled call returns its parameters' gradients from one
node; autograd returns an untiled call's one by one, as each is computed. If one rank ran untiled (a hook, a requested output,
a different analysis) and another one by chunks, the sums would mix parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots, constants_of, is_partitioned
from ds_minis.tiling.core.participation import Memory, Walk, call_signature
from ds_minis.tiling.modules.hooks import engine_of
from ds_minis.tiling.verify.side_effects import quietly
from ds_minis.tiling.verify.snapshot import State


class _Gate(torch.autograd.Function):
    """Identity on inputs and parameters; its backward runs when all of their gradients are computed.

    Inputs are included as in a tiled call's node, so that autograd reaches the parameters in the same order. They are copies,
    since a module may write to its input.
    """

    @staticmethod
    def forward(ctx, num_inputs: int, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        return tuple(t.clone() if i < num_inputs else t.view_as(t) for i, t in enumerate(tensors))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        return None, *grads


def run_whole(
    module: nn.Module,
    forward: Callable[..., Any],
    run: Callable[[Callable[..., Any]], Any],
    memory: Memory,
    way: object,
    few: Callable[[], list[Tensor]] | None,
) -> Any:
    """`run(forward)`; with other ranks, one node returns the gradients of all the module's parameters.

    The graph inside is that of the plain model, so hooks, outputs of any kind and activation checkpointing work unchanged.

    Args:
        module: holds every trainable tensor that `forward` uses.
        run: calls the given forward once, and again in backward under activation checkpointing.
        memory: what earlier calls of the model's modules have shown.
        way: how the module is called; the same as for a tiled call.
        few: runs a few tokens and returns tensors whose graphs reach all weights that are used; None if it cannot.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not has_other_ranks():
        return run(forward)
    if any(engine_of(part) for part in module.modules() if part is not module):  # it gathers its weights inside
        return run(forward)
    slots = ParameterSlots(module)
    if not slots.tensors or not all(map(_is_held_whole, slots.tensors)):
        return run(forward)
    signature = call_signature(slots, constants_of(module), way)
    idle = memory.idle_when_whole(module, signature)
    if idle is None:
        idle = _idle_for(module, slots, few)
        memory.note_whole(module, signature, idle)

    def gated(*args, **kwargs):
        inside = ParameterSlots(module)
        inside.leave_out(idle)
        if not inside.tensors or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        places = [
            place for place, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor) and v.requires_grad
        ]
        inputs = [(args if isinstance(place, int) else kwargs)[place] for place in places]
        tensors = _Gate.apply(len(inputs), *inputs, *inside.tensors)
        args = list(args)
        for place, tensor in zip(places, tensors, strict=False):
            (args if isinstance(place, int) else kwargs)[place] = tensor
        with inside.reparametrized(tensors[len(inputs) :]):
            return forward(*args, **kwargs)

    return run(gated)


def _idle_for(module: nn.Module, slots: ParameterSlots, few: Callable[[], list[Tensor]] | None) -> tuple[int, ...]:
    """The indices of trainable tensors that the graphs of a few tokens do not reach.

    The call does not use these, or uses them in an autograd.Function of its own. They are left to autograd.
    """
    if few is None:
        return ()
    walk, state, device = Walk(slots), State(module), slots.tensors[0].device
    try:
        with quietly(module, device), walk.running():
            walk.seen(few())
    except Exception as error:  # perhaps only for a few tokens
        if is_out_of_memory(error):
            raise
        return ()
    finally:
        state.restore()
    return walk.idle()


def _is_held_whole(param: Tensor) -> bool:
    """Whether the parameter is a plain leaf.

    Not under ZeRO-3 and FSDP: they order gradients themselves, and a view would keep the weight gathered. Not inside of a
    module that has a gate already.
    """
    return param.is_leaf and not is_partitioned(param) and not is_traceable_wrapper_subclass(param)
