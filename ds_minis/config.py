"""The one configuration of ds_minis, and the only place that reads environment variables. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCOPES = ("mlp", "tokens")
AUTO = "auto"


def _setting(default: Any, kind: str, doc: str):
    """A dataclass field with its value rule (`kind`, see `_RULES`) and its documentation for users."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class MiniSequenceConfig:
    """What is run over mini-sequences (chunks of tokens), and how large a chunk is.

    The same mapping is accepted as keyword arguments here, as `"mini_sequence"` in a DeepSpeed JSON and as the `config`
    argument of `convert_to_mini_sequence`; `True` stands for all defaults. Names follow the MST paper (arXiv
    2407.15892).

    Raises:
        ValueError: wrong type or value out of range. The message names the key, the value and what is allowed. (Every
            door that takes a mapping also names unknown keys and the nearest valid one, see `from_value`.)
    """

    enabled: bool = _setting(True, "bool", "False leaves the model exactly as it is.")
    scope: str = _setting(
        "tokens",
        "scope",
        '"mlp": the feed-forward modules, as in the paper. "tokens": every token-wise module of the decoder stack, that '
        "is feed-forward modules and norms; the norms' float32 temporaries are the next peak once the MLP is tiled.",
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
    include: tuple[str, ...] = _setting(
        (), "patterns", 'Tile only modules whose qualified name matches one of these patterns, e.g. ["*.layers.*.mlp"].'
    )
    exclude: tuple[str, ...] = _setting((), "patterns", 'Never tile modules whose name matches, e.g. ["*.layers.0.*"].')

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            allowed, check = _RULES[spec.metadata["kind"]]
            value = getattr(self, spec.name)
            if not check(value):
                raise ValueError(f"{spec.name}: {allowed} is allowed, got {value!r} ({type(value).__name__})")
            if spec.metadata["kind"] == "patterns":
                object.__setattr__(self, spec.name, tuple(value))
        if self.num_mini_sequences is not None and self.chunk_size != AUTO:
            raise ValueError(
                f"chunk_size={self.chunk_size!r} and num_mini_sequences={self.num_mini_sequences!r} both set the size of "
                "a chunk: give one of the two"
            )

    @classmethod
    def from_value(cls, value: Any, *, door: str = "config") -> MiniSequenceConfig:
        """Builds a configuration from whatever a door may hold.

        Args:
            value: a `MiniSequenceConfig`, a mapping of its fields, `True` or `None` (all defaults), or `False` (off).
            door: where the value came from (a file, a key, a variable); every error message starts with it.

        Raises:
            ValueError: see the class; or an unknown key, with the nearest valid one.
        """
        if isinstance(value, MiniSequenceConfig):
            return value if type(value) is cls else cls(**value.to_dict())  # a plugin is one, and more
        if value is None or isinstance(value, bool):
            return cls(enabled=value is not False)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{door}: true, false or a mapping of settings is allowed, got {value!r} ({type(value).__name__})"
            )
        names = [spec.name for spec in dataclasses.fields(cls)]
        for key in value:
            if key not in names:
                raise ValueError(
                    f"{door}: unknown key {key!r} (value {value[key]!r}){nearest(key, names)}; "
                    f"allowed keys: {', '.join(names)}"
                )
        try:
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"{door}: {error}") from None

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """The settings as plain JSON types. With `defaults=False`, only those that differ from the default."""
        settings = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if defaults or value != spec.default:
                settings[spec.name] = list(value) if isinstance(value, tuple) else value
        return settings


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return value == AUTO if isinstance(value, str) else _is_int(value) and value >= 1


def _is_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) and pattern for pattern in value)


_RULES = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "scope": (" or ".join(f'"{scope}"' for scope in SCOPES), lambda value: value in SCOPES),
    "size": ('a whole number of tokens from 1 or "auto"', _is_size),
    "count": ("a whole number from 1", lambda value: value is None or (_is_int(value) and value >= 1)),
    "patterns": ("a list of name patterns", _is_patterns),
}


def nearest(key: Any, allowed: list[str]) -> str:
    """`'; did you mean "x"?'` for the nearest of the allowed keys (an empty string when nothing is near)."""
    matches = difflib.get_close_matches(str(key).lower(), allowed, n=1, cutoff=0.5)
    return f'; did you mean "{matches[0]}"?' if matches else ""


