"""The positions of tokens, and the documents of packed rows.

Shapes: B batch, S tokens of the whole sequence.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.parallel.attention.masks import Refused

# What TRL's and transformers' collators give, with `position_ids`, for rows without padding.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
OF_DOCUMENTS = frozenset((*_BOUNDARIES, "max_length_q", "max_length_k", "seq_idx"))


def positions_and_documents(
    decoder: nn.Module, given: dict[str, Any], batch: int, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The position of every token, `(B or 1, S)`, and its document in a packed row.

    Packed rows are told as transformers tells them: by positions that begin again, without a mask and without a cache. What
    collators give for flash attention beside them must say the same.
    """
    positions = given.get("position_ids")
    if positions is None:
        _require_no_boundaries(given, "without position_ids")
        _require_counted_positions(decoder)
        positions = torch.arange(num_tokens, device=device)[None]
        return positions, None
    if positions.dim() != 2 or positions.shape[1] != num_tokens:
        raise Refused(
            f"sequence_parallel: position_ids has shape {tuple(positions.shape)}; allowed: (batch or 1, {num_tokens})"
        )
    if given.get("attention_mask") is not None:
        _require_no_boundaries(given, "beside attention_mask")
        return positions, None
    begins = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    begins[:, 0] = True
    _require_same_boundaries(given, begins)
    if not bool(begins[:, 1:].any()):
        return positions, None
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(decoder, "config", None), "use_cache", False)
    if use_cache:
        raise Refused(
            "sequence_parallel: position_ids begin again within a row (packed documents), and with a cache transformers "
            "attends across documents. Give use_cache=False, which keeps documents apart"
        )
    return positions, begins.long().cumsum(1).expand(batch, -1)


def _require_no_boundaries(given: dict[str, Any], how: str) -> None:
    name = next((name for name in (*_BOUNDARIES, "seq_idx") if given.get(name) is not None), None)
    if name is not None:
        raise Refused(
            f"sequence_parallel: {name} was given {how}, so the documents of a packed row cannot be told: give position_ids "
            "that begin again at each document, and no attention_mask"
        )


def _require_same_boundaries(given: dict[str, Any], begins: Tensor) -> None:
    """Refuses boundaries of documents that are not where positions begin again.

    Args:
        begins: `(B or 1, S)`, true at the first token of each document.
    """
    for name in _BOUNDARIES:
        boundaries = given.get(name)
        if boundaries is not None and not torch.equal(boundaries[:-1].long(), begins.flatten().nonzero()[:, 0]):
            raise _other_documents(name)
    documents = given.get("seq_idx")
    if documents is not None:
        changes = documents.diff(dim=1) != 0
        if not torch.equal(changes, begins[:, 1:].expand_as(changes)):
            raise _other_documents("seq_idx")


def _other_documents(name: str) -> Refused:
    return Refused(
        f"sequence_parallel: {name} and position_ids tell other documents apart: position_ids must begin again where a "
        "document does, and nowhere else"
    )


def _require_counted_positions(decoder: nn.Module) -> None:
    """Refuses a model that does not count its tokens from 0 where it is given no positions (RoBERTa's, from the ids)."""
    maker = next((part for part in decoder.modules() if _makes_positions_from_ids(type(part))), None)
    if maker is not None:
        raise Refused(
            f"sequence_parallel: {type(maker).__name__} makes positions from the tokens: give position_ids, such as "
            "model.create_position_ids_from_input_ids makes them"
        )


@functools.cache
def _makes_positions_from_ids(cls: type[nn.Module]) -> bool:
    names = (name for base in cls.__mro__ for name in (*vars(base), *names_in(vars(base).get("forward"))))
    return any("position_ids_from" in name for name in names)


def names_in(function: Any) -> tuple[str, ...]:
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ()) if callable(function) else ()
