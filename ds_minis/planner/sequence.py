"""What a rank holds for the attention when ranks share a sequence, beside what its own tokens take (modelled)."""

from __future__ import annotations

from typing import Any

from ds_minis.planner.held import Term
from ds_minis.planner.setup import Setup


def heads_of(text: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and the width of a head."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def mode_of(setup: Setup, text: Any) -> str:
    """The mode that is run: "auto" takes what moves the fewest bytes (docs/sequence_parallel.md)."""
    size, mode = setup.sequence_parallel, setup.sequence_parallel_mode
    if mode != "auto":
        return mode if isinstance(mode, str) else "ring"
    heads, kv_heads, _ = heads_of(text)
    if heads % size:
        return "ring"
    ulysses = 6 * (size - 1) / size * (heads + max(kv_heads, size)) * setup.itemsize
    ring = 2 * (size - 1) * kv_heads * (3 * setup.itemsize + 4)
    return "ulysses" if ulysses <= ring else "ring"


def received_bytes(setup: Setup, text: Any, rows: float) -> float:
    """Bytes that one rank receives for one layer in a step; `rows` are its own tokens."""
    size, (heads, kv_heads, width) = setup.sequence_parallel, heads_of(text)
    item, mode = setup.itemsize, mode_of(setup, text)
    if mode == "gather":
        return 6 * (size - 1) * rows * kv_heads * width * item
    if mode == "ulysses":
        return 6 * (size - 1) / size * rows * (heads + max(kv_heads, size)) * width * item
    return 2 * (size - 1) * rows * kv_heads * width * (3 * item + 4)


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
    elif mode == "ulysses":
        nbytes = 2 * rows * (2 * heads + 2 * max(kv_heads, size)) * width * item / groups
        why = "queries, keys, values, outputs of a part of the heads and their gradients"
    else:
        nbytes = 2 * 2 * rows * (kv_heads / groups) * width * (item + 4)
        why = "keys and values of two ranks and their gradients in float32"
    return [Term(f"sequence parallelism ({mode})", "transient", nbytes, False, why)]
