"""Time of a step against its length on a card of a stated size: plain, with checkpointing, and ds_minis with free memory.

python scripts/bench/kept_by_length.py --json benchmarks/kept_by_length_cpu.json
python scripts/bench/kept_by_length.py --draw docs/images/kept_by_length.png        # from that file; needs matplotlib

The card is counted: bytes of all tensors beside the parameters. A way ends where a step takes more than the card has.
ds_minis has `memory_budget: "auto"` and is told the card's size and its own counted bytes. Seconds are of one thread's CPU
time, interleaved, so that other programs hardly matter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import MIB, RESULTS, checkpointed, envelope, small_llama, train_step, write
from live_bytes import LiveBytes
from paired import interleaved

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.memory.learned_memory import RESERVE
from ds_minis.tiling.modules.swap import Tiled

PLAIN, CHECKPOINTING, OURS = "plain", "plain, checkpointing", "ds_minis, memory_budget: auto"
COLOURS = {PLAIN: "#7f7f7f", CHECKPOINTING: "#c7c7c7", OURS: "#1f77b4"}


class Card:
    """A device's memory for ds_minis: of a stated size, its use counted while `live` is there."""

    def __init__(self, num_bytes: float):
        self.live: LiveBytes | None = None
        self._usable, self._peak = num_bytes / (1 - RESERVE), 0.0

    def in_use(self) -> float:
        return 0.0 if self.live is None else self.live.now

    def peak(self) -> float:
        self._peak = max(self._peak, 0.0 if self.live is None else self.live.peak)
        return self._peak

    def usable(self) -> float:
        return self._usable


def counted(model: torch.nn.Module, length: int, vocab: int, card: Card | None = None) -> int:
    """The most bytes of a step beside the parameters."""
    model.zero_grad(set_to_none=True)
    with LiveBytes(apart=[*model.parameters(), *model.buffers()]) as live:
        if card is not None:
            card.live = live
        train_step(model, length, vocab)
    if card is not None:
        card.peak()
        card.live = None
    return live.peak


def measured(args: argparse.Namespace) -> dict[str, Any]:
    plain = small_llama(args, lora=args.train == "lora")
    models = {PLAIN: plain, CHECKPOINTING: checkpointed(copy.deepcopy(plain)), OURS: copy.deepcopy(plain)}
    card = Card(args.card_mib * MIB)
    with contextlib.redirect_stdout(io.StringIO()):
        convert_to_mini_sequence(checkpointed(models[OURS]), {"memory_budget": "auto"})
    store = next(m for m in models[OURS].modules() if isinstance(m, Tiled)).mini_sequence_chunking.layer_inputs
    store.budget.memory_of = lambda device: card
    train_step(models[OURS], 64, args.vocab)  # what is found out at a first call
    rows = []
    for length in args.lengths:
        peaks = {}
        for name, model in models.items():
            for _ in range(3 if name == OURS else 1):  # measured, sizes learned, and as in every later step
                peaks[name] = counted(model, length, args.vocab, card if name == OURS else None)
        rows.append({"tokens": length, "peak_bytes": peaks, "kept": mini_sequence_report(models[OURS]).last_kept})
    for row in rows:
        ways = {
            name: (lambda model=model, n=row["tokens"]: train_step(model, n, args.vocab))
            for name, model in models.items()
            if row["peak_bytes"][name] <= args.card_mib * MIB
        }
        times = interleaved(ways, args.rounds, clock=time.process_time)
        row["seconds"] = {name: statistics.median(own) for name, own in times.items()}
        row["all_seconds"] = times
        print(json.dumps({k: v for k, v in row.items() if k != "all_seconds"}), file=sys.stderr, flush=True)
    return {"rows": rows}


def kept(said: str) -> str:
    """What the layers of a step kept, in a line for each level, of what the report says."""
    parts = said.partition(";")[0].split(", ") if said else ["all layers kept the inputs alone"]
    return "\n".join(part.replace(" kept the ", ": ").replace(" kept ", ": ") for part in parts)


def draw(content: dict[str, Any], path: Path) -> None:
    """Milliseconds for each 1,000 tokens, by length; at the bottom what ds_minis's layers kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arguments, rows = content["arguments"], content["results"]["rows"]
    figure, axes = pyplot.subplots(figsize=(8.5, 4.4), layout="constrained")
    for name, colour in COLOURS.items():
        points = [(row["tokens"], 1e6 * row["seconds"][name] / row["tokens"]) for row in rows if name in row["seconds"]]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        if len(points) < len(rows):
            axes.annotate("out of memory beyond", points[-1], (8, -4), textcoords="offset points", fontsize="small")
    for row in rows:
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(row["tokens"], 0.03, kept(row["kept"]), fontsize="x-small", color=COLOURS[OURS], **place)
    axes.margins(x=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms for each 1,000 tokens of a step, less is better")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    train = "LoRA" if arguments["train"] == "lora" else "full fine-tuning"
    axes.set_title(
        f"Time of a training step, {train}, {arguments['layers']} layers of {arguments['hidden']}, on a CPU,\n"
        f"with {arguments['card_mib']:,} MiB beside the parameters"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("vocab", 1024), ("rounds", 4), ("card_mib", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--train", choices=["full", "lora"], default="lora")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--draw", metavar="PNG", help="draw benchmarks/kept_by_length_cpu.json, and measure nothing")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads((RESULTS / "kept_by_length_cpu.json").read_text(encoding="utf-8")), Path(args.draw))
        return
    torch.set_num_threads(1)
    arguments = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "draw"})
    write(args.json, envelope("kept_by_length", arguments, simulated=False, results=measured(args)))


if __name__ == "__main__":
    main()
