"""Gradients written over the ones they are made of: one tensor of hidden states fewer at the peak."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ds_minis.tiling.core.replay import has_values


def can_overwrite(grad: Tensor) -> bool:
    """Whether nobody else holds an incoming gradient or its memory, so that it may be written over.

    Others do where a gradient goes two ways (a residual around the layer), or where a hook has kept it.
    """
    base = grad._base
    # Two in Python: the caller's variable and this argument (and one for the call). In C++ Python's own. The memory is held
    # by the tensor, by what it is a view of, and by the object asked here.
    if sys.getrefcount(grad) > 3 or grad._use_count() > 1 or not grad.is_contiguous() or grad.requires_grad:
        return False
    if torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > (2 if base is None else 3):
        return False
    # What it is a view of: the same in Python; the view and Python's own (and a fake tensor's own) in C++.
    return base is None or (sys.getrefcount(base) <= 3 and base._use_count() <= (2 if has_values(grad) else 3))
