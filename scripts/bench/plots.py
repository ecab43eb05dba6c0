"""The plots of the benchmarks: one picture for each JSON file that has more than one bar to show. Needs matplotlib.

Each says in its title what was measured, of what, and whether it was simulated; bars of one family have one colour.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
FAMILIES = {  # found in a bar's name -> (in the legend, colour)
    "ds_minis": ("ds_minis", "#1f77b4"),
    "DeepSpeed": ("DeepSpeed (ALST)", "#ff7f0e"),
    "Liger": ("Liger", "#2ca02c"),
    "TRL": ("TRL", "#9467bd"),
    "linear_cross_entropy": ("torch", "#8c564b"),
    "mini-s": ("mini-s, stand-in", "#e377c2"),
    "": ("transformers, plain", "#7f7f7f"),
}
WORDS = (  # of variants -> in a picture
    ("ds_minis, torch path", "ds_minis"),
    ('ds_minis, scope "mlp"', "ds_minis: MLP (the paper's)"),
    ('ds_minis, scope "tokens"', "ds_minis: MLP and norms"),
    ('ds_minis, scope "layer"', "ds_minis: whole layer (default)"),
    ("(default), head groups", "+ head groups"),
    ("(default), attention kept", "+ kept attention"),
    (", attention kept", " + kept attention"),
    ("plain checkpointing (transformers)", "plain checkpointing"),
    ("DeepSpeed TiledMLP and TiledFusedLogitsLoss (ALST)", "DeepSpeed tiled MLP and loss"),
    ("DeepSpeed TiledMLP (ALST)", "DeepSpeed tiled MLP"),
    ("mini-s MLP loop (stand-in)", "mini-s MLP loop"),
    ("DeepSpeed TiledFusedLogitsLoss", "DeepSpeed tiled loss"),
    ("torch linear_cross_entropy", "torch fused loss"),
)
MODELS = {
    "llama-3-8b": "Llama-3-8B",
    "llama-2-7b": "Llama-2-7B",
    "mistral-7b": "Mistral-7B",
    "qwen2-7b": "Qwen2-7B",
    "gemma-2-9b": "Gemma-2-9B",
}
SETTINGS = {"full": "full fine-tuning", "lora": "LoRA, rank 16"}


@dataclass(frozen=True)
class Panel:
    """One set of bars: name -> value, what an end of a bar says, and a line to compare with."""

    title: str
    bars: dict[str, float]
    unit: str
    label: Callable[[float], str]
    reference: float | None = None


@dataclass(frozen=True)
class Picture:
    """What one file shows."""

    title: str
    panels: list[Panel]


def pictures(files: dict[str, dict[str, Any]]) -> dict[str, Picture]:
    """The picture of each file, by its name without the ending; none of a file with a single bar."""
    found = {}
    for name, content in files.items():
        make = _MAKERS.get(content.get("benchmark"))
        picture = make(content) if make else None
        if picture is not None and max(len(panel.bars) for panel in picture.panels) > 1:
            title = f"{picture.title}{' (simulated)' if content['simulated'] else ''}"
            found[name.removesuffix(".json")] = Picture(title, picture.panels)
    return found


def _transient_memory(content: dict[str, Any]) -> Picture:
    tokens, results = content["arguments"]["seq"], content["results"]
    panels = [
        Panel(
            MODELS.get(model, model) if len(results) > 1 else "",
            {e["title"]: e["W_KiB_per_token"] for e in result["variants"].values() if not e["host_bytes"]},
            "KiB for each token, less is better",
            lambda value: f"{value:.0f}",
        )
        for model, result in results.items()
    ]
    of = "" if len(results) > 1 else f" of {MODELS.get(*[next(iter(results))] * 2)}"
    return Picture(
        f"Memory that a training step{of} needs beside weights and saved layer inputs\n{tokens:,} tokens", panels
    )


def _step_time(content: dict[str, Any]) -> Picture:
    result = content["results"][-1]
    entries = result["variants"].values()
    panel = Panel(
        "",
        {e["title"]: e["ratio"] for e in entries},
        "time of a step, as a multiple of plain checkpointing's; less is better",
        lambda value: f"{value:.2f}x",
        reference=1.0,
    )
    place = "a CPU" if "CPU" in content["device"] or "EPYC" in content["device"] else content["device"]
    plain = next(iter(entries))
    words = (
        f"Time of a training step of a decoder on {place}\n{result['tokens']:,} tokens; plain: {plain['seconds']:.1f} s"
    )
    return Picture(words, [panel])


def _max_context(content: dict[str, Any]) -> Picture:
    arguments, rows = content["arguments"], [e for e in content["results"] if "tokens" in e]
    panels = [
        Panel(
            SETTINGS.get(setting, setting),
            {e["title"]: e["tokens"] / 1024 for e in rows if e["setting"] == setting},
            "K tokens (1 K = 1,024), more is better",
            lambda value: f"{value:.0f}",
        )
        for setting in dict.fromkeys(e["setting"] for e in rows)
    ]
    shape = MODELS.get(arguments["shape"], arguments["shape"])
    return Picture(f"Longest sequence that {shape} can be trained on with one 80 GB GPU", panels)


def _loss_head(content: dict[str, Any]) -> Picture:
    sizes = content["arguments"]
    rows = {n: e for n, e in content["results"].items() if "seconds" in e and not n.endswith(", frozen head")}
    times = Panel("time", {n: e["seconds"] * 1e3 for n, e in rows.items()}, "ms, less is better", lambda v: f"{v:,.0f}")
    peaks = {n: e["peak_bytes"] / MIB for n, e in rows.items()}
    memory = Panel("memory", peaks, "MiB at the peak, less is better", lambda v: f"{v:,.0f}")
    words = f"{sizes['tokens']:,} tokens, vocabulary {sizes['vocab_size']:,}, {sizes['dtype']}"
    return Picture(
        f"LM head and cross entropy, forward and backward, on a {sizes['device'].upper()}\n{words}", [times, memory]
    )


_MAKERS: dict[str | None, Callable[[dict[str, Any]], Picture]] = {
    "transient_memory": _transient_memory,
    "step_time": _step_time,
    "max_context": _max_context,
    "loss_head": _loss_head,
}


def in_words(title: str) -> str:
    """A variant's title as somebody reads it who has not read the text."""
    for before, after in WORDS:
        title = title.replace(before, after)
    return re.sub(r"^plain$", "logits as a whole", title)


