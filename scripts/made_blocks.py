"""Blocks of pages that a script makes, between `<!-- NAME: made by ... -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path


def with_block(text: str, name: str, body: str) -> str:
    """The page's text with this body in the block."""
    block = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + body + found[2], text)


def make_block(page: Path, name: str, body: Callable[[], str], description: str | None) -> None:
    """The command line of a script that makes one block: writes it, or with `--check` ends with 1 where it is another."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if it is out of date")
    check = parser.parse_args().check
    old = page.read_text(encoding="utf-8")
    new = with_block(old, name, body())
    if check and new != old:
        sys.exit(f'{page}: the block "{name}" is out of date; run python {sys.argv[0]}')
    if not check:
        page.write_text(new, encoding="utf-8")
