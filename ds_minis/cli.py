"""`ds-minis`: what ds_minis can do without a training script. `ds-minis check MODEL` is the first of its commands."""

from __future__ import annotations

import argparse
import sys

from ds_minis.check import add_check


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status (0: all is well, 1: it is not, 2: a wrong argument)."""
    parser = argparse.ArgumentParser(prog="ds-minis", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    add_check(commands)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
