"""A call that runs whole, whose parameters get their gradients as those of a tiled one do: together, when all are there.

ZeRO-1 and ZeRO-2 add up the ranks' gradients in the order in which they come. A tiled call hands over its parameters'
gradients from one node; autograd gives an untiled call's one by one, as each is computed. So where one rank may run whole
(a hook, an output that was asked for, another verdict) and another rank by chunks, their sums would mix parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.ranks import has_other_ranks
from ds_minis.tiling.core.out_of_memory import is_out_of_memory
from ds_minis.tiling.core.params import ParameterSlots, constants_of
from ds_minis.tiling.core.participation import Memory, Walk, signature_of
from ds_minis.tiling.modules.hooks import engine_of
from ds_minis.tiling.verify.side_effects import quietly
from ds_minis.tiling.verify.snapshot import State


class _Gate(torch.autograd.Function):
    """Gives inputs and parameters as they are; their gradients pass when the last one is there.

    Inputs too, as a tiled call's node has both: which parameter autograd takes first depends on what else is ready. They are
    copies, as a module may write to its input.
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
    """`run(forward)`, with the gradients of the module's parameters from one node where there are other ranks.

    The graph inside is the plain model's: hooks, outputs of any kind and activation checkpointing see no difference.

    Args:
        module: holds every trainable tensor that `forward` uses.
        run: calls what it is given, once or (under activation checkpointing) again in backward.
        memory: what is known of the model's modules from earlier calls.
        way: how the module is called, as a tiled call would have it.
        few: runs a few tokens and gives tensors of whose graphs all weights are that take part; None if that cannot be done.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not has_other_ranks():
        return run(forward)
    if any(engine_of(part) for part in module.modules() if part is not module):  # which gathers its weights inside
        return run(forward)
    slots = ParameterSlots(module)
    if not slots.tensors or not all(map(_is_held_whole, slots.tensors)):
        return run(forward)
    signature = signature_of(slots, constants_of(module), way)
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
    """The trainable tensors that a few tokens do not use, or (a Function that runs its module again) not in their graph.

    They are left to autograd, which has no node for them or one of its own.
    """
    if few is None:
        return ()
    walk, state, device = Walk(slots), State(module), slots.tensors[0].device
    try:
        with quietly(module, device), walk.running():
            walk.seen(few())
    except Exception as error:  # on a few tokens alone, perhaps
        if is_out_of_memory(error):
            raise
        return ()
    finally:
        state.restore(module)
    return walk.idle()


def _is_held_whole(param: Tensor) -> bool:
    """Not where ZeRO-3 or FSDP gathers it: they put gradients in order themselves, and a view would keep it gathered.

    Nor where a module around has a gate.
    """
    return param.is_leaf and not hasattr(param, "ds_id") and not is_traceable_wrapper_subclass(param)
