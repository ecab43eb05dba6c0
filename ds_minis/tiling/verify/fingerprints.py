"""Fingerprints of weight gradients: two runs of a module are compared without keeping gradients as large as its weights.

A fingerprint holds the gradient's products with one random vector of signs on each side. A difference in any element changes
both products, and NaN stays NaN.

V rows and H columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ds_minis.tiling.core.replay import has_values

_SMALL = 2**12  # elements; smaller gradients are compared as they are


def fingerprints(grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """One for each gradient. A watch on the module does not see how they are made: their signs are random."""
    found = []
    for grad in grads:
        with _disable_current_modes():
            found.append(None if grad is None else fingerprint(grad))
        del grad
    return found


def fingerprint(grad: Tensor) -> Tensor:
    """The two products of a gradient, `(V + H,)`; a small one itself."""
    if grad.numel() <= _SMALL or grad.dim() < 2 or type(grad) is not Tensor or not has_values(grad):
        return grad
    grad_VH = grad.flatten(0, -2)
    rows, columns = grad_VH.shape
    return torch.cat([grad_VH @ _signs(columns, grad), _signs(rows, grad) @ grad_VH])


def _signs(count: int, like: Tensor) -> Tensor:
    """Random signs, the same for each call of one size; scaled so that a product is about as large as an element."""
    generator = torch.Generator().manual_seed(count)
    signs = torch.randint(2, (count,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
    return signs.to(like.device, like.dtype) * count**-0.5
