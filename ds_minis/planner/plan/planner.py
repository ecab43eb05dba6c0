"""Memory of a training step on each device, part by part, at any length; and the longest sequence that fits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_minis.config import MiniSequenceConfig
from ds_minis.memory.host_memory import block_layout
from ds_minis.planner.devices import engines
from ds_minis.planner.devices.held import Counts, Held, Term
from ds_minis.planner.devices.sequence import terms_of_sequence_parallel
from ds_minis.planner.inputs.setup import GIB, Setup
from ds_minis.planner.step.anatomy import Anatomy, depths_to_trace
from ds_minis.planner.step.profile import Peak, Profile, cache_key, read_cached, write_cached
from ds_minis.planner.step.trace import CannotTrace, RunsTokenByToken, Way, examine, shortened, trace
from ds_minis.tiling.modules.state import Chunking

# What no tensor takes, on a card that a process has for itself.
CUDA_CONTEXT, NCCL, LIBRARIES = 0.5 * GIB, 0.5 * GIB, 0.1 * GIB
# Memory that the allocator holds and cannot use, as a part of what comes and goes in a step. With expandable segments.
ALLOCATOR_SLACK = 0.05
# Of a card's nominal memory, what a process may have (an "80 GB" H100: 79.1 GiB of 80).
USABLE = 0.985
FITS, UNCERTAIN, TOO_LARGE = "fits", "uncertain", "does not fit"
_IN_TRACE = "head_groups", "keep", "scope", "loss", "include", "exclude"


@dataclass(frozen=True)
class Estimate:
    """Memory of one step.

    Attributes:
        tokens: of a sequence.
        terms: all parts, on the device and on the host.
        slack: terms that may be needed or not: the difference between what fits and what is uncertain.
        where: "forward", "loss", "backward", or the name of a `Moment`: where in the step the peak is.
    """

    setup: Setup
    tokens: int
    terms: list[Term]
    slack: list[Term]
    where: str

    @property
    def device(self) -> float:
        return sum(term.nbytes for term in self.terms if not term.on_host)

    @property
    def allocated(self) -> float:
        """Bytes of tensors alone, as `torch.cuda.max_memory_allocated` counts them."""
        return sum(term.nbytes for term in self.terms if not term.on_host and term.part != "fixed")

    @property
    def host(self) -> float:
        return sum(term.nbytes for term in self.terms if term.on_host)

    def verdict(self, capacity: float, host_capacity: float = math.inf) -> str:
        if self.device > capacity or self.host > host_capacity:
            return TOO_LARGE
        return FITS if self.device + sum(term.nbytes for term in self.slack) <= capacity else UNCERTAIN

    def parts(self) -> dict[str, float]:
        """Bytes on the device by part."""
        found: dict[str, float] = {}
        for term in self.terms:
            if not term.on_host:
                found[term.part] = found.get(term.part, 0) + term.nbytes
        return found


class Planner:
    """Estimates for one configuration; traces are made when they are first needed.

    Args:
        config: a transformers configuration with `num_hidden_layers`.
        cache: a folder for traces, kept between runs; None for none.
    """

    def __init__(self, config: Any, *, cache: Path | None = None):
        self.config, self._cache = config, cache
        self.text = config.get_text_config(decoder=True)
        self.profiles: dict[str, Profile] = {}
        self._token_by_token: RunsTokenByToken | None = None

    def profile(self, way: Way) -> Profile:
        """The step of the whole model, run in this way.

        Raises:
            CannotTrace: see `trace`.
        """
        import transformers

        import ds_minis

        versions = [ds_minis.__version__, _torch_version(), transformers.__version__]
        key = cache_key(self.config.to_dict(), way.key, versions)
        if self._token_by_token is not None:
            raise self._token_by_token
        if key not in self.profiles:
            profile = read_cached(self._cache, key)
            if profile is None:
                profile = self._traced(way)
                write_cached(self._cache, key, profile)
            self.profiles[key] = profile
        return self.profiles[key]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        return examine(self.config)

    def _traced(self, way: Way) -> Profile:
        depths = depths_to_trace(self.anatomy.kinds)
        if depths is None:
            raise CannotTrace(
                f"the {len(self.anatomy.kinds)} layers of {type(self.config).__name__} do not repeat in any period, so a few "
                "of them do not tell what all take"
            )
        try:
            few, more = (trace(shortened(self.config, depth), way) for depth in depths)
        except RunsTokenByToken as error:
            self._token_by_token = error  # in any way, and it takes seconds to find out
            raise
        profile = Profile(few, more, (*depths, self.text.num_hidden_layers))
        for name in ("positions", "largest", "undivided"):
            setattr(profile, name, getattr(self.anatomy, name))
        counted = profile.parameters["all"] - (profile.parameters["trained"] if way.lora_rank else 0)
        if abs(counted - self.anatomy.parameters) > 1e-3 * self.anatomy.parameters:
            raise CannotTrace(
                f"{depths[0]} and {depths[1]} layers of {type(self.config).__name__} tell of {counted:,.0f} parameters, the "
                f"whole model has {self.anatomy.parameters:,}: its layers are not all that num_hidden_layers changes"
            )
        return profile

    def way(self, setup: Setup) -> Way:
        settings = setup.settings
        if settings is not None:
            settings = {name: settings[name] for name in _IN_TRACE if name in settings}
            patterns = [p for name in ("include", "exclude") for p in settings.get(name, ())]
            if any(character.isdigit() for pattern in patterns for character in pattern):
                raise CannotTrace(
                    f"include and exclude name single layers ({patterns}): layers must be alike to be planned"
                )
        lora = setup.train != "full"
        return Way(
            settings,
            setup.checkpointing or settings is not None,
            setup.lora_rank if lora else 0,
            setup.lora_dropout if lora else 0.0,
            setup.dtype,
            setup.train == "qlora",
        )

    def counts(self, profile: Profile) -> Counts:
        return Counts(profile.parameters, profile.of_layer, self.text.hidden_size)

    def lengths(self, setup: Setup, tokens: int, profile: Profile) -> list[float]:
        """The lengths of a step on one device, in the order of `lengths.SYMBOLS`."""
        rows = max(1, math.ceil(setup.batch * tokens / setup.sequence_parallel))
        exchanged = sum(term.nbytes for term in terms_of_sequence_parallel(setup, self.text, rows))
        if setup.settings is None:
            return [1, rows, rows, 0, rows, 0, rows * rows / setup.batch, exchanged]
        settings = {k: v for k, v in setup.settings.items() if k != "sequence_parallel"}
        config = MiniSequenceConfig.from_value(settings, source="plan")
        chunking = Chunking(config, self.text.hidden_size)
        chunk = chunking.module_rows(rows, self.text.hidden_size, profile.parameters["experts_per_choice"])
        loss = chunking.loss_rows(rows * self.text.hidden_size * setup.itemsize, self.text.vocab_size * setup.itemsize)
        chunk, loss = min(chunk, rows), min(loss, rows)
        rests = [rows - (math.ceil(rows / size) - 1) * size for size in (chunk, loss)]
        return [1, rows, chunk, rests[0], loss, rests[1], rows * rows / setup.batch, exchanged]

    def estimate(self, setup: Setup, tokens: int) -> Estimate:
        """Memory of a step with sequences of so many tokens.

        Raises:
            CannotTrace: see `trace`; or the model's sequences cannot be shared by ranks, as the setup has it.
        """
        profile = self.profile(self.way(setup))
        if setup.sequence_parallel > 1 and profile.undivided:
            raise CannotTrace(f"sequence_parallel: ranks cannot share its sequences: {profile.undivided}")
        held = engines.held_by(setup, self.counts(profile))
        lengths = self.lengths(setup, tokens, profile)
        peak = profile.peak(lengths, held.varying_bytes, offloaded=bool((setup.settings or {}).get("offload")))
        moving, where = self._terms_at(setup, held, peak, lengths), peak.where
        for moment in held.moments:
            if _on_device(moment.terms) > _on_device(moving):
                moving, where = moment.terms, moment.where
        terms = [*held.terms, *moving, *self._host_terms(setup, lengths)]
        fixed = [("CUDA context", CUDA_CONTEXT), ("libraries' workspaces", LIBRARIES)]
        fixed += [("NCCL buffers", NCCL)] if setup.gpus > 1 else []
        terms += [Term(name, "fixed", nbytes, False, "a constant") for name, nbytes in fixed]
        slack = [
            Term(
                "allocator",
                "slack",
                ALLOCATOR_SLACK * _on_device(moving),
                False,
                f"{ALLOCATOR_SLACK:.0%} of what comes and goes in a step, with expandable segments",
            )
        ]
        return Estimate(setup, tokens, terms, slack, where)

    def _terms_at(self, setup: Setup, held: Held, peak: Peak, lengths: list[float]) -> list[Term]:
        """What is alive at the peak of the activations, beside what is always held."""
        parallel = terms_of_sequence_parallel(setup, self.text, lengths[1]) if peak.in_attention else []
        exchanged = sum(term.nbytes for term in parallel)
        transient = peak.activations - peak.layer_inputs - exchanged
        name = "loss stage" if peak.where == "loss" else "transient working set"
        what = "what a layer leaves for backward, times the layers"
        terms = [Term("layer inputs", "layer inputs", peak.layer_inputs, True, what)]
        what = f"all else that is alive at the peak, in the {peak.where}"
        terms.append(Term(name, "transient", transient, True, what))
        varying = [part.at(peak.where, peak.gradients, peak.since_layer) for part in held.varying]
        return [*terms, *parallel, *held.during, *(term for term in varying if term.nbytes)]

    def _host_terms(self, setup: Setup, lengths: list[float]) -> list[Term]:
        if not (setup.settings or {}).get("offload"):
            return []
        text, rows = self.text, lengths[1]
        sizes = [rows * text.hidden_size * setup.itemsize]
        if setup.settings.get("keep") == "attention":
            heads = text.num_attention_heads
            width = getattr(text, "head_dim", None) or text.hidden_size // heads
            sizes += [rows * heads * width * setup.itemsize, rows * heads * 4]
        nbytes = text.num_hidden_layers * sum(math.prod(block_layout(int(size))) for size in sizes)
        return [Term("layer inputs on the host", "host", nbytes, True, "in whole pinned blocks of 16 MiB", True)]

    def longest(
        self, setup: Setup, capacity: float, *, host_capacity: float = math.inf, unit: int = 1024, most: int = 2**24
    ) -> int:
        """The longest sequence that fits, a multiple of the unit; 0 if none does.

        Args:
            capacity: bytes of the device that a process may have.
            host_capacity: bytes of the host that it may have.
        """
        most = min(most, self.profile(self.way(setup)).positions or most)
        unit = min(max(unit, setup.sequence_parallel), most)

        def fits(units: int) -> bool:
            return self.estimate(setup, units * unit).verdict(capacity, host_capacity) == FITS

        low, high = 0, 1
        while high * unit <= most and fits(high):
            low, high = high, 2 * high
        high = min(high, most // unit + 1)
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * unit


def _on_device(terms: list[Term]) -> float:
    return sum(term.nbytes for term in terms if not term.on_host)


def _torch_version() -> str:
    import torch

    return torch.__version__
