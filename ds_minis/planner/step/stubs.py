"""What stands for the attention kernel and for the loss where memory or products are counted: no result of theirs matters.

The attention op has FlashAttention-2's: it reads q, k, v (grouped heads are not expanded), writes the output and one float32
logsumexp per head and token; its backward reads all of these and writes dq, dk, dv. The loss stand-in keeps the last
hidden states, hands a fresh gradient of their size to the decoder and lets go of both, as a fused loss does.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "ds_minis_stub"  # a name with "flash" in it is looked up as a kernel
# Called with ("forward" or "backward", module) at each call of the attention, where it is set.
ON_ATTENTION: contextvars.ContextVar[Callable[[str, nn.Module], None] | None] = contextvars.ContextVar(
    "ds_minis_on_attention", default=None
)
_MODULE: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("ds_minis_attention", default=None)


@torch.library.custom_op("ds_minis_planner::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.transpose(1, 2).clone(memory_format=torch.contiguous_format), q.new_zeros(q.shape[:3], dtype=torch.float32)


@flash.register_fake
def _(q, k, v):
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1]), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("ds_minis_planner::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.transpose(1, 2).clone(memory_format=torch.contiguous_format), torch.zeros_like(k), torch.zeros_like(v)


@flash_backward.register_fake
def _(grad, q, k, v, out, lse):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.module = _MODULE.get()


def _backward(ctx, grad, _):
    _tell("backward", ctx.module)
    return flash_backward(grad, *ctx.saved_tensors)


flash.register_autograd(_backward, setup_context=_setup)


def _tell(what: str, module: nn.Module | None) -> None:
    listener = ON_ATTENTION.get()
    if listener is not None and module is not None:
        listener(what, module)


def _attention(module, query, key, value, attention_mask, **kwargs):
    _tell("forward", module)
    token = _MODULE.set(module)
    try:
        return flash(query, key, value)[0], None
    finally:
        _MODULE.reset(token)


def _mask(*args, **kwargs):
    return None


def register() -> str:
    """Makes the stand-in known to transformers; gives the name to put into `attn_implementation`."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    return ATTENTION


def _products(queries: Tensor, number: int) -> int:
    """Causal: a matmul of tokens x tokens x width for each head, halved."""
    batch, heads, tokens, width = queries.shape
    return number * batch * heads * tokens * tokens * width


# 2 products in forward, 5 in backward.
FLOPS = {
    torch.ops.ds_minis_planner.flash: lambda args: _products(args[0], 2),
    torch.ops.ds_minis_planner.flash_backward: lambda args: _products(args[1], 5),
}


def no_mask() -> Tensor:
    """To be given as the mask: one of four dimensions is handed on as it is, where others are looked at for their values."""
    return torch.empty(1, 1, 1, 1, device="meta")


def copy_between(func, args: tuple, kwargs: dict) -> Tensor | None:
    """The result of a copy between host and meta device, which torch refuses; None for any other operation."""
    if func is torch.ops.aten.copy_.default and args[0].is_meta != args[1].is_meta:
        return args[0]
    if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
        return torch.empty(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
    return None


def grouped_product(func, args: tuple, kwargs: dict) -> Tensor | None:
    """The result of experts' products, whose meta kernel takes bfloat16 alone; None for any other operation.

    Rows of all experts times a matrix of each, or (its gradient) a sum over each expert's rows.
    """
    if func is not torch.ops.aten._grouped_mm.default or not args[0].is_meta:
        return None
    a, b = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if a.dim() == b.dim() == 2:
        shape = offsets.shape[0], a.shape[0], b.shape[1]
    else:
        shape = (*a.shape[-3:-1], b.shape[-1])
    return a.new_empty(shape, dtype=kwargs.get("out_dtype") or a.dtype)


class HostCopies(TorchDispatchMode):
    """Lets host and meta device copy to each other: only the memory of both counts."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copied = copy_between(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if copied is None else copied


class LossStandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states):
        ctx.save_for_backward(hidden_states)
        return hidden_states.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return torch.ones_like(ctx.saved_tensors[0])
