"""The one configuration of ds_minis. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_minis.config_values import AUTO, RULES, SequenceParallel, nearest, nearest_value

# Settings that are no more -> what to set instead.
REMOVED = {
    "checkpoint_every": (
        "it was removed in November 2026, before 0.1.0, as FSDP and ZeRO-3 could not have it; set "
        '"offload": "cpu" to keep the inputs of layers off the device'
    ),
    "keep_attention": (
        'it became a value of "keep" in November 2026, before 0.1.0; set "keep": "attention" in the place of true, and '
        '"keep": "input" in the place of false'
    ),
}

_ALONE = SequenceParallel(1)


def _setting(default: Any, kind: str, doc: str):
    """A dataclass field with its value rule (`kind`, see `RULES`) and its documentation for users."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class MiniSequenceConfig:
    """What is run over mini-sequences (chunks of tokens), and how large a chunk is.

    The same mapping is accepted as keyword arguments here, as `"mini_sequence"` in a DeepSpeed JSON and as the `config`
    argument of `convert_to_mini_sequence`; `True` stands for all defaults. Names follow the MST paper (arXiv
    2407.15892).

    Raises:
        ValueError: wrong type or value out of range. The message names the key, the value and what is allowed. (Every
            source that takes a mapping also names unknown keys and the nearest valid one, see `from_value`.)
    """

    enabled: bool = _setting(True, "bool", "False leaves the model exactly as it is.")
    scope: str = _setting(
        "layer",
        "scope",
        '"mlp": the feed-forward modules, as in the paper. "tokens": every token-wise module of the decoder stack, that '
        "is feed-forward modules and norms; the norms' float32 temporaries are the next peak once the MLP is tiled. "
        '"layer": decoder layers as a whole, but for one call of the attention, in the place of activation checkpointing; '
        'where that cannot be done, as "tokens".',
    )
    chunk_size: int | str = _setting(
        AUTO, "size", 'Tokens per chunk, counted over the whole batch, or "auto" (chosen from the hidden size).'
    )
    num_mini_sequences: int | None = _setting(
        None, "count", "The paper's M: cut every input into this many chunks. Instead of `chunk_size`."
    )
    loss: bool = _setting(True, "bool", "Run the LM head and the cross entropy over chunks too.")
    loss_chunk_size: int | str = _setting(
        AUTO, "size", 'Tokens per chunk of logits, or "auto" (chosen from hidden size, vocabulary and length).'
    )
    return_logits: bool = _setting(
        False,
        "bool",
        "Give back `logits` beside the loss. Costs the memory that tiling the loss saves. Left out by default whenever "
        "labels are given; Trainer evaluations that compute metrics from predictions switch it on for themselves.",
    )
    tile_inference: bool = _setting(
        False,
        "bool",
        "Tile a language model's forward passes without labels and without gradients too (long prompts in `generate`). By "
        "default those are bit-identical to the unconverted model; tiled, they equal it to rounding.",
    )
    head_groups: int | str = _setting(
        1,
        "groups",
        "Run the attention of a tiled layer in this many groups of KV heads, one after the other, so that queries, keys, "
        'values and their gradients exist for one group at a time; "auto": one KV head each. Less memory, for one more run '
        "of the attention and of its projections in backward.",
    )
    offload: str | None = _setting(
        None,
        "offload",
        '"cpu": keep the inputs of tiled layers in (pinned) host memory from forward to backward, copied while the device '
        'computes. How much that takes is said before the first step. "auto": only those of the first layers, as many as do '
        'not fit into `memory_budget`, which is "auto" then unless it is given.',
    )
    keep: str = _setting(
        AUTO,
        "keep",
        'What a tiled layer keeps from forward to backward. "input": its input alone; backward runs the rest again. '
        '"attention": the attention\'s output too, so that backward does not run the attention again, for about as much '
        'memory again as the inputs take (host memory, with `offload`). "matmuls": the results of its linear layers too, so '
        "that backward repeats norms and activations alone, for about half of the memory that training without checkpointing "
        'takes. "all": as without checkpointing, so that nothing is computed twice. "auto": at each call as much as fits '
        'into `memory_budget`; without one, on a CUDA device as for `memory_budget: "auto"` (unless `head_groups` or '
        '`sequence_parallel` is set), and elsewhere "input".',
    )
    memory_budget: float | str | None = _setting(
        None,
        "budget",
        'GiB in each process for what `keep: "auto"` keeps beyond the layers\' inputs, and for computing with it (with '
        '`offload: "auto"`, for the inputs on the device, too). "auto": what the device has free when a forward pass starts, '
        "less a tenth and less what the pass itself needs, as a step of at least as many tokens has shown.",
    )
    sequence_parallel: SequenceParallel = _setting(  # noqa: RUF009 (frozen)
        _ALONE,
        "parallel",
        "Divide each sequence among this many ranks, which act as one data-parallel replica: a size, or "
        '`{"size": 4, "mode": "ring"}`. Modes: "gather" (any attention, any mask), "ulysses" (divides heads), "ring" (holds '
        'the keys and values of one rank at a time), `{"ulysses": 2, "ring": 2}`, and "auto".',
    )
    include: tuple[str, ...] = _setting(
        (), "patterns", 'Tile only modules whose qualified name matches one of these patterns, e.g. ["*.layers.*.mlp"].'
    )
    exclude: tuple[str, ...] = _setting((), "patterns", 'Never tile modules whose name matches, e.g. ["*.layers.0.*"].')

    def __new__(cls, *args, **settings):
        if args:
            raise ValueError(
                f"settings are keywords here, such as {cls.__name__}(chunk_size=4096), got {args[0]!r} "
                f"({type(args[0]).__name__})"
                + (f"; did you mean {cls.__name__}(**{args[0]!r})?" if isinstance(args[0], Mapping) else "")
            )
        cls._require_known(settings)
        return super().__new__(cls)

    @classmethod
    def _require_known(cls, settings: Mapping[Any, Any]) -> None:
        """Raises ValueError for a key that is no field (Python's own error for a keyword names no other)."""
        names = [spec.name for spec in dataclasses.fields(cls)]
        for key, value in settings.items():
            if key in REMOVED:
                raise ValueError(f"{key}={value!r}: {REMOVED[key]}")
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r} (value {value!r}){nearest(key, names, 0.5)}; allowed keys: {', '.join(names)}"
                )

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            allowed, check = RULES[spec.metadata["kind"]]
            value = getattr(self, spec.name)
            if not check(value):
                raise ValueError(
                    f"{spec.name}: {allowed} is allowed, got {value!r} ({type(value).__name__})"
                    + nearest_value(value, spec.metadata["kind"])
                )
            if spec.metadata["kind"] == "patterns":
                object.__setattr__(self, spec.name, tuple(value))
            if spec.metadata["kind"] == "parallel":
                object.__setattr__(self, spec.name, SequenceParallel.from_value(value))
        if self.num_mini_sequences is not None and self.chunk_size != AUTO:
            raise ValueError(
                f"chunk_size={self.chunk_size!r} and num_mini_sequences={self.num_mini_sequences!r} both set the size of "
                "a chunk: give one of the two"
            )
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for name in ("head_groups", "offload", "keep", "memory_budget"):
            if self.scope != "layer" and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} is for whole layers: it needs scope "layer", not {self.scope!r}'
                )
        self._require_keep()

    def _require_keep(self) -> None:
        if self.keep in ("attention", "matmuls", "all") and self.head_groups != 1:
            raise ValueError(
                f"keep={self.keep!r} takes memory to save time, and head_groups={self.head_groups!r} takes time to save "
                f"memory: give one of the two (with keep={self.keep!r}, head_groups must be 1)"
            )
        if self.keep in ("matmuls", "all") and self.offload is not None:
            raise ValueError(
                f"keep={self.keep!r} holds most of a layer on the device, and offload={self.offload!r} keeps its input off "
                'it: give one of the two (offload goes with keep "input", "attention" and "auto")'
            )
        if self.keep == "attention" and self.offload == AUTO:
            raise ValueError(
                "offload='auto' finds room for the layers' inputs first, and keep='attention' keeps more whether there is "
                'room or not: set keep "auto" or "input", or offload "cpu"'
            )
        if self.memory_budget is not None and self.keep != AUTO and not (self.keep == "input" and self.offload == AUTO):
            raise ValueError(
                f'memory_budget={self.memory_budget!r} is for keep "auto", not {self.keep!r}: give one of the two'
            )
        if self.sequence_parallel.size > 1:
            self._require_same_on_all_ranks()

    def _require_same_on_all_ranks(self) -> None:
        settings = (("keep", self.keep, self.keep == "all"), ("offload", self.offload, self.offload == AUTO))
        for name, value, decides in (*settings, ("memory_budget", self.memory_budget, self.memory_budget is not None)):
            if decides:
                raise ValueError(
                    f"{name}={value!r} does not go with sequence_parallel={self.sequence_parallel.to_value()!r}, whose "
                    'ranks must run the same attentions in backward: set keep "input", "attention" or "matmuls" and offload '
                    '"cpu" or null, without memory_budget'
                )

    @classmethod
    def from_arguments(cls, config: Any, settings: Mapping[str, Any], *, source: str) -> MiniSequenceConfig:
        """`from_value` of a config, or of the settings that a function was given as keywords.

        Raises:
            ValueError: both were given; or see `from_value`.
        """
        if settings and config is not None:
            raise ValueError(f"{source}: give a config or settings, not both; got {config!r} and {dict(settings)}")
        return cls.from_value(settings or config, source=source)

    @classmethod
    def from_value(cls, value: Any, *, source: str = "config") -> MiniSequenceConfig:
        """Builds a configuration from whatever a source may hold.

        Args:
            value: a `MiniSequenceConfig`, a mapping of its fields, `True` or `None` (all defaults), or `False` (off).
            source: where the value came from (a file, a key, a variable); every error message starts with it.

        Raises:
            ValueError: see the class; or an unknown key, with the nearest valid one.
        """
        if isinstance(value, MiniSequenceConfig):
            return value if type(value) is cls else cls(**value.to_dict())  # a plugin is one, and more
        if value is None or isinstance(value, bool):
            return cls(enabled=value is not False)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{source}: true, false or a mapping of settings is allowed, got {value!r} ({type(value).__name__})"
            )
        try:
            cls._require_known(value)  # first, as a key may be no word at all
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """The settings as plain JSON types. With `defaults=False`, only those that differ from the default."""
        settings = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if defaults or value != spec.default:
                value = value.to_value() if isinstance(value, SequenceParallel) else value
                settings[spec.name] = list(value) if isinstance(value, tuple) else value
        return settings
