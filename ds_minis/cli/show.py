"""Prints a command's answer: tables by rich where standard output is a terminal and rich is there, else plain text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A part of an answer.

    Attributes:
        heads: of the columns; empty for none.
        rows: cells.
        plain: its lines where it is no table.
        title: printed above, on a terminal.
        numbers: the columns from this one on are aligned to the right; None: none is.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    plain: Sequence[str]
    title: str = ""
    numbers: int | None = None


Part = str | Table


def as_lines(parts: Sequence[Part]) -> str:
    """Plain text, which pipes and files get."""
    return "\n".join(part if isinstance(part, str) else "\n".join(part.plain) for part in parts)


def show(parts: Sequence[Part], console: Any = None) -> None:
    """Prints the parts.

    Args:
        console: rich's; None: one for standard output, if that is a terminal.
    """
    console = console or _console()
    if console is None:
        print(as_lines(parts))
        return
    for part in parts:
        text = part if isinstance(part, str) else part.title
        if text or isinstance(part, str):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if isinstance(part, Table) and part.rows:
            console.print(_drawn(part))


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Says on a terminal that a command is at work, until it is done."""
    console = _console(on_stderr=True)
    with console.status(what) if console else contextlib.nullcontext():
        yield


def _console(on_stderr: bool = False) -> Any:
    """rich's console for a terminal; None where it is none, or rich is missing."""
    stream = sys.stderr if on_stderr else sys.stdout
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:  # it comes with transformers 5
        return None
    return Console(stderr=on_stderr)


def _drawn(table: Table) -> Any:
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=box.SIMPLE_HEAD, show_header=bool(table.heads), pad_edge=False)
    width = max(map(len, [table.heads, *table.rows]), default=0)
    for i in range(width):
        right = table.numbers is not None and i >= table.numbers
        drawn.add_column(Text(table.heads[i] if table.heads else ""), justify="right" if right else "left")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn
