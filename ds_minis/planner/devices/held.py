"""What a device holds beside the traced activations: terms, each with its bytes and the reason for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ds_minis.planner.inputs.setup import OPTIMIZERS, Setup
from ds_minis.planner.step.adapters import BYTES_OF_4_BIT
from ds_minis.planner.step.profile import BytesAt


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
class Varying:
    """A part that grows or shrinks during a step: `term` with its bytes filled in at the peak."""

    term: Term
    bytes_at: BytesAt

    def at(self, where: str, sofar: float, since_layer: float) -> Term:
        nbytes = float(self.bytes_at(where, np.array([sofar]), np.array([since_layer]))[0])
        return Term(self.term.name, self.term.part, nbytes, self.term.measured, self.term.why, self.term.on_host)


@dataclass(frozen=True)
class Moment:
    """A moment at which no activation is alive, such as the optimizer's step: what is held then beside `Held.terms`."""

    where: str
    terms: list[Term]


@dataclass(frozen=True)
class Held:
    """What is held.

    Attributes:
        terms: at every moment, from the first step on.
        during: in forward and backward, as long as activations are alive.
        varying: the same, but more or less of it.
        moments: after backward.
    """

    terms: list[Term]
    during: list[Term] = field(default_factory=list)
    varying: list[Varying] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def varying_bytes(self, where: str, sofar: np.ndarray, since_layer: np.ndarray) -> np.ndarray:
        """Bytes on the device of all that varies."""
        parts = [v.bytes_at(where, sofar, since_layer) for v in self.varying if not v.term.on_host]
        return sum(parts, np.zeros_like(sofar))


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a model, see `trace.count_parameters`; and those of one decoder layer."""

    model: dict[str, float]
    layer: dict[str, float]
    hidden_size: int

    @property
    def num_layers(self) -> float:
        return self.model["num_layers"]

    @property
    def outside(self) -> float:
        """Parameters that are in no decoder layer."""
        return max(self.model["all"] - self.layer["all"] * self.num_layers, 0)

    @property
    def trained_outside(self) -> float:
        return max(self.model["trained"] - self.layer["trained"] * self.num_layers, 0)

    @property
    def trained_head(self) -> float:
        """Of an LM head of its own, whose gradient is the first; a tied one's is complete when backward ends."""
        return self.model["embeddings"] - self.model["largest_embedding"] if self.trained_outside else 0.0

    def layers_done(self, sofar: np.ndarray, itemsize: int) -> np.ndarray:
        """Decoder layers that have had their backward, by the bytes of gradients so far."""
        of_layer = max(self.layer["trained"], 1) * itemsize
        done = np.floor(np.maximum(sofar - self.trained_head * itemsize, 0) / of_layer + 1e-6)
        return np.minimum(done, self.num_layers)


def weights(setup: Setup, counts: Counts, trained_size: float, shards: int = 1) -> list[Term]:
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


def optimizer_states(setup: Setup, trained: float, size: float, *, on_host: bool = False) -> Term:
    states = OPTIMIZERS[setup.optimizer]
    each = 1 + 8 / 256 if "8bit" in setup.optimizer else size  # a float32 scale for each 256 in both states
    paged = setup.optimizer.startswith("paged")
    why = f"{states:g} states of {each:.3g} bytes for each of {trained:,.0f} trained parameters"
    return Term("optimizer states", "optimizer", states * each * trained, True, why, on_host or paged)


def gradients(why: str, bytes_at: BytesAt) -> Varying:
    return Varying(Term("gradients at the peak", "gradients", 0.0, True, why), bytes_at)
