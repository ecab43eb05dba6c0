"""A step at full depth, as functions of its lengths: from steps of a few layers and of a few more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_minis.environment import cache_home
from ds_minis.planner.step.lengths import SYMBOLS

GRADIENTS, OF_LAYER = len(SYMBOLS), len(SYMBOLS) + 1
_ATTENTION = SYMBOLS.index("attention")
FORMAT = 6  # of the files in the cache
# Layers whose inputs are on the device while copies to and from the host are in flight (`memory.offload`): two in
# forward, beside those that a trace of two layers has; in backward the running layer's and the one before it.
IN_FLIGHT = {"forward": 4, "loss": 1, "backward": 2}
# Bytes of (where in the step, gradients so far, gradients since the last layer's attention); the last two are arrays.
BytesAt = Callable[[str, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Peak:
    """Bytes at one moment of a step, without parameters and optimizer.

    Attributes:
        activations: all that is alive but gradients of parameters.
        held: what the engine holds at that moment beside what it always holds, as `held_at` of `Profile.peak` tells.
        layer_inputs: of the activations, what a further layer adds at this moment, times the layers.
        where: "forward", "loss" or "backward".
        in_attention: whether the attention is being run.
        gradients, since_layer: of parameters, that were computed by then, and since the last layer's attention.
    """

    activations: float
    held: float
    layer_inputs: float
    where: str
    in_attention: bool = False
    gradients: float = 0.0
    since_layer: float = 0.0


class Profile:
    """Traces of a few layers and of more, for one configuration and one way to run it.

    Args:
        few, more: as `trace.trace` gives them.
        depths: layers of each, and of the whole model.

    Attributes:
        positions, largest, undivided: see `anatomy.Anatomy`.
    """

    positions: int = 0
    largest: tuple[str, int] = "", 0
    undivided: str = ""

    def __init__(self, few: dict, more: dict, depths: tuple[int, int, int]):
        self.depths = depths
        self.parameters = self._at_depth_of(few["parameters"], more["parameters"])
        span = depths[1] - depths[0]
        self.of_layer = {k: (more["parameters"][k] - few["parameters"][k]) / span for k in few["parameters"]}
        self.flops = [a + self._times * (b - a) for a, b in zip(few["flops"], more["flops"], strict=True)]
        self.widest, self.notes = more["widest"], more["notes"]
        self._series = list(_series(few, more))

    @property
    def _times(self) -> float:
        """How often what one traced depth has more than the other is there beyond the first, in the whole model."""
        few, more, whole = self.depths
        return (whole - few) / (more - few)

    def _at_depth_of(self, few: dict, more: dict) -> dict[str, float]:
        return {name: few[name] + self._times * (more[name] - few[name]) for name in few}

    def peak(
        self,
        values: list[float],
        held_at: BytesAt,
        *,
        offloaded: bool = False,
    ) -> Peak:
        """The moment with the most bytes.

        Args:
            values: the lengths, in the order of SYMBOLS.
            held_at: bytes that an engine holds, of where in the step, of gradients so far and of those since the last layer.
            offloaded: what layers leave for backward is on the host, but for that of a few layers; see IN_FLIGHT.
        """
        best, result = -1.0, Peak(0, 0, 0, "forward")
        weights = np.array(values, dtype=float)
        for where, few, more, aligned in self._series:
            if not aligned:
                few, more = (_highest(events, weights, where, held_at) for events in (few, more))
            shallow, deeper = few[:, : len(SYMBOLS)] @ weights, more[:, : len(SYMBOLS)] @ weights
            layers = min(IN_FLIGHT[where], self.depths[2]) if offloaded else self.depths[2]
            each = (deeper - shallow) / (self.depths[1] - self.depths[0])
            activations = shallow + (layers - self.depths[0]) * each
            # An engine's rule need be no line: it is asked for what there is at full depth.
            sofar = few[:, GRADIENTS] + self._times * (more[:, GRADIENTS] - few[:, GRADIENTS])
            since_layer = np.maximum(few[:, OF_LAYER], more[:, OF_LAYER])
            held = held_at(where, sofar, since_layer)
            at = int(np.argmax(activations + held))
            if activations[at] + held[at] > best:
                best = activations[at] + held[at]
                inputs = min(max(0.0, each[at]) * layers, activations[at])
                attends, gradients = bool(few[at, _ATTENTION]), (float(sofar[at]), float(since_layer[at]))
                result = Peak(float(activations[at]), float(held[at]), float(inputs), where, attends, *gradients)
        return result

    def to_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "depths": list(self.depths),
            "parameters": self.parameters,
            "of_layer": self.of_layer,
            "flops": self.flops,
            "widest": self.widest,
            "notes": self.notes,
            "positions": self.positions,
            "largest": self.largest,
            "undivided": self.undivided,
            "series": [[where, few.tolist(), more.tolist(), aligned] for where, few, more, aligned in self._series],
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Profile:
        profile = cls.__new__(cls)
        profile.depths = tuple(data["depths"])
        for name in ("parameters", "of_layer", "flops", "widest", "notes", "positions", "largest", "undivided"):
            setattr(profile, name, data[name])
        series = ((where, np.array(few), np.array(more), aligned) for where, few, more, aligned in data["series"])
        profile._series = list(series)
        return profile


def _series(few: dict, more: dict):
    """Pairs of segments that are the same place in a shallower and in a deeper model.

    A place is named by layers counted from the first or from the last, of which only the outer two count: what is between
    them grows from the one to the other. A model with two layers has some places that are both.

    Yields:
        (where, events, events, whether they are the same moments row by row).
    """
    seen = set()
    for first in (True, False):
        names = [_named(traced, first) for traced in (few, more)]
        for name, (events, where) in names[0].items():
            if name in names[1] and all(layer <= 1 for _, layer, _ in name):
                pair = [np.array(part, dtype=float) for part in (events, names[1][name][0])]
                aligned = len(pair[0]) == len(pair[1])
                pair = _pruned_together(*pair) if aligned else tuple(map(_pruned, pair))
                key = where, *(part.tobytes() for part in pair)
                if key not in seen:  # groups of heads repeat the same
                    seen.add(key)
                    yield where, *pair, aligned


def _named(traced: dict, from_first: bool) -> dict[tuple, tuple[list, str]]:
    segments, loss = traced["segments"], traced["loss_segment"]
    last = max((mark[1] for segment in segments for mark in segment[:2]), default=0)
    named = {}
    for i, (before, after, events) in enumerate(segments):
        where = "forward" if i < loss else "loss" if i == loss else "backward"
        key = tuple(
            (what, layer if from_first or what in ("start", "end") else last - layer, call)
            for what, layer, call in (before, after)
        )
        named[key] = events, where
    return named


def _highest(events: np.ndarray, weights: np.ndarray, where: str, held_at: BytesAt) -> np.ndarray:
    """The row with the most bytes."""
    activations = events[:, : len(SYMBOLS)] @ weights
    at = int(np.argmax(activations + held_at(where, events[:, GRADIENTS], events[:, OF_LAYER])))
    return events[at : at + 1]


def _pruned_together(few: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The moments that may be the peak for some lengths and depth: among those that grow alike, as `_pruned` has them."""
    width, kept = few.shape[1], []
    kinds, of_kind = np.unique(more - few, axis=0, return_inverse=True)
    for i, growth in enumerate(kinds):
        rows = _pruned(few[of_kind.reshape(-1) == i])
        kept.append(np.hstack([rows, rows + growth]))
    both = np.vstack(kept)
    return both[:, :width], both[:, width:]


def _pruned(events: np.ndarray) -> np.ndarray:
    """The events that may be the peak for some lengths: those that no other exceeds in every column."""
    rows = np.unique(events, axis=0)
    rows = rows[np.argsort(-rows[:, :GRADIENTS].sum(axis=1))]
    kept = np.empty((0, rows.shape[1]))
    for row in rows:
        if not len(kept) or not (kept >= row).all(axis=1).any():
            kept = np.vstack([kept, row])
    return kept


def cache_key(config_fields: dict[str, Any], way_key: list, versions: list[str]) -> str:
    text = json.dumps([FORMAT, config_fields, way_key, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Where traces are kept between runs."""
    return Path(cache_home()) / "ds_minis" / "plan"


def read_cached(folder: Path | None, key: str) -> Profile | None:
    if folder is None:
        return None
    try:
        return Profile.from_data(json.loads((folder / f"{key}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cached(folder: Path | None, key: str, profile: Profile) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{key}.tmp"
        temporary.write_text(json.dumps(profile.to_data()), encoding="utf-8")
        temporary.replace(folder / f"{key}.json")
    except OSError:  # a cache is no more than that
        return
