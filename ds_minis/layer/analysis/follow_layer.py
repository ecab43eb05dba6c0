"""Traces a decoder layer on the meta device, with the attention replaced, at the lengths of a call and of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ds_minis.layer.attention.attention import AttentionRequest, attention_answered_by, differing_setting, settings_of
from ds_minis.layer.passes.layer_args import ChunkArgs, LayerArgs
from ds_minis.tiling.verify.follow import Reach, chunk_lengths, compare_runs, map_tensors, on_meta, record_run, to_meta


def follow_layer(
    forward: Callable[..., Any], layer: nn.Module, call: LayerArgs, x: Tensor, chunk_tokens: int, reach: Reach
) -> tuple[str, dict | None]:
    """`follow_module` for a layer without its attention; also returns the attention's non-tensor arguments."""
    num_tokens = x.shape[1]
    parts = chunk_lengths(num_tokens, chunk_tokens)
    reach.set(num_tokens, chunk_tokens, parts)
    settings = []
    if x.is_meta or num_tokens < 4:
        return "", None
    try:
        args, kwargs = call.arguments(to_meta(x), lambda _, value: map_tensors(value, to_meta))
        bare = LayerArgs(tuple(args), kwargs)
    except Exception:
        return "", None

    def answer(request: AttentionRequest) -> Tensor:
        settings.append(settings_of(request))
        q, _, v = request.tensors
        return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

    def run(part: ChunkArgs) -> None:
        with attention_answered_by(answer):
            forward(*part.args, **part.kwargs)

    found, followed = [], []
    with on_meta(layer):
        for size in (num_tokens, *parts):
            settings.clear()
            followed.append(record_run(run, bare.with_tokens(bare.hidden[:, :size].contiguous(), 0, size)))
            found.append(settings[0] if len(settings) == 1 else None)
    reason = ""
    for given in found[1:]:
        if found[0] is not None and given is not None and not reason:
            name = differing_setting(found[0], given)
            reason = f"its attention's argument {name} depends on the number of tokens" if name else ""
    reason = compare_runs(followed[0], list(zip(followed[1:], parts, strict=True)), num_tokens, reach, reason)
    return reason, found[0]
