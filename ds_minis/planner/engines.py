"""What an engine and an optimizer hold on each device beside the traced step, term by term.

Sources: the engines' own code (DeepSpeed 0.19 `runtime/zero`, `runtime/bf16_optimizer.py`; torch 2.13
`torch/distributed/fsdp/_fully_shard`, `nn/parallel/distributed.py`; accelerate 1.15 `utils/fsdp_utils.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ds_minis.planner.adapters import BYTES_OF_4_BIT
from ds_minis.planner.setup import OPTIMIZERS, Setup

ZERO = "zero0", "zero1", "zero2", "zero3"
# Under the HF Trainer "auto" sizes of ZeRO are functions of the hidden size; a configuration of one's own may say 5e8.
_PREFETCH_OF_HIDDEN = 0.9


@dataclass(frozen=True)
class Term:
    """One part of the memory of a device, or of one process on the host.

    Attributes:
        measured: counted on the model's own tensors; else modelled, by the formula in `why`.
    """

    name: str
    part: str
    nbytes: float
    measured: bool
    why: str
    on_host: bool = False


@dataclass(frozen=True)
class Held:
    """What is held at every moment, and what is held for gradients at one.

    Attributes:
        terms: held from the first step on.
        gradients: bytes for the gradients, of bytes so far and of bytes since the last layer (arrays of events).
        at_step: bytes more, while the optimizer steps and no activation is alive.
        why_gradients, why_step: in words.
    """

    terms: list[Term]
    gradients: Callable[[np.ndarray, np.ndarray], np.ndarray]
    at_step: float
    why_gradients: str
    why_step: str


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a model, see `trace.count_parameters`; and those of one decoder layer."""

    model: dict[str, float]
    layer: dict[str, float]
    hidden_size: int


def held_by(setup: Setup, counts: Counts) -> Held:
    """All that the engine and the optimizer hold."""
    if setup.engine in ("single", "ddp"):
        return _replicated(setup, counts)
    if setup.engine == "fsdp2":
        return _fsdp2(setup, counts)
    return _zero(setup, counts)


def _weights(setup: Setup, counts: Counts, trained_size: float, shards: int = 1) -> list[Term]:
    """Weights, in shards, or whole."""
    model, of = counts.model, f" / {shards}" if shards > 1 else ""
    frozen, four_bit = model["all"] - model["trained"], 0.0
    host = setup.offload_param and setup.engine in ("zero3", "fsdp2")
    terms = []
    if setup.train == "qlora":
        four_bit, frozen = model["linear"], frozen - model["linear"]
        why = f"{four_bit:,.0f} weights in NF4 with nested quantization, {BYTES_OF_4_BIT:.4f} bytes each{of}"
        terms.append(Term("4-bit weights", "parameters", four_bit * BYTES_OF_4_BIT / shards, False, why, host))
        largest = model["largest_linear"] * setup.itemsize
        terms.append(
            Term("a weight in 16 bits", "transient", largest, False, "the largest linear layer, while it is multiplied")
        )
    nbytes = (model["trained"] * trained_size + frozen * setup.itemsize) / shards
    why = f"{model['trained']:,.0f} trained x {trained_size:g} bytes + {frozen:,.0f} frozen x {setup.itemsize}{of}"
    return [Term("weights", "parameters", nbytes, True, why, host), *terms]


def _optimizer(setup: Setup, trained: float, size: float, *, on_host: bool = False) -> Term:
    states = OPTIMIZERS[setup.optimizer]
    each = 1 + 8 / 256 if "8bit" in setup.optimizer else size  # a float32 scale for each 256 in both states
    paged = setup.optimizer.startswith("paged")
    why = f"{states:g} states of {each:.3g} bytes for each of {trained:,.0f} trained parameters"
    return Term("optimizer states", "optimizer", states * each * trained, True, why, on_host or paged)


def _replicated(setup: Setup, counts: Counts) -> Held:
    trained = counts.model["trained"]
    size = 4 if setup.master_weights else setup.itemsize
    terms = [*_weights(setup, counts, size), _optimizer(setup, trained, size)]
    scale = size / setup.itemsize  # gradients have the weights' dtype; the trace has the computation's
    if setup.engine == "ddp":
        why = "DDP copies gradients into buckets and back (gradient_as_bucket_view is off by default)"
        terms.append(Term("gradient buckets", "engine", trained * size, False, why))
    if setup.master_weights:
        why = "autocast keeps a copy of each weight in the computation's dtype until the forward's end"
        terms.append(Term("weights cast by autocast", "engine", trained * setup.itemsize, False, why))
    step = 0.0
    if setup.optimizer_in_backward:
        return Held(terms, lambda sofar, layer: np.zeros_like(sofar), step, "freed one by one, in backward", "")
    if setup.accumulation > 1:
        why = "those of earlier steps of the accumulation exist from the start"
        return Held(terms, lambda sofar, layer: np.full_like(sofar, trained * size), step, why, "")
    return Held(terms, lambda sofar, layer: sofar * scale, step, "grow during backward", "")


