"""`ds-minis bench NAME ...`: runs one of the benchmarks of the repository; without a name, lists them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ds_minis.cli.wrong_argument import WRONG

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "bench"
NAMES = (
    *("max_context", "transient_memory", "peak_memory", "step_time", "loss_head", "overhead"),
    *("verification", "sequence_parallel", "report"),
)
EXAMPLES = """examples:
  ds-minis bench                                        # the list, with what each measures
  ds-minis bench max_context --simulate                 # the longest sequence, no GPU needed
  ds-minis bench step_time --rounds 3 --seconds 120
  ds-minis bench max_context --help                     # a benchmark's own options

exit status: the benchmark's; 64 a wrong argument"""


def add_bench(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser(
        "bench",
        help="run a benchmark of the repository",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.wrong = WRONG
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's own")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    if not FOLDER.is_dir():
        print(
            "ds-minis bench: the benchmarks are in the repository, not in the installed package: clone it, and run this "
            "there after `pip install -e .`",
            file=sys.stderr,
        )
        return WRONG
    if args.name is None:
        print("\n".join(f"{name:20} {first_line(name)}" for name in NAMES))
        return 0
    if args.name not in NAMES:
        print(f"ds-minis bench: one of {', '.join(NAMES)} is allowed, got {args.name!r}", file=sys.stderr)
        return WRONG
    return subprocess.run([sys.executable, str(FOLDER / f"{args.name}.py"), *args.arguments]).returncode


def first_line(name: str) -> str:
    """What a benchmark says of itself."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return text.removeprefix('"""').partition("\n")[0].strip('"')
