"""Overwrites an incoming gradient with the one computed from it: one tensor of hidden states fewer at the peak."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ds_minis.tiling.core.replay import is_fake


def can_overwrite(grad: Tensor) -> bool:
    """Whether nothing else holds an incoming gradient or its memory, so that it may be overwritten.

    Something else does where a gradient flows to two places (a residual around the layer), or where a hook has kept it.
    """
    base = grad._base
    # Expected refcount 3: the caller's local, this argument, getrefcount's. Expected C++ use count 1: the Python object's.
    # The storage is counted for the tensor, for its base, and for the object made here.
    if sys.getrefcount(grad) > 3 or grad._use_count() > 1 or not grad.is_contiguous() or grad.requires_grad:
        return False
    if torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > (2 if base is None else 3):
        return False
    # The base: same refcount; C++ use count 2 for the view and the Python object (3 for a fake tensor).
    return base is None or (sys.getrefcount(base) <= 3 and base._use_count() <= (3 if is_fake(grad) else 2))
