"""Warnings that are given once per model."""

from __future__ import annotations

import logging

from ds_minis.ranks import is_main_process

logger = logging.getLogger("ds_minis")


class Warnings:
    """The warnings of one model: each is given once, on the main process. Another model has its own."""

    def __init__(self):
        self._given: set[str] = set()

    def once(self, text: str) -> None:
        if text not in self._given and is_main_process():
            logger.warning("%s", text)
        self._given.add(text)
