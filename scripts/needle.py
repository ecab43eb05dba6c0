"""`ds-minis needle` as a script, for launchers that start one.

torchrun --nproc_per_node 8 scripts/needle.py MODEL --max-context-length 1048576 ...      `--help` lists the flags
"""

import sys

from ds_minis.cli import main

if __name__ == "__main__":
    sys.exit(main(["needle", *sys.argv[1:]]))
