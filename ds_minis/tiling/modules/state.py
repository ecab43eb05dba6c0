"""How many rows go into one chunk. A row is one vector of the last dimension: usually one token's hidden state."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_minis.config import AUTO, MiniSequenceConfig
from ds_minis.tiling.core.exclusive import trackers_aside
from ds_minis.tiling.core.out_of_memory import in_a_chunk, in_a_first_call
from ds_minis.tiling.core.participation import Memory
from ds_minis.tiling.core.warn import Warnings
from ds_minis.tiling.verify.signature import AnalysisCache

# A feed-forward module needs about this many rows in one matmul before the weights' own traffic stops to show; beyond
# it a larger chunk only costs memory.
_MIN_AUTO_TOKENS, _MAX_AUTO_TOKENS = 1024, 3072
# A chunk that is shared out among many experts must leave each of them so many tokens on average.
_AUTO_TOKENS_PER_EXPERT, _MAX_AUTO_EXPERT_TOKENS = 128, 16384
# Bytes of one chunk's logits, at most.
_MAX_AUTO_LOGIT_BYTES = 2**29
_MIN_AUTO_LOSS_TOKENS = 256
_lock = threading.Lock()


@dataclass
class Chunking:
    """Chunk sizes of one converted model; all of its tiled modules hold the same object.

    Attributes:
        config: the user's settings.
        hidden_size: width of the model's hidden states, in elements; what one token is for `chunk_size`.
        layer_inputs: where its tiled layers keep their inputs (`ds_minis.tiling.memory`); None: with autograd.
        unread: what need not be computed in a layer of some make (`ds_minis.tiling.layer.analysis`).
        unkept: where an attention cannot be kept -> (class name of the layer, reason); see
            `ds_minis.tiling.passes.kept_attention`.
        kept_plans: what is kept of an attention (`ds_minis.tiling.passes.kept_attention`).
        heads: what was found out about LM heads (`ds_minis.tiling.loss.chunked_head`).
        bypassed: why the loss of the last forward pass in training could not be tiled; empty if it was.
        warnings: those that were given about the model.
        memory: what is known of its modules from earlier calls.
        passes: what the end of each forward pass in progress must undo (`ds_minis.tiling.loss.forward_hooks`).
        last_calls: "layer" or "module" -> (tokens, tokens of a chunk, whether it ran as it is) of the last one in training.
    """

    config: MiniSequenceConfig
    hidden_size: int
    _suspensions: int = field(default=0, repr=False, compare=False)
    layer_inputs: Any = field(default=None, repr=False, compare=False)
    dead_values: dict[tuple, Any] = field(default_factory=dict, repr=False, compare=False)
    unkept: dict[tuple, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)
    kept_plans: dict[tuple, list] = field(default_factory=dict, repr=False, compare=False)
    heads: AnalysisCache = field(default_factory=AnalysisCache, repr=False, compare=False)
    bypassed: str = field(default="", repr=False, compare=False)
    warnings: Warnings = field(default_factory=Warnings, repr=False, compare=False)
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    passes: list[contextlib.ExitStack] = field(default_factory=list, repr=False, compare=False)
    last_calls: dict[str, tuple[int, int, bool]] = field(default_factory=dict, repr=False, compare=False)

    @contextlib.contextmanager
    def guarded(self, setting: str = "", chunk_rows: int = 0, num_rows: int = 0) -> Iterator[None]:
        """Around the chunks of one operation: what a fault in there must not leave behind, and should tell.

        With `chunk_rows` 0, around a first call's questions. An interrupt (Ctrl-C) ends the forward passes in progress, as
        torch calls no hooks for it. Out of memory gets a note that names the place and the setting
        (`ds_minis.tiling.core.out_of_memory`).
        """
        try:
            note = in_a_chunk(self.config, setting, chunk_rows, num_rows) if chunk_rows else in_a_first_call
            with note, trackers_aside():
                yield
        except Exception:
            raise
        except BaseException:
            while self.passes:
                self.passes[-1].close()
            raise

    def described(self) -> str:
        """Scope and chunk size."""
        count = self.config.num_mini_sequences
        size = f"chunk_size={self.config.chunk_size}" if count is None else f"num_mini_sequences={count}"
        return f"scope={self.config.scope}, {size}"

    @contextlib.contextmanager
    def untiled(self) -> Iterator[None]:
        """Inside, tiled modules run as they are: what they are given is a chunk already."""
        self.suspend(1)
        try:
            yield
        finally:
            self.suspend(-1)

    def note(self, role: str, num_tokens: int, chunk_tokens: int, *, as_it_is: bool = False) -> None:
        """Takes down a call with gradients, for the report; not in a compiled graph."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.last_calls[role] = num_tokens, chunk_tokens, as_it_is

    def last_step(self) -> str:
        """What the last forward pass in training was cut into: its layers, or, where none was tiled, the modules in them."""
        call = self.last_calls.get("layer") or self.last_calls.get("module")
        if call is None:
            return ""
        num_tokens, chunk_tokens, as_it_is = call
        if as_it_is:
            return (
                f"nothing was cut: {num_tokens:,} tokens fit into one chunk of {chunk_tokens:,}, so the layers ran as "
                'they do without ds_minis (a smaller "chunk_size" cuts them, for less memory)'
            )
        num_chunks = -(-num_tokens // chunk_tokens)
        return f"{num_tokens:,} tokens in {num_chunks:,} chunk{'s'[: num_chunks > 1]} of at most {chunk_tokens:,}"

    @property
    def suspended(self) -> bool:
        """True while the model runs a forward pass that must equal the unconverted model's to the bit, or a chunk."""
        return self._suspensions > 0

    def suspend(self, step: int) -> None:
        """Counted, as replicas of a model (`nn.DataParallel`) share this, each in a thread of its own."""
        with _lock:
            self._suspensions += step

    def module_rows(self, num_rows: int, width: int, experts_per_choice: float = 1.0) -> int:
        """Rows per chunk for a module whose input has `num_rows` rows of `width` elements.

        Narrower rows (the heads that a query norm sees) are counted as the fraction of a token that they are.

        Args:
            experts_per_choice: experts, divided by the number of them that each token is sent to.
        """
        if self.config.num_mini_sequences is not None:
            return max(1, -(-num_rows // self.config.num_mini_sequences))
        tokens = self.config.chunk_size
        if tokens == AUTO:
            tokens = min(max(self.hidden_size, _MIN_AUTO_TOKENS), _MAX_AUTO_TOKENS)
            busy = min(int(_AUTO_TOKENS_PER_EXPERT * experts_per_choice), _MAX_AUTO_EXPERT_TOKENS)
            tokens = max(tokens, busy)
        return max(1, tokens * max(1, self.hidden_size // width))

    def loss_rows(self, hidden_bytes: int, row_bytes: int) -> int:
        """Rows of logits per chunk.

        "auto" keeps to a fixed budget, so that runs are reproducible and no rank depends on another's memory:

        - the logits of one chunk take at most 512 MiB, in the dtype in which the loss gets them. A plain head and loss hold
          nothing else of that size; what a model does to its logits before (a softcap) holds a few times as much.
        - below that, half of the bytes of the hidden states: with their gradient, as large as themselves, the loss takes 1.5
          times their bytes (3 x hidden size per token in bfloat16).
        - but as many rows as the hidden size at least (and 256): every chunk adds to the weight gradient's sum, which is
          read and written each time, and with fewer rows that takes longer than the product.

        The sum of the weight gradient is fixed, whatever the chunk: 4 bytes x vocabulary x hidden size, where the head is
        trained, and the gradient in the weight's dtype at the end. The paper's own rule (section 3.2: as many chunks as
        vocabulary / hidden size, so that a chunk of logits is as large as the hidden states) is a `loss_chunk_size` of
        tokens x hidden size / vocabulary.

        Args:
            hidden_bytes: of all hidden states.
            row_bytes: of one row of logits.
        """
        if self.config.loss_chunk_size != AUTO:
            return self.config.loss_chunk_size
        busy = max(self.hidden_size, _MIN_AUTO_LOSS_TOKENS)
        return max(1, min(max(hidden_bytes // 2 // row_bytes, busy), _MAX_AUTO_LOGIT_BYTES // row_bytes))
