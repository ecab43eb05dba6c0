"""Draws memory by part against the length of a sequence, with the card as a line. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_minis.planner.inputs.setup import GIB
from ds_minis.planner.plan.compare import CHECKPOINTED, Plan, Row

PARTS = {
    "parameters": ("weights", "#4e79a7"),
    "optimizer": ("optimizer states", "#59a14f"),
    "gradients": ("gradients", "#edc948"),
    "engine": ("engine buffers, gathered layers", "#b07aa1"),
    "layer inputs": ("layer inputs", "#76b7b2"),
    "transient": ("transient working set, loss", "#f28e2b"),
    "fixed": ("CUDA context, libraries, NCCL", "#bab0ac"),
}
_POINTS = 48


class NoPicture(ValueError):
    """matplotlib is not there, or nothing can be drawn."""


def draw(plan: Plan, path: str | Path) -> Path:
    """Two panels on one scale: plain checkpointing, and the advised way."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise NoPicture(f"--plot needs matplotlib ({error}): pip install matplotlib") from None
    plain, advised = _row(plan, CHECKPOINTED), plan.best or _last(plan)
    rows = [row for row in ([plain] if advised is plain else [plain, advised]) if row is not None]
    if not rows:
        raise NoPicture("--plot: nothing could be planned, so nothing is drawn")
    figure, grid = pyplot.subplots(
        1, len(rows), figsize=(5.6 * len(rows), 5.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, row in zip(grid[0], rows, strict=True):
        _panel(axes, plan, row)
    grid[0][0].set_ylabel("memory of one GPU, GiB")
    setup = plan.setup
    gpus = (
        f"{setup.gpus} x {plan.gpu_memory:g} GB, {setup.engine}"
        if setup.gpus > 1
        else f"one {plan.gpu_memory:g} GB card"
    )
    how = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[setup.train]
    figure.suptitle(f"{plan.model}: memory of a training step by length\n{how}, {setup.dtype}, {gpus}")
    handles, names = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _row(plan: Plan, name: str) -> Row | None:
    return next((row for row in plan.rows if row.candidate.name == name and row.estimate), None)


def _last(plan: Plan) -> Row | None:
    return next((row for row in reversed(plan.rows) if row.estimate), None)


def _panel(axes: Any, plan: Plan, row: Row) -> None:
    reach = max(row.longest, plan.tokens or 0, 4096) * 1.25
    lengths = [max(1024, int(reach * i / _POINTS)) for i in range(1, _POINTS + 1)]
    estimates = [plan.planner.estimate(row.candidate.setup, tokens) for tokens in lengths]
    parts = [estimate.parts() for estimate in estimates]
    values = [[part.get(name, 0) / GIB for part in parts] for name in PARTS]
    labels, colours = zip(*PARTS.values(), strict=True)
    axes.stackplot([n / 1024 for n in lengths], values, labels=labels, colors=colours)
    capacity = plan.capacity / GIB
    axes.axhline(capacity, color="black", linewidth=1.2, linestyle="--", label=f"the card ({capacity:.1f} GiB usable)")
    if row.longest:
        axes.axvline(row.longest / 1024, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{row.longest:,} tokens fit",
            (row.longest / 1024, capacity * 0.04),
            xytext=(-5, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
        )
    axes.set_xlim(lengths[0] / 1024, lengths[-1] / 1024)
    axes.set_ylim(0, capacity * 1.25)
    axes.set_xlabel("length of a sequence, K tokens (1 K = 1,024)")
    name = row.candidate.name.replace(", sequence_parallel", ",\nsequence_parallel")
    axes.set_title(name, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
