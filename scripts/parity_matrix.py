"""Trains every engine with every way to train, converted and unconverted, and prints what came of it as a table.

    python scripts/parity_matrix.py                                  # all cells: real engines in 2 processes, on the CPU
    python scripts/parity_matrix.py --rows ZeRO-3 --columns full bf16
    python scripts/parity_matrix.py --write                          # and docs/parity_matrix.md with it
    python scripts/parity_matrix.py --write --resume matrix.json     # goes on after the rows that the file has

Its exit status is 0 when every cell is exact, or refused by the engine for the unconverted model too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "parity_matrix.md"
PACKAGES = "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes"
EXPLANATION = """\
Rows are engines, columns are ways to train. In every cell a small Llama is trained for 4 steps with SGD, converted and
unconverted, from the same weights and on the same data: in 2 processes over gloo (the first row: in one), with other
sequence lengths and other numbers of chunks on each rank, prompts masked, one sequence padded.

- **exact**: the parameters after these steps are the unconverted model's under the same engine, *and* those of one process
  without an engine on the data of both ranks. The figure is the largest difference in a tensor, relative to its largest
  entry; allowed is 1e-5.
- bf16: the difference from the unconverted bf16 run (allowed: 2e-2, since bf16 rounds to 4e-3 and chunks round in another
  order) and, in brackets, how far from float32 the converted run is, of the unconverted one's distance (allowed: 1.1x).
- dropout: chunks draw other random numbers, so {seeds} runs of each kind are compared: the distance of the mean parameters
  beside that of the same runs divided by lot, and the difference of the runs' spread, in standard errors (allowed:
  {errors:.0f}). `tests/engines/test_matrix.py` shows that this finds dropout left out, applied twice or scaled wrongly, and
  another mask in backward than in forward.
- **refused**: the engine refuses the unconverted model too, with the same words.

Columns: uneven lengths are 5 tokens on one rank and 100 on the other; QLoRA is 4-bit NF4 with double quantization; gradients
are clipped to a sixth of their norm; dropout is in the MLPs; checkpointing is on and non-reentrant but where the column says
otherwise; "two forwards" come before one backward; a loss that reads the head's weight computes its logits from hidden states
as TRL and Liger do, without calling the head. The engines are torch's and DeepSpeed's own, with a decoder layer as the unit
of FSDP.
"""


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from parity import COLUMNS, ROWS, judge
    from parity import cell as make_case

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of {list(ROWS)}"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=list(COLUMNS),
        default=list(COLUMNS),
        metavar="COLUMN",
        help=f"of {list(COLUMNS)}",
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/parity_matrix.md; only with all rows and columns"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        help="a JSON file: keeps each row that is done, and skips what it has of today and of these versions",
    )
    args = parser.parse_args()
    if args.write and (args.rows != list(ROWS) or args.columns != list(COLUMNS)):
        parser.error("--write is for the whole matrix: leave --rows and --columns out")

    from engines import run_cases
    from parity import Judgement

    done = json.loads(args.resume.read_text(encoding="utf-8")) if args.resume and args.resume.exists() else {}
    for row in args.rows:
        earlier = done.get(row, {"cells": {}, "versions": None})
        if set(args.columns) <= set(earlier["cells"]) and earlier["versions"] == versions():
            continue
        start = time.monotonic()
        cases = {column: make_case(row, column) for column in args.columns}
        results = run_cases(list(cases.values()))
        cells = {column: dataclasses.asdict(judge(case, results[case.name])) for column, case in cases.items()}
        for column, judgement in cells.items():
            print(f"{row} | {column} | {judgement['kind']} {judgement['text']}", file=sys.stderr, flush=True)
        done[row] = {"cells": cells, "versions": versions(), "seconds": time.monotonic() - start}
        if args.resume:
            args.resume.write_text(json.dumps(done, indent=2), encoding="utf-8")
    judgements = {
        (row, column): Judgement(**done[row]["cells"][column]) for row in args.rows for column in args.columns
    }
    page = as_page(judgements, args.rows, args.columns, sum(done[row]["seconds"] for row in args.rows))
    print(page)
    if args.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
    failed = sum(judgement.kind == "FAILED" for judgement in judgements.values())
    if failed:
        print(f"{failed} of {len(judgements)} cells FAILED", file=sys.stderr)
    return int(failed > 0)


def as_page(judgements: dict, rows: list[str], columns: list[str], seconds: float) -> str:
    from parity import MAX_STANDARD_ERRORS, SEEDS

    notes: list[str] = []

    def text(judgement) -> str:
        if judgement.kind == "exact":
            return f"exact {judgement.text}"
        if judgement.text not in notes:
            notes.append(judgement.text)
        return f"{judgement.kind} [{notes.index(judgement.text) + 1}]"

    table = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    table += [f"| {row} | {' | '.join(text(judgements[row, column]) for column in columns)} |" for row in rows]
    numbered = [f"[{i}] {' '.join(note.split())}\n" for i, note in enumerate(notes, 1)]
    counts = {kind: sum(j.kind == kind for j in judgements.values()) for kind in ("exact", "refused", "FAILED")}
    lines = [
        "# Every engine, every way to train",
        "",
        "<!-- made by scripts/parity_matrix.py --write -->",
        "",
        EXPLANATION.format(seeds=SEEDS, errors=MAX_STANDARD_ERRORS),
        *table,
        "",
        *numbered,
        ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        + f", in {seconds / 60:.0f} minutes. {versions()}.",
    ]
    return "\n".join(lines) + "\n"


def versions() -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    python = f"Python {platform.python_version()}"
    return f"{python}, {packages}; {datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()})"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
