"""RoPE's base for a length, and the stages of an extension to a long context, as plain data.

RoPE turns pair i of a head's D dimensions by position * theta**(-2i/D), so pair i has a period of 2*pi*theta**(2i/D) tokens.
"Scaling Laws of RoPE-based Extrapolation" (Liu et al., arXiv 2310.05209) calls *critical* the dimension up to which the
periods fit into the length L0 of pre-training: d = D*ln(L0/2pi)/ln(theta0), there rounded up to a pair. With another base the
same dimension has a period of L tokens, 2*pi*theta**(d/D) = L, if

    theta(L) = theta0 ** (ln(L/2pi) / ln(L0/2pi))

What is fitted: nanotron's long-context experiment names four values and no formula. This one, with Llama-3's L0 of 8,192 and
theta0 of 500,000, gives them within 0.8%. That the authors used it is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of an extension.

    Attributes:
        sequence_length: tokens of a sample.
        rope_theta: RoPE's base.
        steps: optimizer steps of this stage alone.
        accumulation: samples for each replica and optimizer step are `accumulation * micro_batch_size`.
        micro_batch_size: samples of a forward pass.
    """

    sequence_length: int
    rope_theta: float
    steps: int = 10
    accumulation: int = 1
    micro_batch_size: int = 1


# nanotron's long-context experiment: Llama-3-8B from 8K to 1M tokens.
SEED_STAGES = (
    Stage(sequence_length=65_536, rope_theta=22.4e6, accumulation=32),
    Stage(sequence_length=131_072, rope_theta=80e6, accumulation=32),
    Stage(sequence_length=524_288, rope_theta=1e9, accumulation=16),
    Stage(sequence_length=1_048_576, rope_theta=3.6e9, accumulation=8),
)


def rope_theta_for(length: int, base_length: int, base_theta: float) -> float:
    """RoPE's base for sequences of `length` tokens; the formula and its source are at the top of this file.

    It composes: the base for 1M tokens is the same whether it is taken from 8K, or from 64K with 64K's base.

    Args:
        length: tokens of the sequences to come.
        base_length: tokens of the sequences that the model was trained with.
        base_theta: RoPE's base in that training.

    Raises:
        ValueError: `base_length` is shorter than the shortest period, `length` shorter than `base_length`, or `base_theta` no
            base.
    """
    if not base_length > 2 * math.pi:
        raise ValueError(f"base_length: more than 2*pi tokens are allowed (RoPE's shortest period), got {base_length}")
    if length < base_length:
        raise ValueError(
            f"length: {base_length} (base_length) or more is allowed, got {length}. A model reads what is shorter with the "
            "base that it has"
        )
    if not base_theta > 1:
        raise ValueError(f"base_theta: more than 1 is allowed, got {base_theta}")
    return base_theta ** (math.log(length / (2 * math.pi)) / math.log(base_length / (2 * math.pi)))


def stages_for(
    lengths: Sequence[int],
    *,
    base_length: int,
    base_theta: float,
    steps: int = 10,
    accumulation: int = 1,
    micro_batch_size: int = 1,
) -> tuple[Stage, ...]:
    """A stage for each length, with the base that the formula gives.

    Raises:
        ValueError: see `rope_theta_for`.
    """
    return tuple(
        Stage(
            sequence_length=length,
            rope_theta=rope_theta_for(length, base_length, base_theta),
            steps=steps,
            accumulation=accumulation,
            micro_batch_size=micro_batch_size,
        )
        for length in lengths
    )
