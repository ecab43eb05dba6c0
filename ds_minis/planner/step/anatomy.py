"""The whole model without weights: in which order its layers repeat, and so how many of them have to be traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ds_minis.conversion.detect import find_candidates
from ds_minis.parallel.model.attach import sequence_parallel_fallback_reason


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        kinds: of each decoder layer; layers of one kind have the same modules and shapes of parameters.
        parameters: their number, in the whole model.
        positions: for how many positions it has a learned embedding each; 0: none is learned, so any length can be run.
        largest: the parameter with the most elements, and their number.
        undivided: the reason why ranks cannot share its sequences; empty if they can.
    """

    kinds: tuple[int, ...]
    parameters: int
    positions: int
    largest: tuple[str, int]
    undivided: str = ""


def anatomy_of(model: nn.Module, layers: Sequence[nn.Module]) -> Anatomy:
    numbers: dict[tuple, int] = {}
    kinds = tuple(numbers.setdefault(_kind(layer), len(numbers)) for layer in layers)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    largest = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    stack = [(c.fqn, c.module, c.reason) for c in find_candidates(model) if c.role == "layer" and not c.in_tower]
    undivided = sequence_parallel_fallback_reason(model, stack)
    return Anatomy(kinds, sum(sizes.values()), _learned_positions(model), largest, undivided)


def _kind(layer: nn.Module) -> tuple:
    modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _learned_positions(model: nn.Module) -> int:
    """A table has a few more rows than positions in some models (OPT: 2)."""
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or 0
    tokens = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return positions if any(0 <= rows - positions <= 8 for rows in tables) else 0


def depths_to_trace(kinds: Sequence[int]) -> tuple[int, int] | None:
    """Depths of two shorter models whose difference is what the whole model repeats; None if its layers do not repeat.

    Both begin with all layers that come once, such as the dense ones before those with experts, and end where a period does,
    as the whole model does; the shallower has two layers of what repeats.
    """
    number, found = len(kinds), []
    for period in range(1, max(number // 2, 1) + 1):
        before = 0
        while any(kinds[i] != kinds[i + period] for i in range(before, number - period)):
            before += 1
        if number - before < 2 * period and (before or period > 1):
            continue
        few = before + max(2, period)
        while (number - few) % period:
            few += 1
        if few + period <= number or (before == 0 and period == 1):
            found.append((few + period, few))
    return min(found)[::-1] if found else None
