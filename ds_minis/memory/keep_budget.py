"""Decides what a call of a layer keeps from forward to backward, from a budget of bytes and what earlier calls have kept.

The budget is given, or it is what a device has free (`learned_memory`). Nothing here waits for the device or another rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_minis.config import MiniSequenceConfig
from ds_minis.config_values import AUTO
from ds_minis.memory.accounts import Account, Reservation
from ds_minis.memory.device_memory import DeviceMemory, memory_of
from ds_minis.memory.learned_memory import LearnedMemory
from ds_minis.tiling.core.replay import has_values
from ds_minis.tiling.core.warn import Warnings

HOST, INPUT, ATTENTION, MATMULS, ALL = "host", "input", "attention", "matmuls", "all"
AFTER_TOO_LARGE = 1.25  # times the size at which a call was given up: what it would have kept at least


@dataclass(frozen=True)
class Need:
    """Bytes that layers of one kind keep: per token, and per token and token of its sequence."""

    per_token: float
    per_pair: float = 0.0

    def of(self, batch: int, num_tokens: int) -> float:
        return batch * num_tokens * (self.per_token + num_tokens * self.per_pair)


_UNKNOWN = Need(0.0)  # the limit alone decides until a call has shown it


def choose_level(budget: float, layers: int, num_tokens: int, width: int, needs: Mapping[str, float]) -> str:
    """What the first of `layers` layers keeps.

    The last layers keep most, since their memory is needed for the shortest time. Operations saved per byte in bfloat16, with
    H the hidden size and S tokens: a causal attention's output takes 2 H bytes per token and saves 2 S H; a product's result
    takes 2 bytes for each value and saves 2 H. So attentions come first from S = H on. All else that backward reads takes
    about as much memory again and saves no product, so it comes last.

    Args:
        budget: bytes left, also for computing with what is kept: where everything is, as much again as one layer keeps.
        layers: this layer and those behind it.
        needs: level -> what one such layer keeps.
    """
    if (layers + 1) * needs[ALL] <= budget:
        return ALL
    attention, matmuls = needs[ATTENTION], needs[MATMULS]
    if layers * matmuls + attention <= budget:
        return MATMULS
    if num_tokens < width and matmuls:
        before = min(layers, max(0, int((budget - attention) // matmuls)))
        budget, layers = budget - before * matmuls, layers - before
    return ATTENTION if (layers + 1) * attention <= budget else INPUT


class KeepBudget:
    """The decisions of one model. A copy starts with nothing learned.

    Attributes:
        last: level -> number of layers, of the last forward pass in training.
        needs: (level, kind of layer) -> what a call keeps.
        memory_of: the memory of a device; None where it cannot be read.
    """

    memory_of: Callable[[torch.device], DeviceMemory | None] = staticmethod(memory_of)

    def __init__(self, config: MiniSequenceConfig, warnings: Warnings):
        self._config, self._warnings = config, warnings
        given = config.memory_budget
        self._given = None if given in (None, AUTO) else Account(given * 2**30)
        self._learns = AUTO in (given, config.offload)
        # No budget was set: one is learned, unless another setting excludes it.
        self._learns_on_cuda = (config.keep, config.head_groups, config.sequence_parallel.size) == (AUTO, 1, 1)
        self._learned: dict[torch.device, Account | None] = {}
        self.last: dict[str, int] = {}
        self._pass = _Pass()
        self._told = False
        self.needs: dict[tuple, Need] = {}
        self._order: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return KeepBudget, (self._config, self._warnings)

    @property
    def live_bytes(self) -> float:
        """What is kept now."""
        return sum(account.live_bytes for account in [self._given, *self._learned.values()] if account)

    def account(self, x: Tensor) -> Account | None:
        """The account of what layers keep on this input's device; None without a budget."""
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

    def may_repeat_nothing(self, x: Tensor) -> bool:
        """Whether a layer with this input may keep so much that no product is repeated."""
        return self._config.keep in (MATMULS, ALL) or (self._config.keep == AUTO and self.account(x) is not None)

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
        if account is not None and not self._is_decided_outside(account, layer, in_backward):
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

    def _is_decided_outside(self, account: Account, layer: nn.Module, in_backward: bool) -> bool:
        """Whether something around the layer (checkpointing, offloading) decides what is kept, also when it runs it again.

        Memory that is free is not divided either in a backward, or among the replicas of threads.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return True
        return account.is_learned and (in_backward or "_is_replica" in layer.__dict__)

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
        unknown = {ATTENTION: Need(4.0 * width * x.element_size())}
        needs = {
            level: self.needs.get((level, kind), unknown.get(level, _UNKNOWN)).of(batch, num_tokens)
            for level in (ATTENTION, MATMULS, ALL)
        }
        needs[ALL] = max(0.0, needs[ALL] - inputs)
        level = choose_level(left, layers, num_tokens, width, needs)
        return INPUT if level in (ATTENTION, MATMULS) and self._config.head_groups != 1 else level

    def limit(self, x: Tensor) -> float:
        """Bytes that a call may keep, of which as many again are needed to compute with."""
        account = self.account(x)
        return float("inf") if account is None else account.left / 2

    def reserve(self, x: Tensor, num_bytes: float) -> Reservation | None:
        """Counts what a call keeps until the result is dropped; None if it is too much."""
        account = self.account(x)
        return Reservation({}, num_bytes) if account is None else account.reserve(num_bytes)

    def learn_all(self, layer: nn.Module, x: Tensor, num_bytes: float, pair_bytes: float = 0.0) -> None:
        """Notes what a call that keeps everything takes, of which `pair_bytes` grow with the square of the length."""
        _, num_tokens, width = x.shape
        if pair_bytes and (num_tokens == width or any(num_tokens in p.shape for p in layer.parameters())):
            pair_bytes = 0.0  # a width may look like as many tokens
        self.learn(ALL, kind_of(layer, x), x.shape, num_bytes, pair_bytes)

    def learn(self, level: str, kind: tuple, shape: torch.Size, num_bytes: float, pair_bytes: float = 0.0) -> None:
        """Notes what a call of a kind (`kind_of`) with an input of this shape keeps."""
        tokens, num_tokens = max(1, shape[:2].numel()), max(1, shape[1])
        self.needs[level, kind] = Need((num_bytes - pair_bytes) / tokens, pair_bytes / (tokens * num_tokens))

    def too_large(self, layer: nn.Module, x: Tensor, num_bytes: float) -> None:
        """Notes that a call was given up when it had kept this much, and keeps its input alone."""
        self.learn_all(layer, x, AFTER_TOO_LARGE * num_bytes)
        self.fell_back(ALL)

    def after_backward(self, x: Tensor) -> Callable[[], None] | None:
        """What to call after the backward of the pass's first layer that has one; None for every other layer."""
        account = self.account(x)
        forward_pass = account and account.take_pass()
        return forward_pass and forward_pass.done

    def fell_back(self, level: str, to: str = INPUT) -> None:
        """Counts a layer of the last forward pass that keeps less than what was chosen."""
        self.last[level] = self.last.get(level, 1) - 1
        self.last[to] = self.last.get(to, 0) + 1

    def out_of_memory(self, account: Account) -> None:
        """Shrinks a budget, and says so once."""
        before, told, self._told = account.limit, self._told, True
        account.shrink()
        if told:
            return
        self._warnings.once(
            f"memory ran out while a layer kept what its backward reads, so it keeps less, and the budget shrinks "
            f'from {before / 2**30:.2f} to {account.limit / 2**30:.2f} GiB: a smaller "memory_budget" avoids that'
        )

    def in_words(self) -> str:
        """What the last step kept, and what that saved from running twice; empty where all layers kept their inputs alone."""
        if not any(self.last.get(level) for level in (ALL, MATMULS, ATTENTION, HOST)):
            return ""
        words = {
            ALL: "everything",
            MATMULS: "the results of their matrix products",
            ATTENTION: "the attention's output",
            INPUT: "the input alone",
            HOST: "the input in host memory",
        }
        parts = [f"{_count(self.last[level], 'layer')} kept {words[level]}" for level in words if self.last.get(level)]
        saved = {ALL: ("", "layer"), MATMULS: ("the products of ", "layer"), ATTENTION: ("", "attention")}
        once = [what + _count(self.last[level], word) for level, (what, word) in saved.items() if self.last.get(level)]
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


def kind_of(layer: nn.Module, x: Tensor) -> tuple:
    """Layers of one kind keep about the same."""
    return type(layer), x.dtype, x.shape[2], layer.training