def family(title: str) -> tuple[str, str]:
    """Whose it is, and the colour of that."""
    return next(found for key, found in FAMILIES.items() if key in title)


def draw(files: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the pictures beside the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, picture in pictures(files).items():
        figure = _figure(pyplot, picture)
        figure.savefig(folder / f"{name}.png", dpi=110)
        pyplot.close(figure)
        made.append(folder / f"{name}.png")
    return made


def _figure(pyplot, picture: Picture):
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(picture.panels))
    rows = -(-len(picture.panels) // columns)
    bars = max(len(panel.bars) for panel in picture.panels)
    size = (8.5 if columns == 1 else 11, 1.4 + rows * (0.7 + 0.32 * bars))
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey="row")
    families = {}
    for axes, panel in zip(grid.flat, picture.panels, strict=False):
        families |= dict(map(family, panel.bars))
        names = [in_words(title) for title in panel.bars]
        drawn = axes.barh(names, list(panel.bars.values()), color=[family(title)[1] for title in panel.bars])
        axes.bar_label(drawn, labels=[panel.label(value) for value in panel.bars.values()], padding=3)
        axes.margins(x=0.12)  # or the labels run over the edge
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(panel.unit)
        axes.set_title(panel.title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        if panel.reference is not None:
            axes.axvline(panel.reference, color="black", linewidth=0.8, linestyle=":")
    for axes in grid[:, 0]:
        axes.invert_yaxis()
    figure.suptitle(picture.title)
    handles = [Patch(color=colour, label=name) for name, colour in families.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")
    return figure