SECTION = "mini_sequence"


@dataclass(frozen=True)
class Request:
    """Settings, and the door through which they came (a file, a variable, a function), for messages."""

    config: MiniSequenceConfig
    door: str


def read_section(mapping: Mapping[str, Any], door: str) -> Request | None:
    """What an engine's configuration asks for under `"mini_sequence"`; None if it has no such section.

    Raises:
        ValueError: the section is wrong, or a key beside it looks like a misspelling of its name.
    """
    for key in mapping:
        if key != SECTION and difflib.get_close_matches(str(key).lower(), [SECTION], cutoff=0.7):
            raise ValueError(
                f'{door}: unknown key {key!r} (value {mapping[key]!r}); did you mean "{SECTION}"? Allowed there: true, false '
                f"or a mapping of {', '.join(MiniSequenceConfig().to_dict())}"
            )
    if SECTION not in mapping:
        return None
    return Request(MiniSequenceConfig.from_value(mapping[SECTION], door=f'{door}, "{SECTION}"'), door)


def agreed(*requests: Request | None) -> Request | None:
    """The one thing that all doors ask for (the first of equal requests); None if none asks for anything.

    Raises:
        ValueError: two of them disagree.
    """
    given = [request for request in requests if request is not None]
    for request in given[1:]:
        if request.config != given[0].config:
            raise ValueError(
                f"two places ask for different mini-sequence settings:\n  {given[0].door}: {given[0].config.to_dict()}\n"
                f"  {request.door}: {request.config.to_dict()}\nGive the same settings in both, or in one of them only "
                "(on a model that is converted already: after revert_mini_sequence)"
            )
    return given[0] if given else None


_VARIABLE, _VARIABLE_DOOR, _BY_RUN = "DS_MINIS_CONFIG", "DS_MINIS_CONFIG_DOOR", "DS_MINIS_RUN"


def requested_by_environment(*others: Request | None) -> Request | None:
    """What the environment asks for: `DS_MINIS_CONFIG` (`true`, `false` or a JSON mapping).

    Without it, a script started by `python -m ds_minis.run` asks for all defaults, unless one of the `others` asks for
    something.

    Raises:
        ValueError: the variable is not JSON, or its settings are wrong.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        by_run = _BY_RUN in os.environ and not any(others)
        return Request(MiniSequenceConfig(), "python -m ds_minis.run") if by_run else None
    door = os.environ.get(_VARIABLE_DOOR) or f"environment variable {_VARIABLE}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{door}: true, false or a JSON mapping of settings is allowed, got {text!r} ({error})"
        ) from None
    return Request(MiniSequenceConfig.from_value(value, door=door), door)


def hand_to_ranks(request: Request | None) -> None:
    """Puts a launcher's request into the environment, which its ranks inherit; None takes an earlier one out again.

    Raises:
        ValueError: `DS_MINIS_CONFIG` was set by the user, to something else.
    """
    if _VARIABLE_DOOR in os.environ:  # an earlier call's, not the user's
        del os.environ[_VARIABLE], os.environ[_VARIABLE_DOOR]
    by_user = requested_by_environment(request)
    agreed(by_user, request)
    if by_user is None and request is not None:
        text = json.dumps(request.config.to_dict(), separators=(",", ":"))
        for forbidden in " ;<>":  # accelerate passes no variable with these to other machines
            text = text.replace(forbidden, f"\\u{ord(forbidden):04x}")
        os.environ[_VARIABLE], os.environ[_VARIABLE_DOOR] = text, request.door


def mark_run() -> None:
    """Notes for this process and its children that `python -m ds_minis.run` started them."""
    os.environ[_BY_RUN] = "1"


def autoload_enabled() -> bool:
    """Whether `import torch` may attach ds_minis to the engines: `DS_MINIS_AUTOLOAD` is not "0", "false" or "off"."""
    return os.environ.get("DS_MINIS_AUTOLOAD", "1").lower() not in ("0", "false", "off")


def process_rank() -> int:
    """This process's rank as its launcher set it (`RANK`), 0 when there was none."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0
