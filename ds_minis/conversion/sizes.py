"""How large the chunks of a converted model are, and what a step does not hold for it, at a stated length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ds_minis.layer.tiled.tiled_layer import layer_experts_per_choice
from ds_minis.tiling.modules.state import Chunking

STATED_TOKENS = 8192


@dataclass(frozen=True)
class Sizes:
    """Of one process, for one sequence.

    Attributes:
        num_tokens: the stated length; the model's longest, where that is shorter.
        chunk_tokens: tokens of a chunk there, if there are as many.
        loss_tokens: tokens of a chunk of logits there; 0 where the loss is not tiled.
        logit_bytes: of logits that are not there at once; a plain loss holds several tensors of that size.
        activation_bytes: of the largest feed-forward module's projections that are not there at once.
        dtype: in which both are counted.
    """

    num_tokens: int
    chunk_tokens: int
    loss_tokens: int
    logit_bytes: int
    activation_bytes: int
    dtype: str

    def __str__(self) -> str:
        chunks = f"{self.chunk_tokens:,} tokens" + (f", of the loss {self.loss_tokens:,}" if self.loss_tokens else "")
        spared = [(self.logit_bytes, "of logits less at its loss")]
        spared += [(self.activation_bytes, "of activations less in each feed-forward module")]
        words = ", and ".join(f"{_in_units(count)} {what}" for count, what in spared if count)
        if not words and self.chunk_tokens < self.num_tokens:  # norms alone are cut, say, which are not counted here
            return f"  chunks: {chunks}"
        saving = f"{words}, at least" if words else "nothing less, as it is one chunk"
        return f"  chunks: {chunks}\n  saves: a step of {self.num_tokens:,} tokens ({self.dtype}) holds {saving}"

    def without_loss(self) -> Sizes:
        """Where the loss turns out to be somebody else's."""
        return dataclasses.replace(self, loss_tokens=0, logit_bytes=0)


def find_sizes(
    model: nn.Module,
    chunking: Chunking,
    layers: Sequence[nn.Module],
    feed_forwards: Sequence[nn.Module],
    has_loss: bool,
) -> Sizes:
    """The sizes of a model.

    Args:
        layers: those that are tiled as a whole.
        feed_forwards: the feed-forward modules that are tiled, in a layer or each for itself.
        has_loss: whether LM head and loss are tiled.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest, vocab_size = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    num_tokens = min(longest, STATED_TOKENS) if isinstance(longest, int) and longest > 0 else STATED_TOKENS
    experts = max(map(layer_experts_per_choice, layers), default=1.0)
    chunk = chunking.module_rows(num_tokens, chunking.hidden_size, experts)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    item, loss_chunk, logits = dtype.itemsize if dtype else 0, 0, 0
    if has_loss and isinstance(vocab_size, int) and vocab_size > 0 and item:
        rows = chunking.loss_rows(num_tokens * chunking.hidden_size * item, vocab_size * item)
        loss_chunk = min(rows, num_tokens)
        logits = (num_tokens - loss_chunk) * vocab_size * item
    widths = (sum(_widths(module, chunking.hidden_size)) for module in feed_forwards)
    activations = max(0, num_tokens - chunk) * max(widths, default=0) * item
    return Sizes(num_tokens, chunk, loss_chunk, logits, activations, str(dtype).removeprefix("torch."))


def _widths(feed_forward: nn.Module, hidden_size: int) -> Iterator[int]:
    """Widths of the projections of hidden states to something wider; what an adapter adds to them is not counted."""
    for module in feed_forward.modules():
        if isinstance(module, nn.Linear) and module.in_features == hidden_size < module.out_features:
            yield module.out_features


def _in_units(num_bytes: int) -> str:
    power, unit = next((p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes")) if num_bytes >= 2**p)
    return f"{num_bytes / 2**power:.1f} {unit}"
