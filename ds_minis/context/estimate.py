"""What a stage needs in memory, by arithmetic: an estimate to refuse what cannot fit, before a cluster is asked for.

W, the transient bytes of a token beyond weights and layer inputs, is 10.6 bytes for each element of the hidden size and 4 for
each of its keys and values: fitted to what benchmarks/ has for five models of 7 to 9 billion parameters, within 9%.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

GIB = 2**30
RESERVE = 4 * GIB  # the driver's and NCCL's buffers, fragments
_W_HIDDEN, _W_KEYS_VALUES, _RING = 10.6, 4.0, 12.0  # bytes of a token for each element

# Bytes of a parameter held by each GPU, shared by all GPUs, and shared by all hosts: bfloat16 weights and gradients, float32
# weights and Adam's two moments (FSDP and DDP: float32 alone). `gathers`: whether weights come together a layer at a time.
_ENGINES: dict[str, tuple[float, float, float, bool]] = {
    "ddp": (16, 0, 0, False),
    "fsdp": (0, 16, 0, True),
    "zero1": (4, 12, 0, False),
    "zero2": (2, 14, 0, False),
    "zero2_offload": (2, 2, 12, False),
    "zero3": (0, 16, 0, True),
    "zero3_offload": (0, 0, 16, True),
}
ENGINES = tuple(_ENGINES)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder, by the names of config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Of a configuration's fields.

        Raises:
            ValueError: one is missing.
        """
        config = config.get("text_config", config)
        known = {name: config[name] for name in (field.name for field in fields(cls)) if config.get(name) is not None}
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in known]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        return cls(**known)

    @property
    def keys_values(self) -> int:
        """Elements of a token's keys and values in a layer."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        return 2 * head * (self.num_key_value_heads or self.num_attention_heads)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        queries = head * self.num_attention_heads
        return self.hidden_size * (2 * queries + self.keys_values + 3 * self.intermediate_size + 2)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; the LM head has as many, if it is not the same."""
        return self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * self.layer + heads * self.embedding


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of a stage on one GPU, and on one host."""

    weights: float
    layer_inputs: float
    transient: float
    host: float

    @property
    def device(self) -> float:
        """All that one GPU holds."""
        return self.weights + self.layer_inputs + self.transient + RESERVE

    def __str__(self) -> str:
        return (
            f"{self.device / GIB:.1f} GiB on each GPU (weights and optimizer {self.weights / GIB:.1f}, layer inputs "
            f"{self.layer_inputs / GIB:.1f}, transient {self.transient / GIB:.1f}, reserve {RESERVE / GIB:.0f}), "
            f"{self.host / GIB:.1f} GiB on each host"
        )


def need_of(shape: Shape, engine: str, *, tokens: float, nodes: int, gpus_per_node: int, offload: bool) -> Need:
    """What a stage needs, estimated.

    Args:
        shape: the model's.
        engine: one of `ENGINES`.
        tokens: of one forward pass on one rank, after sequence parallelism has divided the sequence.
        nodes: machines, of `gpus_per_node` ranks each.
        offload: whether layer inputs are kept in host memory (`mini_sequence: {offload: cpu}`).
    """
    each, shared, hosts, gathers = _ENGINES[engine]
    weights = shape.parameters * (each + shared / (nodes * gpus_per_node))
    weights += 2 * 2 * max(shape.layer, shape.embedding) if gathers else 0
    inputs = tokens * shape.hidden_size * 2
    all_inputs = inputs * shape.num_hidden_layers
    # Offloaded inputs are on the device two layers at a time.
    return Need(
        weights=weights,
        layer_inputs=2 * inputs if offload else all_inputs,
        transient=tokens * (_W_HIDDEN * shape.hidden_size + (_W_KEYS_VALUES + _RING) * shape.keys_values),
        host=shape.parameters * hosts / nodes + (gpus_per_node * all_inputs if offload else 0),
    )


def bytes_of(text: Any) -> float:
    """Bytes of a size such as "80GB", "80 GiB" or "1.5TB".

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])(i?)B\s*", str(text), re.IGNORECASE)
    if not found:
        raise ValueError(f"a size such as 80GB or 80GiB is allowed, got {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
