"""`python -m ds_minis.run script.py ...`: runs a script with ds_minis attached to the engines.

For where the automatic registration is off (`DS_MINIS_AUTOLOAD=0`, `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, or ds_minis is on
the path and not installed): `accelerate launch -m ds_minis.run script.py`. Settings come from `DS_MINIS_CONFIG`, or from
the script's own engine configuration; without any, all defaults are used.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from ds_minis.config_sources import requested_by_environment
from ds_minis.environment import mark_run
from ds_minis.integrations.autoload import register


def main(argv: list[str] | None = None) -> None:
    """Runs the script or module that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_minis.run", description=__doc__, usage="%(prog)s [--debug] [-m] script ..."
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    parser.add_argument("--debug", action="store_true", help="show where an error of ds_minis comes from")
    parser.add_argument("script", help="a Python file, or a module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    args = parser.parse_args(argv)
    if not args.module and not os.path.isfile(args.script):
        parser.error(f"no such file: {args.script!r} (for a module put -m in front)")
    try:
        requested_by_environment()  # a wrong DS_MINIS_CONFIG is told here, before anything is imported
    except ValueError as error:
        if args.debug:
            raise
        parser.exit(1, f"python -m ds_minis.run: {error}\n")
    mark_run()
    register()
    sys.argv = [args.script, *args.arguments]
    if args.module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args.script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))
        runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
