"""Values of settings: what is allowed for each kind of setting, and the nearest allowed one. Standard library only."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
SCOPES = ("mlp", "tokens", "layer")
KEEPS = ("input", "attention", "matmuls", "all", "auto")
OFFLOADS = ("cpu", "auto")
MODES = ("auto", "gather", "ulysses", "ring")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SequenceParallel:
    """The value of `sequence_parallel`: how many ranks share a sequence, and how they attend to each other's tokens.

    Attributes:
        size: ranks in a group.
        mode: "auto", "gather", "ulysses" or "ring"; for a grid of the last two, the ranks of each: `(a, b)`, `a * b = size`.
    """

    size: int
    mode: str | tuple[int, int] = "auto"

    @property
    def grid(self) -> tuple[int, int]:
        """Ranks that exchange heads, and ranks in a ring, for the mode with both."""
        return self.mode

    @classmethod
    def from_value(cls, value: Any) -> SequenceParallel | None:
        """Reads a size, or a mapping of `size` and `mode`; None for what is neither."""
        if isinstance(value, cls):
            return value
        if _is_int(value) and value >= 1:
            return cls(value)
        if not isinstance(value, Mapping) or not {"size"} <= set(value) <= {"size", "mode"}:
            return None
        size, mode = value["size"], value.get("mode", "auto")
        if not (_is_int(size) and size >= 1):
            return None
        if isinstance(mode, Mapping):
            parts = [mode.get("ulysses"), mode.get("ring")]
            if set(mode) != {"ulysses", "ring"} or not all(_is_int(n) and n >= 1 for n in parts):
                return None
            return cls(size, tuple(parts)) if parts[0] * parts[1] == size else None
        return cls(size, mode) if mode in MODES else None

    def to_value(self) -> Any:
        """As a configuration holds it: the size alone, or a mapping."""
        if self.mode == "auto":
            return self.size
        mode = self.mode if isinstance(self.mode, str) else dict(zip(("ulysses", "ring"), self.mode, strict=True))
        return {"size": self.size, "mode": mode}


def _is_size(value: Any) -> bool:
    return value == AUTO if isinstance(value, str) else _is_int(value) and value >= 1


def _is_budget(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value in (None, AUTO)
    return (_is_int(value) or isinstance(value, float)) and 0 < value < float("inf")


def _is_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) and pattern for pattern in value)


RULES = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "scope": (" or ".join(f'"{scope}"' for scope in SCOPES), lambda value: value in SCOPES),
    "size": ('a whole number of tokens from 1 or "auto"', _is_size),
    "count": ("a whole number from 1", lambda value: value is None or (_is_int(value) and value >= 1)),
    "groups": ('a whole number of groups from 1 or "auto"', _is_size),
    "keep": (" or ".join(f'"{keep}"' for keep in KEEPS), lambda value: value in KEEPS),
    "budget": ('a number of GiB above 0, "auto" or null', _is_budget),
    "offload": ('"cpu", "auto" or null', lambda value: value is None or value in OFFLOADS),
    "patterns": ("a list of name patterns", _is_patterns),
    "parallel": (
        'a number of ranks from 1, or {"size": ranks, "mode": MODE}, MODE "auto", "gather", "ulysses", "ring" or '
        '{"ulysses": a, "ring": b} with a * b = size',
        lambda value: SequenceParallel.from_value(value) is not None,
    ),
}


_NUMBERS = ("size", "groups", "count")
_WORDS = {
    "bool": {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False},
    "scope": {scope: scope for scope in SCOPES},
    "size": {AUTO: AUTO},
    "groups": {AUTO: AUTO},
    "offload": {"cpu": "cpu", AUTO: AUTO, "none": None, "false": None},
    "budget": {AUTO: AUTO, "none": None},
    "keep": {keep: keep for keep in KEEPS},
}


def nearest_value(value: Any, kind: str) -> str:
    """`'; did you mean 1?'` for the nearest value that a rule of `RULES` allows (an empty string when none is near)."""
    found = []
    if isinstance(value, str):
        words = _WORDS.get(kind, {})
        found = [words[word] for word in difflib.get_close_matches(value.lower(), words, n=1, cutoff=0.5)]
        if not found and kind in _NUMBERS and value.strip().isdigit():
            found = [max(1, int(value))]
        if not found and kind == "patterns" and value:
            found = [[value]]
    elif kind == "bool" and isinstance(value, int) and value in (0, 1):
        found = [bool(value)]
    elif kind in _NUMBERS and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
        found = [max(1, round(value))]
    return f"; did you mean {json.dumps(found[0])}?" if found else ""


def nearest(word: Any, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """`'; did you mean "x"?'` for the nearest of the allowed words (an empty string when nothing is near)."""
    matches = difflib.get_close_matches(str(word).lower(), list(allowed), n=1, cutoff=cutoff)
    return f'; did you mean "{matches[0]}"?' if matches else ""
