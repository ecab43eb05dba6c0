"""Warnings that are given once per model."""

from __future__ import annotations

import logging

from ds_minis.ranks import is_main_process

logger = logging.getLogger("ds_minis")


class Warnings:
    """The warnings of one model: each is given once, on the main process. Another model has its own, and so has a copy."""

    def __init__(self):
        self._given: set[str] = set()

    def __reduce__(self):
        return Warnings, ()

    def once(self, text: str) -> None:
        """Gives a warning, unless it is empty or the same text was given before: one with changing numbers needs a flag."""
        if text and text not in self._given and is_main_process():
            logger.warning("ds_minis: %s", text)
        self._given.add(text)
