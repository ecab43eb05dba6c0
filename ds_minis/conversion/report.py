"""What became of a model's modules, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ds_minis.config import MiniSequenceConfig
from ds_minis.conversion.sizes import Sizes


@dataclass(frozen=True)
class ConversionReport:
    """What became of a model's modules.

    Attributes:
        config: the settings.
        source: where they came from.
        layers: qualified name -> class name, of every decoder layer that is tiled as a whole.
        tiled: qualified name -> class name, of every tiled module; those of a layer are used where that is not tiled.
        untiled: qualified name -> (class name, reason), of every other part of the decoder stack.
        one_call: qualified name -> reason, of every such layer that attends to all heads at once in spite of `head_groups`.
        unkept: (class name, reason) of every kind of tiled layer that computes its attention again in backward in spite of
            `keep: "attention"`, as the first step found out.
        loss: what became of the LM head and the loss, in words.
        sizes: of the chunks; None where nothing is tiled.
        parallel: how sequences are divided among ranks, in words; empty if they are not.
        last_loss: what read the logits of the last forward pass in training, in words; empty if nothing did.
        last_kept: what the layers kept in the last forward pass in training, in words; empty if their inputs alone.
        last_step: how many chunks the last forward pass in training had, in words; empty before the first.
    """

    config: MiniSequenceConfig
    source: str
    tiled: Mapping[str, str]
    untiled: Mapping[str, tuple[str, str]]
    loss: str
    layers: Mapping[str, str] = field(default_factory=dict)
    one_call: Mapping[str, str] = field(default_factory=dict)
    unkept: Sequence[tuple[str, str]] = ()
    sizes: Sizes | None = None
    last_step: str = ""
    last_loss: str = ""
    last_kept: str = ""
    parallel: str = ""

    def __str__(self) -> str:
        inside = {fqn for fqn in self.tiled if any(fqn.startswith(f"{layer}.") for layer in self.layers)}
        outside = Counter(name for fqn, name in self.tiled.items() if fqn not in inside)
        # Of what is in a layer that is tiled as a whole, nothing is to be said where all layers are.
        all_layers = not any(part.startswith(f"{fqn}.") for fqn in self.untiled for part in self.tiled)
        spare = Counter(name for fqn, name in self.tiled.items() if fqn in inside and not all_layers)
        lines = [f"ds_minis ({self.source}): {self.config.to_dict(defaults=False) or 'all defaults'}"]
        lines += [str(self.sizes)] if self.sizes else []
        lines += [f"  tiled as a whole: {count} x {name}" for name, count in Counter(self.layers.values()).items()]
        lines += [f"  tiled: {count} x {name}" for name, count in outside.items()]
        lines += [f"  tiled where their layer is not: {count} x {name}" for name, count in spare.items()]
        one_call = Counter((self.layers[fqn], reason) for fqn, reason in self.one_call.items() if fqn in self.layers)
        lines += [f"  attention in one call: {count} x {name} ({reason})" for (name, reason), count in one_call.items()]
        lines += [f"  attention not kept: {name} ({reason})" for name, reason in self.unkept]
        for (name, reason), count in Counter(self.untiled.values()).items():
            lines.append(f"  not tiled: {count} x {name} ({reason})")
        lines.append(f"  loss: {self.loss}")
        lines += [f"  sequence parallelism: {self.parallel}"] if self.parallel else []
        lines += [f"  the last step: {self.last_step}"] if self.last_step else []
        lines += [f"  kept in the last step: {self.last_kept}"] if self.last_kept else []
        return "\n".join([*lines, f"  the loss of the last step: {self.last_loss}"] if self.last_loss else lines)
