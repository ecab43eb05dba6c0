"""What depends on the length of the whole sequence, and not on a token and its position alone, before the first layer.

- Rotary embeddings of the kinds "dynamic" and "longrope" (Phi-3's 128K models) take other frequencies for sequences that are
  longer than a bound, told by the largest position. A rank has that of its own tokens: without this module, ranks would take
  different frequencies for lengths near the bound.
- transformers' NEFTune adds noise to the embeddings, less for a longer sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.parallel.attention.documents import names_in
from ds_minis.parallel.attention.state import Parallel
from ds_minis.parallel.communication.cut import Cut
from ds_minis.tiling.modules.arguments import argument_names
from ds_minis.tiling.modules.compiling import outside_of_graphs

_ALPHA = "neftune_noise_alpha"


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module computes from the largest of the positions that it is given."""
    if "position_ids" not in argument_names(module):
        return False
    kinds = getattr(module, "rope_type", "")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    computed = isinstance(getattr(module, "inv_freq", None), Tensor) and "max" in names_in(type(module).forward)
    return computed or any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


class AddLastPosition:
    """Forward pre-hook of a rotary embedding: the last position of the whole sequence behind this rank's."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, rotary: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._parallel.is_running:
            return None
        given = dict(zip(argument_names(rotary), args, strict=False)) | kwargs
        positions = given["position_ids"]
        last = self._parallel.last_position.to(positions).expand(*positions.shape[:-1], 1)
        return (), given | {"position_ids": torch.cat([positions, last], -1)}


class DropLastPosition:
    """Forward hook of a rotary embedding: `(..., T + 1, D)` -> `(..., T, D)`."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    @outside_of_graphs
    def __call__(self, rotary: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self._parallel.is_running:
            return output
        if isinstance(output, Tensor):
            return output[..., :-1, :].contiguous()
        return tuple(x[..., :-1, :].contiguous() for x in output)


@contextlib.contextmanager
def noise_of_whole(decoder: nn.Module, cut: Cut) -> Iterator[None]:
    """Context in which NEFTune's noise, alpha / sqrt(T * H), is as large as for all tokens, alpha / sqrt(S * H)."""
    before = {module: module.__dict__[_ALPHA] for module in decoder.modules() if _ALPHA in module.__dict__}
    for module, alpha in before.items():
        setattr(module, _ALPHA, alpha * (2 * cut.part / cut.num_tokens) ** 0.5)
    try:
        yield
    finally:
        for module, alpha in before.items():
            setattr(module, _ALPHA, alpha)


def attach(decoder: nn.Module, parallel: Parallel) -> None:
    """Registers the hooks of a decoder's rotary embeddings."""
    for module in decoder.modules():
        if depends_on_length(module):
            module.register_forward_pre_hook(AddLastPosition(parallel), with_kwargs=True)
            module.register_forward_hook(DropLastPosition(parallel), with_kwargs=True)
