"""Errors of others, for notes and messages of one line. Standard library only: the command imports torch late."""

from __future__ import annotations


def in_short(error: BaseException) -> str:
    """Class and text of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
