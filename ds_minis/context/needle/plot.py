"""Pictures of needle results: a heat-map of depth and length, panels side by side, and an animation over checkpoints.

matplotlib and pillow are imported when a picture is drawn: `pip install 'ds_minis[plots]'`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#d1495b", "#edae49", "#2a9d8f")  # 0%, 50%, 100%
_ANNOTATED = 240  # cells of a panel that are given a number


def plot_panels(results: Sequence[dict[str, Any]], path: Path, titles: Sequence[str] = (), title: str = "") -> Path:
    """Draws one heat-map for each of the results, side by side, to a PNG or any other format that matplotlib writes."""
    save(_figure(results, titles or [title_of(r) for r in results], title), path)
    return path


def plot_heat_map(results: dict[str, Any], path: Path, title: str = "") -> Path:
    """Draws one heat-map."""
    return plot_panels([results], path, [title or title_of(results)])


def plot_animation(
    frames: Sequence[Sequence[dict[str, Any]]],
    path: Path,
    titles: Sequence[str] = (),
    frame_titles: Sequence[str] = (),
    milliseconds: int = 900,
) -> Path:
    """Draws an animated GIF.

    Args:
        frames: for each checkpoint, the results of each panel.
        titles: of the panels.
        frame_titles: of the frames, such as the number of steps.
    """
    pillow = _pillow()
    axes = _axes([results for frame in frames for results in frame])
    images = []
    for i, frame in enumerate(frames):
        title = frame_titles[i] if i < len(frame_titles) else f"checkpoint {i + 1} of {len(frames)}"
        buffer = io.BytesIO()
        save(_figure(frame, titles or [title_of(r) for r in frame], title, axes), buffer, format="png")
        images.append(pillow.open(buffer).convert("RGB").quantize(64))
    times = [milliseconds] * (len(images) - 1) + [3 * milliseconds]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    return path


def title_of(results: dict[str, Any]) -> str:
    """What a heat-map is of: model, variant, RoPE's base."""
    name = Path(str(results.get("model", "a model"))).name
    theta = results.get("rope_theta")
    return f"{name}: {results['task']['variant']}" + (f", RoPE theta {theta:,.0f}" if theta else "")


def accuracy_in_words(results: dict[str, Any]) -> str:
    """Such as "97.5% of 80 answers right"."""
    right, total = (sum(cell[name] for cell in results["cells"]) for name in ("right", "total"))
    return f"{100 * right / total:.1f}% of {total:,} answers right" if total else "no results"


def _figure(results: Sequence[dict[str, Any]], titles: Sequence[str], title: str = "", axes=None):
    _require_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    lengths, depths = axes or _axes(results)
    width = min(max(0.62 * len(lengths) + 1.6, 4.2), 14.0)
    height = min(max(0.42 * len(depths) + 1.9, 3.2), 9.0)
    figure = Figure(figsize=(width * len(results) + 0.9, height + (0.4 if title else 0)), dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=12)
    colours = LinearSegmentedColormap.from_list("needle", COLOURS)
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for i, (panel, result) in enumerate(zip(panels, results, strict=True)):
        shares = _shares(result, lengths, depths)
        image = panel.imshow(shares, cmap=colours, vmin=0, vmax=100, aspect="auto")
        panel.set_title(f"{titles[i]}\n{accuracy_in_words(result)}", fontsize=10)
        panel.set_xticks(
            range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8
        )
        panel.set_yticks(range(len(depths)), [f"{100 * depth:.4g}" for depth in depths], fontsize=8)
        panel.set_xlabel("context length (tokens)")
        if i == 0:
            panel.set_ylabel("depth of the needle (% of the text)")
        if len(lengths) * len(depths) <= _ANNOTATED:
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    if share == share:
                        panel.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=list(panels), label="answers right (%)", fraction=0.06, pad=0.02)
    return figure


def _axes(results: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    cells = [cell for result in results for cell in result["cells"]]
    return sorted({cell["length"] for cell in cells}), sorted({cell["depth"] for cell in cells})


def _shares(result: dict[str, Any], lengths: list[int], depths: list[float]) -> list[list[float]]:
    """Right answers in percent, a row for each depth; not a number where nothing was tested."""
    found = {(cell["length"], cell["depth"]): 100 * cell["right"] / cell["total"] for cell in result["cells"]}
    return [[found.get((length, depth), float("nan")) for length in lengths] for depth in depths]


def save(figure, where, **options) -> None:
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(where, **options)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise _missing("matplotlib") from None


def _pillow():
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise _missing("pillow") from None
    return Image


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"pictures need {package}: pip install 'ds_minis[plots]' (the results are saved without it)"
    )
