"""What the user wrote is wrong; and the settings that `--set KEY=VALUE` gives. Standard library only."""

from __future__ import annotations

import json
from typing import Any

from ds_minis.config import MiniSequenceConfig

WRONG = 64  # exit status of a wrong argument, where 2 is an answer
PICTURES = (".png", ".jpg", ".pdf", ".svg")  # kinds that matplotlib writes


class WrongArgument(ValueError):
    """What the user named is not there or not allowed; the message says what is."""


def settings_of_pairs(pairs: list[str]) -> dict[str, Any]:
    """The settings that `--set KEY=VALUE` gives; a value is JSON, or else a word.

    Raises:
        WrongArgument: see `MiniSequenceConfig`.
    """
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise WrongArgument(f"--set: KEY=VALUE is allowed, such as scope=tokens, got {pair!r}")
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    try:
        MiniSequenceConfig.from_value(settings, source="--set")
    except ValueError as error:
        raise WrongArgument(str(error)) from None
    return settings
