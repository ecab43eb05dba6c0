"""What a rank holds for the attention when ranks share a sequence, beside what its own tokens take (modelled)."""

from __future__ import annotations

from typing import Any

from ds_minis.parallel.attention.attention import fewer_bytes_by_heads
from ds_minis.planner.devices.held import Term
from ds_minis.planner.inputs.setup import Setup


def heads_of(text: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and the width of a head."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def mode_of(setup: Setup, text: Any) -> str:
    """The mode that is run, "hybrid" for a grid: what `parallel.attention.attention` chooses, and what it falls back to."""
    size, mode = setup.sequence_parallel, setup.sequence_parallel_mode
    heads, kv_heads, _ = heads_of(text)
    ring = heads % kv_heads == 0 and not getattr(text, "attn_logit_softcapping", None)
    if not isinstance(mode, str):
        return "hybrid" if ring and _divide(heads, kv_heads, mode["ulysses"]) else "gather"
    by_heads = _divide(heads, kv_heads, size)
    if mode == "auto":
        fewer = fewer_bytes_by_heads(heads, kv_heads, kv_heads, kv_heads, size)
        return "ulysses" if by_heads and (fewer or not ring) else "ring" if ring else "gather"
    return mode if {"ring": ring, "ulysses": by_heads}.get(mode, True) else "gather"


def _divide(heads: int, kv_heads: int, size: int) -> bool:
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _grid(setup: Setup, mode: str) -> tuple[int, int]:
    """Ranks that divide heads, and ranks that hand keys and values around."""
    size = setup.sequence_parallel
    if mode == "hybrid":
        return setup.sequence_parallel_mode["ulysses"], setup.sequence_parallel_mode["ring"]
    return (size, 1) if mode == "ulysses" else (1, size)


def received_bytes(setup: Setup, text: Any, rows: float) -> float:
    """Bytes that one rank receives for one layer in a step; `rows` are its own tokens."""
    size, (heads, kv_heads, width) = setup.sequence_parallel, heads_of(text)
    item, mode = setup.itemsize, mode_of(setup, text)
    if mode == "gather":
        return 6 * (size - 1) * rows * kv_heads * width * item
    by_heads, around = _grid(setup, mode)
    kv_heads = max(kv_heads, by_heads)
    divided = 6 * (by_heads - 1) / by_heads * rows * (heads + kv_heads) * width * item
    return divided + 2 * (around - 1) * rows * kv_heads * width * (3 * item + 4)


def terms_of_sequence_parallel(setup: Setup, text: Any, rows: float) -> list[Term]:
    """Memory of the exchange at the attention of one layer, forward and backward at once (an upper bound)."""
    size = setup.sequence_parallel
    if size == 1:
        return []
    heads, kv_heads, width = heads_of(text)
    item, mode = setup.itemsize, mode_of(setup, text)
    groups = (setup.settings or {}).get("head_groups", 1)
    groups = kv_heads if groups == "auto" else min(groups, kv_heads)
    if mode == "gather":
        nbytes = 2 * 2 * size * rows * (kv_heads / groups) * width * item
        why = "keys and values of all tokens and their gradients"
        return [Term(f"sequence parallelism ({mode})", "transient", nbytes, False, why)]
    by_heads, around = _grid(setup, mode)
    kv_heads, nbytes, why = max(kv_heads, by_heads), 0.0, []
    if by_heads > 1:
        nbytes += 2 * rows * (2 * heads + 2 * kv_heads) * width * item / groups
        why.append("queries, keys, values, outputs of a part of the heads and their gradients")
    if around > 1:
        nbytes += 2 * 2 * rows * (kv_heads / groups) * width * (item + 4)
        why.append("keys and values of two ranks and their gradients in float32")
    return [Term(f"sequence parallelism ({mode})", "transient", nbytes, False, "; ".join(why))]
