"""`ds-minis`: what ds_minis can do without a training script. `ds-minis COMMAND --help` has examples of each."""

from __future__ import annotations

import argparse
import sys

from ds_minis import __version__
from ds_minis.cli.bench import add_bench
from ds_minis.cli.check import add_check
from ds_minis.cli.config import add_config
from ds_minis.cli.env import add_env
from ds_minis.cli.needle import add_needle, add_needle_plot
from ds_minis.cli.parser import Parser
from ds_minis.cli.plan import add_plan

FAILED, INTERRUPTED = 3, 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0: all is well, 1: it is not, 2: a wrong argument, 3: the command itself failed (one line; `--debug` shows where).
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"ds-minis {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        print(f"ds-minis {args.command}: {in_one_line(error)} (--debug shows where)", file=sys.stderr)
        return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="ds-minis", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ds-minis {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", metavar="command", dest="command", required=True)
    add = add_plan, add_check, add_env, add_config, add_bench, add_needle, add_needle_plot
    for command in (one(commands) for one in add):
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def in_one_line(error: BaseException) -> str:
    """An error as one line, with its notes."""
    return " ".join(": ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]).split())
