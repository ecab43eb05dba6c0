"""Decides what a call of a layer keeps from forward to backward, from a budget of bytes and what earlier calls have kept.

The budget is given, or it is what a device has free (`learned_memory`). Nothing here waits for the device or another rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_values import AUTO
from ds_minis.tiling.core.replay import has_values
from ds_minis.tiling.core.warn import Warnings
from ds_minis.tiling.memory.accounts import Account, Reservation
from ds_minis.tiling.memory.device_memory import DeviceMemory, memory_of
from ds_minis.tiling.memory.learned_memory import LearnedMemory

HOST, INPUT, ATTENTION, ALL = "host", "input", "attention", "all"
_AFTER_TOO_LARGE = 1.25  # a graph that was given up would have grown at least this much further


@dataclass(frozen=True)
class Need:
    """Bytes that layers of one kind keep: per token, and per token and token of its sequence."""

    per_token: float
    per_pair: float = 0.0

    def of(self, batch: int, num_tokens: int) -> float:
        return batch * num_tokens * (self.per_token + num_tokens * self.per_pair)


def choose_level(
    budget: float, layers: int, num_tokens: int, width: int, all_bytes: float, attention_bytes: float
) -> str:
    """What the first of `layers` layers keeps.

    The last layers keep most, since their memory is needed for the shortest time. Seconds saved per byte: with H the hidden
    size and S tokens, a layer of a Llama in bfloat16 keeps about 60 H bytes per token to save 26 H^2 + 2 S H operations, and
    its attention's output 2 H bytes to save 2 S H. So attentions come first from S = H / 2 on.

    Args:
        budget: bytes left, also for computing with what is kept: as much again as one layer keeps.
        layers: this layer and those behind it.
        all_bytes, attention_bytes: what one such layer keeps of each kind.
    """
    room = budget - all_bytes
    if layers * all_bytes <= room:
        return ALL
    if 2 * num_tokens < width:
        wholes = max(0, int(room // all_bytes)) if all_bytes else 0
        budget -= (wholes + 1) * all_bytes if wholes else 0
        layers -= wholes
    return ATTENTION if (layers + 1) * attention_bytes <= budget else INPUT


class KeepBudget:
    """The decisions of one model. A copy starts with nothing learned.

    Attributes:
        last: level -> number of layers, of the last forward pass in training.
        memory_of: the memory of a device; None where it cannot be read.
    """

    memory_of: Callable[[torch.device], DeviceMemory | None] = staticmethod(memory_of)

    def __init__(self, config: MiniSequenceConfig, warnings: Warnings):
        self._config, self._warnings = config, warnings
        given = config.memory_budget
        self._given = None if given in (None, AUTO) else Account(given * 2**30)
        self._learns = AUTO in (given, config.offload)
        # Without a budget, where nothing that is set is in the way.
        self._learns_on_cuda = (config.keep, config.head_groups, config.sequence_parallel.size) == (AUTO, 1, 1)
        self._learned: dict[torch.device, Account | None] = {}
        self.last: dict[str, int] = {}
        self._pass = _Pass()
        self._told = False
        self._all: dict[Any, Need] = {}
        self._attention: dict[Any, Need] = {}
        self._order: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return KeepBudget, (self._config, self._warnings)

    @property
    def live_bytes(self) -> float:
        """What is kept now."""
        return sum(account.live_bytes for account in [self._given, *self._learned.values()] if account)

    def account(self, x: Tensor) -> Account | None:
        """Where is counted what a layer with this input keeps; None without a budget."""
        if self._given is not None:
            return self._given
        if not (self._learns or (self._learns_on_cuda and x.is_cuda)) or not has_values(x):
            return None
        if x.device not in self._learned:
            memory = self.memory_of(x.device)
            if memory is None and self._learns:
                self._warnings.once(
                    f'how much memory is free on "{x.device}" cannot be read, so a layer keeps its input alone: set '
                    '"memory_budget" to a number of GiB'
                )
            self._learned[x.device] = memory and Account(learned=LearnedMemory(memory))
        return self._learned[x.device]

    def may_keep_all(self, x: Tensor) -> bool:
        """Whether a layer with this input may keep everything."""
        return self._config.keep == ALL or (self._config.keep == AUTO and self.account(x) is not None)

    def level(self, layer: nn.Module, x: Tensor, num_layers: int) -> str:
        """What a call keeps.

        Args:
            x: the layer's input, `(B, S, H)`.
            num_layers: of the model, in one forward pass.
        """
        position = self._order.setdefault(layer, len(self._order))
        in_backward = torch._C._current_graph_task_id() != -1  # somebody's checkpointing runs the layer again
        if not in_backward and self._pass.is_over(position, x, num_layers):
            self._pass, self.last = _Pass(), {}
        level, account = self._config.keep, self.account(x)
        if account is not None and not (account.is_learned and (in_backward or _is_decided_outside(layer))):
            account.enter(self._pass, x)
            level = self._choice(account, layer, x, max(1, num_layers - position))
        elif self._config.offload == AUTO:
            level = HOST
        elif level == AUTO:
            level = INPUT
        if not in_backward:
            self._pass.note(position, x)
            self.last[level] = self.last.get(level, 0) + 1
        return level

    def _choice(self, account: Account, layer: nn.Module, x: Tensor, layers: int) -> str:
        batch, num_tokens, width = x.shape
        inputs = x.nbytes if self._config.offload == AUTO else 0
        account.later = 0.0
        left = account.left - layers * inputs
        if left < 0:
            return HOST if inputs else INPUT
        account.later = (layers - 1) * inputs
        if self._config.keep == INPUT:
            return INPUT
        kind = kind_of(layer, x)
        # Until a call has shown what a layer keeps, the limit alone decides.
        need, attention = self._all.get(kind), self._attention.get(kind, Need(4.0 * width * x.element_size()))
        all_bytes = 0.0 if need is None else max(0.0, need.of(batch, num_tokens) - inputs)
        level = choose_level(left, layers, num_tokens, width, all_bytes, attention.of(batch, num_tokens))
        return INPUT if level == ATTENTION and self._config.head_groups != 1 else level

    def limit(self, x: Tensor) -> float:
        """Bytes that a call may keep, of which as many again are needed to compute with."""
        account = self.account(x)
        return float("inf") if account is None else account.left / 2

    def reserve(self, x: Tensor, num_bytes: float) -> Reservation | None:
        """Counts what a call keeps until the result is dropped; None if it is too much."""
        account = self.account(x)
        return Reservation({}, num_bytes) if account is None else account.reserve(num_bytes)

    def reserve_attention(self, layer: nn.Module, x: Tensor, num_bytes: float) -> Reservation | None:
        """`reserve` for an attention's output; learns its size."""
        self.learn(ATTENTION, layer, x, num_bytes)
        reservation = self.reserve(x, num_bytes)
        if reservation is None:
            self.fell_back(ATTENTION)
        return reservation

    def learn(self, level: str, layer: nn.Module, x: Tensor, num_bytes: float, pair_bytes: float = 0.0) -> None:
        """Notes what a call keeps, of which `pair_bytes` grow with the square of the length."""
        batch, num_tokens, width = x.shape
        tokens = max(1, batch * num_tokens)
        if pair_bytes and (num_tokens == width or any(num_tokens in p.shape for p in layer.parameters())):
            pair_bytes = 0.0  # a width may look like as many tokens
        need = Need((num_bytes - pair_bytes) / tokens, pair_bytes / (tokens * max(1, num_tokens)))
        (self._all if level == ALL else self._attention)[kind_of(layer, x)] = need

    def too_large(self, layer: nn.Module, x: Tensor, num_bytes: float) -> None:
        """Notes that a call was given up when it had kept this much, and keeps its input alone."""
        self.learn(ALL, layer, x, _AFTER_TOO_LARGE * num_bytes)
        self.fell_back(ALL)

    def after_backward(self, x: Tensor) -> Callable[[], None] | None:
        """To be called after the backward of the layer that had this input; None if it is not the first to have one."""
        account = self.account(x)
        forward_pass = account and account.take_pass()
        return forward_pass and forward_pass.done

    def fell_back(self, level: str) -> None:
        """Counts a layer of the last forward pass that keeps its input alone, and not what was chosen."""
        self.last[level] = self.last.get(level, 1) - 1
        self.last[INPUT] = self.last.get(INPUT, 0) + 1

    def out_of_memory(self, x: Tensor) -> None:
        """Shrinks the budget, and says so once."""
        account = self.account(x)
        before, told, self._told = account.limit, self._told, True
        account.shrink()
        if told:
            return
        self._warnings.once(
            f"memory ran out while a layer kept what its backward reads, so it keeps its input alone, and the budget shrinks "
            f'from {before / 2**30:.2f} to {account.limit / 2**30:.2f} GiB: a smaller "memory_budget" avoids that'
        )

    def in_words(self) -> str:
        """What the last step kept, and what was not run again for that; empty where all layers kept their inputs alone."""
        if not any(self.last.get(level) for level in (ALL, ATTENTION, HOST)):
            return ""
        words = {
            ALL: "everything",
            ATTENTION: "the attention's output",
            INPUT: "the input alone",
            HOST: "the input in host memory",
        }
        parts = [f"{_count(self.last[level], 'layer')} kept {words[level]}" for level in words if self.last.get(level)]
        saved = {"layer": self.last.get(ALL, 0), "attention": self.last.get(ATTENTION, 0)}
        once = [_count(number, word) for word, number in saved.items() if number]
        return f"{', '.join(parts)}; run once, not twice: {' and '.join(once) or 'none'}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s'[: number != 1]}"


class _Pass:
    """A forward pass in progress, as far as its layers have been called."""

    def __init__(self):
        self._position, self._calls, self._shape = -1, 0, None

    def is_over(self, position: int, x: Tensor, num_layers: int) -> bool:
        """Whether a call of the layer at this position belongs to another one."""
        repeats = position <= self._position or self._calls >= num_layers
        return repeats or self._shape not in (None, x.shape)

    def note(self, position: int, x: Tensor) -> None:
        self._position, self._calls, self._shape = position, self._calls + 1, x.shape


def _is_decided_outside(layer: nn.Module) -> bool:
    """Whether something around the layer (checkpointing, offloading) decides what is kept, or it is a thread's replica."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or "_is_replica" in layer.__dict__


def kind_of(layer: nn.Module, x: Tensor) -> tuple:
    """Layers of one kind keep about the same."""
    return type(layer), x.dtype, x.shape[2], layer.training
