"""Overwrites an incoming gradient with the one computed from it: one tensor of hidden states fewer at the peak."""

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
    # Expected refcount 3: the caller's local, this argument, getrefcount's. In C++, one: the Python object's. The storage is
    # counted for the tensor, for its base, and for the object made here.
    if sys.getrefcount(grad) > 3 or grad._use_count() > 1 or not grad.is_contiguous() or grad.requires_grad:
        return False
    if torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > (2 if base is None else 3):
        return False
    # Its base: the same refcount in Python; in C++ the view's and the Python object's (and a fake tensor's own).
    return base is None or (sys.getrefcount(base) <= 3 and base._use_count() <= (2 if has_values(grad) else 3))
