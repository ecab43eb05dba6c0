"""State of one converted model: settings, chunk sizes, caches. A row is one vector of the last dimension, usually a token."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_minis.config import AUTO, MiniSequenceConfig
from ds_minis.tiling.core.exclusive import trackers_aside
from ds_minis.tiling.core.out_of_memory import in_a_chunk, in_a_first_call
from ds_minis.tiling.core.participation import Memory
from ds_minis.tiling.core.warn import Warnings
from ds_minis.tiling.verify.signature import AnalysisCache

# With about this many rows, a feed-forward module's matmul is no longer bound by reading the weights. A larger chunk only
# costs memory.
_MIN_AUTO_TOKENS, _MAX_AUTO_TOKENS = 1024, 3072
# Each expert should get this many tokens of a chunk on average.
_AUTO_TOKENS_PER_EXPERT, _MAX_AUTO_EXPERT_TOKENS = 128, 16384
# Largest size of one chunk's logits, in bytes.
_MAX_AUTO_LOGIT_BYTES = 2**29
_MIN_AUTO_LOSS_TOKENS = 256
_lock = threading.Lock()


@dataclass
class Chunking:
    """The state of one converted model; all of its tiled modules share this object.

    Attributes:
        config: the user's settings.
        hidden_size: width of the model's hidden states, in elements; the width of one token for `chunk_size`.
        layer_inputs: stores the inputs of its tiled layers (`ds_minis.memory`); None leaves that to autograd.
        unkept: kind of call whose attention cannot be kept -> (class name of the layer, reason); see
            `ds_minis.layer.attention.kept_attention`.
        kept_plans: which tensors an attention saves are copies (`ds_minis.layer.attention.kept_attention`).
        heads: analyses of LM heads (`ds_minis.loss.heads.chunked_head`).
        bypassed: why the loss of the last forward pass in training could not be tiled; empty if it was.
        warnings: the warnings given about the model.
        memory: what earlier calls of its modules have shown.
        passes: for each forward pass in progress, what its end must undo (`ds_minis.loss.forward.forward_hooks`).
        parallel: what shares the model's sequences with other ranks (`ds_minis.parallel`); None without.
        readers: what read the logits of the last forward pass with gradients -> whether all logits were computed for it.
        last_calls: "layer" or "module" -> (tokens, tokens in a chunk, whether it ran untiled) of the last call in training.
    """

    config: MiniSequenceConfig
    hidden_size: int
    _suspensions: int = field(default=0, repr=False, compare=False)
    _thread: int | None = field(default=None, repr=False, compare=False)
    layer_inputs: Any = field(default=None, repr=False, compare=False)
    unkept: dict[tuple, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)
    kept_plans: dict[tuple, list] = field(default_factory=dict, repr=False, compare=False)
    heads: AnalysisCache = field(default_factory=AnalysisCache, repr=False, compare=False)
    bypassed: str = field(default="", repr=False, compare=False)
    warnings: Warnings = field(default_factory=Warnings, repr=False, compare=False)
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    passes: list[contextlib.ExitStack] = field(default_factory=list, repr=False, compare=False)
    parallel: Any = field(default=None, repr=False, compare=False)
    readers: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)
    last_calls: dict[str, tuple[int, int, bool]] = field(default_factory=dict, repr=False, compare=False)

    @contextlib.contextmanager
    def guarded(self, setting: str = "", chunk_rows: int = 0, num_rows: int = 0) -> Iterator[None]:
        """Context for the chunks of one operation, or with `chunk_rows` 0 for an analysis: cleans up after errors.

        An interrupt (Ctrl-C) ends the forward passes in progress, since torch calls no hooks for it. An out-of-memory error
        gets a note that names the place and the setting (`ds_minis.tiling.core.out_of_memory`).
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
        """Scope and chunk size, for `extra_repr`."""
        count = self.config.num_mini_sequences
        size = f"chunk_size={self.config.chunk_size}" if count is None else f"num_mini_sequences={count}"
        return f"scope={self.config.scope}, {size}"

    @contextlib.contextmanager
    def untiled(self) -> Iterator[None]:
        """Inside, tiled modules run untiled, since their input is a chunk already."""
        self.suspend(1)
        try:
            yield
        finally:
            self.suspend(-1)

    def note(self, role: str, num_tokens: int, chunk_tokens: int, *, as_it_is: bool = False) -> None:
        """Records a call with gradients for the report; not in a compiled graph."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.last_calls[role] = num_tokens, chunk_tokens, as_it_is

    def is_in_one_thread(self) -> bool:
        """Whether all calls of this have come from one thread."""
        here = threading.get_ident()
        self._thread = here if self._thread in (None, here) else -1
        return self._thread == here

    def note_reader(self, operation: str, in_full: bool) -> None:
        """Records for the report what read the logits."""
        self.readers[operation] = in_full

    def last_loss(self) -> str:
        """Describes what read the logits of the last forward pass with gradients; empty if nothing did."""
        in_full = [name for name, whole in self.readers.items() if whole]
        chunked = [name for name, whole in self.readers.items() if not whole]
        parts = [f"by chunks ({', '.join(chunked)})"] if chunked else []
        return " and ".join([*parts, f"from all logits ({', '.join(in_full)})"] if in_full else parts)

    def last_step(self) -> str:
        """Describes the chunks of the last forward pass in training: of its layers, or else of the modules in them."""
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
        """True while the model runs a chunk, or a forward pass that must equal the unconverted model's bit for bit."""
        return self._suspensions > 0

    def suspend(self, step: int) -> None:
        """Counts, because replicas of a model (`nn.DataParallel`) share this object across threads."""
        with _lock:
            self._suspensions += step

    def module_rows(self, num_rows: int, width: int, experts_per_choice: float = 1.0) -> int:
        """Rows per chunk for a module whose input has `num_rows` rows of `width` elements.

        A narrower row (a head in a query norm) counts as a fraction of a token.

        Args:
            experts_per_choice: number of experts, divided by the number of them that each token is routed to.
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

        "auto" uses fixed budgets, so that runs are reproducible and no rank depends on another's memory:

        - The logits of one chunk take at most 512 MiB, in the dtype in which the loss gets them. A plain head and loss hold
          nothing else of that size. A model that changes its logits before (a softcap) holds a few times as much.
        - Below that, they take half of the bytes of the hidden states. With the gradient of the hidden states, the loss takes
          1.5 times their bytes (3 x hidden size per token in bfloat16).
        - A chunk has at least as many rows as the hidden size, and at least 256. Every chunk reads and writes the weight
          gradient's sum; with fewer rows that takes longer than the matmul.

        The weight gradient does not depend on the chunk: if the head is trained, its sum takes 4 bytes x vocabulary x hidden
        size, and the gradient in the weight's dtype comes on top at the end. The paper's rule (section 3.2: vocabulary /
        hidden size chunks, so that a chunk of logits is as large as the hidden states) is a `loss_chunk_size` of tokens x
        hidden size / vocabulary.

        Args:
            hidden_bytes: bytes of all hidden states.
            row_bytes: bytes of one row of logits.
        """
        if self.config.loss_chunk_size != AUTO:
            return self.config.loss_chunk_size
        busy = max(self.hidden_size, _MIN_AUTO_LOSS_TOKENS)
        return max(1, min(max(hidden_bytes // 2 // row_bytes, busy), _MAX_AUTO_LOGIT_BYTES // row_bytes))


def experts_per_choice(parameters: Iterable[torch.Tensor], choices: int) -> float:
    """The number of experts, divided by the `choices` that a token is routed to; 1 without experts.

    Args:
        parameters: those of a module; the weights of all experts are one with three dimensions.
    """
    experts = max((p.shape[0] for p in parameters if p.dim() == 3), default=0)
    return max(1.0, experts / choices) if experts and choices else 1.0
