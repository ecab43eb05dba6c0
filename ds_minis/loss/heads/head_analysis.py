"""Finds out whether an LM head may be run over chunks of rows.

Shapes: leading dimensions `*L` (batch, sequence), H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_minis.tiling.core.linear import runs_linear_forward
from ds_minis.tiling.core.replay import AutocastState, has_values
from ds_minis.tiling.core.row_args import RowArgs
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.token_wise import token_wise_fallback_reason


@dataclass(frozen=True)
class HeadAnalysis:
    """The analysis of an LM head: why it must see all tokens (empty if it need not), and width and dtype of its rows."""

    reason: str = ""
    width: int = 0
    dtype: torch.dtype | None = None
    versions: tuple | None = None  # of the tensors that it depends on (`signature`)


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes only `x @ weight.T + bias`, with a weight that is a plain parameter."""
    if not runs_linear_forward(module):
        return False
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight)


def call_mode(module: nn.Module, hidden_LH: Tensor) -> tuple:
    """All that an analysis depends on, beside the module: part of a cache key."""
    autocast = AutocastState(hidden_LH.device).dtype()
    return module.training, torch.is_grad_enabled(), hidden_LH.dtype, hidden_LH.dim() > 2, hidden_LH.shape[-1], autocast


def analyze_head(module: nn.Module, few_LH: Tensor, with_grads: bool, versions: tuple) -> HeadAnalysis | None:
    """Analyzes a head on a few rows; None if they cannot tell."""
    reach = Reach()
    if has_values(few_LH):
        call = RowArgs((few_LH,), {})
        reason = token_wise_fallback_reason(module, module.forward, call, with_grads=with_grads, reach=reach)
        if reason != "":
            return None if reason is None else HeadAnalysis(reason, versions=versions if reach.versions else None)
    logits_LV = module.forward(few_LH[..., :1, :])
    return HeadAnalysis("", logits_LV.shape[-1], logits_LV.dtype, versions if reach.versions else None)
