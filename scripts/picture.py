"""Draws docs/images/step.svg: memory of a training step, plain and with ds_minis, and where a layer is cut into chunks.

python scripts/picture.py            # rewrites the picture from benchmarks/transient_memory.json
python scripts/picture.py --check    # fails if it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "step.svg"
FIGURES = ROOT / "benchmarks" / "transient_memory.json"
BARS = {  # variant: what it is called, colour
    "plain": ("activation checkpointing", "#b8c0cc"),
    "mlp": ("MLP in chunks (the paper)", "#7fb3e6"),
    "layer": ("ds_minis, the default", "#1f6fb5"),
    "layer-groups": ("ds_minis, head_groups", "#134a7c"),
}
WIDTH, HEIGHT, NUM_CHUNKS = 860, 330, 6
STAGES = (  # of a decoder layer, from its input: name, in chunks?, what exists there
    ("norm, q, k, v projections", True, "one chunk's norm and projections"),
    ("attention", False, "one call, all tokens"),
    ("output projection, norm, MLP", True, "one chunk's 3.5 x hidden"),
    ("LM head, cross entropy", True, "one chunk's logits"),
)


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="#222"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'


def bars(variants: dict[str, dict], x: float, y: float, width: float) -> list[str]:
    values = {key: variants[key]["W_KiB_per_token"] for key in BARS}
    per_unit, parts = width / max(values.values()), []
    for row, (key, (name, colour)) in enumerate(BARS.items()):
        top = y + 58 * row
        parts += [text(x, top, name), box(x, top + 7, values[key] * per_unit, 20, colour)]
        inside = values[key] * per_unit > 0.8 * width
        at = x + values[key] * per_unit + (-6 if inside else 6)
        parts.append(text(at, top + 22, f"{values[key]:.1f} KiB a token", 12, "end" if inside else "start"))
    return parts


def layer(x: float, y: float, width: float) -> list[str]:
    parts, cell = [], width / NUM_CHUNKS
    for row, (name, in_chunks, what) in enumerate(STAGES):
        top = y + 58 * row
        parts.append(text(x, top, name))
        parts.append(text(x + width, top, what, 11, "end"))
        if in_chunks:
            for chunk in range(NUM_CHUNKS):
                now = chunk == 2
                parts.append(
                    box(x + chunk * cell + 1, top + 7, cell - 2, 20, "#1f6fb5" if now else "#e4ecf5", "#1f6fb5")
                )
        else:
            parts.append(box(x + 1, top + 7, width - 2, 20, "#1f6fb5"))
    return parts


def picture() -> str:
    content = json.loads(FIGURES.read_text(encoding="utf-8"))
    variants, arguments = content["results"]["llama-3-8b"]["variants"], content["arguments"]
    parts = [
        box(0, 0, WIDTH, HEIGHT, "#ffffff"),
        text(20, 28, "Memory of a training step of Llama-3-8B", 15, weight="bold"),
        text(20, 46, "beside weights, gradients and layer inputs; simulated, bfloat16", 11),
        *bars(variants, 20, 78, 370),
        text(20, HEIGHT - 14, f"{arguments['seq']:,} tokens; python scripts/bench/transient_memory.py", 11),
        text(470, 28, "What exists at once, along the sequence", 15, weight="bold"),
        text(470, 46, "dark: in memory now", 11),
        *layer(470, 78, 370),
        text(470, HEIGHT - 14, "tokens, first to last", 11),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">'
    )
    return "\n".join(["<!-- made by scripts/picture.py -->", head, *parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture():
            sys.exit(f"{PICTURE} is out of date; run python scripts/picture.py")
        return
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