def _layer_gradients(counts: Counts, size: float) -> float:
    return max(counts.layer["trained"], counts.model["largest_trained"]) * size


def _fsdp2(setup: Setup, counts: Counts) -> Held:
    n, model, layer = setup.gpus, counts.model, counts.layer
    trained, item = model["trained"], setup.itemsize
    root = model["all"] - layer["all"] * _num_layers(counts)
    root_trained = model["trained"] - layer["trained"] * _num_layers(counts)
    terms = _weights(setup, counts, 4.0, n)
    terms.append(_optimizer(setup, trained / n, 4.0, on_host=setup.offload_param))
    gathered = 2 * layer["all"] * item * (BYTES_OF_4_BIT / item if setup.train == "qlora" else 1)
    terms.append(Term("gathered layers", "engine", gathered, False, "two decoder layers: the running and the next one"))
    why = "embeddings, norm and LM head are one unit, gathered from the forward's start to the backward's end"
    terms.append(Term("gathered root unit", "engine", max(root, 0) * item, False, why))
    terms.append(
        Term(
            "gradient shards",
            "gradients",
            trained * 4 / n,
            False,
            f"float32, {trained:,.0f} / {n}",
            setup.offload_param,
        )
    )
    why = "the input of the reduction of one layer's gradients, and of the root's"
    terms.append(Term("reduced gradients", "engine", layer["trained"] * item, False, why))

    def gradients(sofar, since_layer):
        return np.minimum(since_layer, layer["trained"] * item) + np.minimum(sofar, max(root_trained, 0) * item)

    return Held(terms, gradients, 0.0, "one layer's, and the root unit's until backward ends", "")


def _zero(setup: Setup, counts: Counts) -> Held:
    n, model, layer, item = setup.gpus, counts.model, counts.layer, setup.itemsize
    trained, stage = model["trained"], int(setup.engine[-1])
    host = setup.offload_optimizer and stage > 0
    sixteen = setup.dtype != "float32"
    terms = _weights(setup, counts, item, n if stage == 3 else 1)
    if sixteen:
        why = f"float32 copies of {trained:,.0f} trained parameters / {n}"
        terms.append(Term("master weights", "optimizer", 4 * trained / n, False, why, host))
    terms.append(_optimizer(setup, trained / n, 4.0, on_host=host))
    bucket = setup.bucket or counts.hidden_size**2  # "auto"
    bucket_bytes = min(bucket, trained) * item * 2
    why = f"two buckets of {min(bucket, trained):,.0f} elements: one fills while the other is reduced"
    terms.append(Term("gradient buckets", "engine", bucket_bytes, False, why))
    if stage == 3:
        largest = max(layer["all"], model["largest_embedding"])
        scale = BYTES_OF_4_BIT / item if setup.train == "qlora" else 1
        prefetch = min(_PREFETCH_OF_HIDDEN * counts.hidden_size**2, layer["all"])
        why = "the running decoder layer (or embedding, or LM head), and the parameters fetched ahead"
        terms.append(Term("gathered layers", "engine", (largest * scale + prefetch) * item, False, why))
    step, why_step = 0.0, ""
    if sixteen and not host:
        step = 4 * (min(trained / n, 1e9) if stage == 3 else trained / n)
        why_step = "the gradients of the shard in float32"
    if stage == 0:
        terms.append(Term("gradients in float32", "gradients", 4 * trained, False, "of all parameters, on each device"))
        return Held(terms, lambda sofar, layer: layer, step, "one layer's in 16 bits", why_step)
    if stage == 1:
        why = "of all parameters, until they are reduced at the step"
        return Held(terms, lambda sofar, layer: np.full_like(sofar, trained * item), step, why, why_step)
    why = f"{trained:,.0f} / {n}, in the computation's dtype"
    terms.append(Term("gradient shards", "gradients", trained * item / n, False, why, host))
    most = layer["trained"] * item + 2 * model["largest_trained"] * item
    return Held(terms, lambda sofar, layer: np.minimum(layer, most), step, "one layer's, until reduced", why_step)


def _num_layers(counts: Counts) -> float:
    return counts.model["num_layers"]
