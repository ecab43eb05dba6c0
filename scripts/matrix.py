"""What the scripts share that train every engine in every way: arguments, runs that can be resumed, the table of a page."""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PACKAGES = "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes"
NOT_RUN = "not run"


def make_parser(description: str, rows: Sequence[str], columns: Sequence[str], page: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("row", rows), ("column", columns)):
        parser.add_argument(
            f"--{name}s", nargs="+", choices=values, default=values, metavar=name.upper(), help=f"of {list(values)}"
        )
    parser.add_argument("--write", action="store_true", help=f"write {page.relative_to(ROOT)}")
    parser.add_argument(
        "--resume",
        type=Path,
        help="a JSON file: keeps each row that is done, and skips what it has of today and of these versions",
    )
    return parser


def run(args: argparse.Namespace, make_case: Callable[[str, str], Any]) -> dict[str, dict]:
    """Runs the cells that are not yet in the file to resume; gives all that are known: row -> cells, versions, seconds."""
    from engines import run_cases
    from parity import judge

    known = json.loads(args.resume.read_text(encoding="utf-8")) if args.resume and args.resume.exists() else {}
    done = {row: found for row, found in known.items() if found["versions"] == versions()}
    for row in args.rows:
        found = done.setdefault(row, {"cells": {}, "versions": versions(), "seconds": 0.0})
        cases = {column: make_case(row, column) for column in args.columns if column not in found["cells"]}
        if not cases:
            continue
        start = time.monotonic()
        results = run_cases(list(cases.values()))
        for column, case in cases.items():
            judgement = judge(case, results[case.name])
            print(f"{row} | {column} | {judgement.kind} {judgement.text}", file=sys.stderr, flush=True)
            found["cells"][column] = dataclasses.asdict(judgement)
        found["seconds"] += time.monotonic() - start
        if args.resume:
            args.resume.write_text(json.dumps(done, indent=2), encoding="utf-8")
    return done


def as_page(head: str, done: dict[str, dict], rows: Sequence[str], columns: Sequence[str]) -> str:
    """A page of Markdown: its head, the table, the reasons, what it was made with. A cell that is not known was not run."""
    notes: list[str] = []
    counts = dict.fromkeys(("exact", "refused", "FAILED", NOT_RUN), 0)

    def text(row: str, column: str) -> str:
        cell = done.get(row, {"cells": {}})["cells"].get(column, {"kind": NOT_RUN, "text": ""})
        counts[cell["kind"]] += 1
        if cell["kind"] in ("exact", NOT_RUN):
            return f"{cell['kind']} {cell['text']}".strip()
        if cell["text"] not in notes:
            notes.append(cell["text"])
        return f"{cell['kind']} [{notes.index(cell['text']) + 1}]"

    table = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    table += [f"| {row} | {' | '.join(text(row, column) for column in columns)} |" for row in rows]
    numbered = [f"[{i}] {' '.join(note.split())}\n" for i, note in enumerate(notes, 1)]
    minutes = sum(found["seconds"] for row, found in done.items() if row in rows) / 60
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return "\n".join([head, *table, "", *numbered, f"{summary}, in {minutes:.0f} minutes. {versions()}."]) + "\n"


def finish(page: str, path: Path, write: bool, done: dict[str, dict], rows: Sequence[str]) -> int:
    """Prints and writes the page; the exit status, 1 if a cell failed."""
    print(page)
    if write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
    kinds = [cell["kind"] for row in rows for cell in done.get(row, {"cells": {}})["cells"].values()]
    failed = kinds.count("FAILED")
    if failed:
        print(f"{failed} of {len(kinds)} cells FAILED", file=sys.stderr)
    return int(failed > 0)


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
