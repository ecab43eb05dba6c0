"""The sources through which settings come: an engine's configuration, the environment, code. They must agree."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_minis import environment
from ds_minis.config import MiniSequenceConfig

SECTION = "mini_sequence"
BY_RUN = "python -m ds_minis.run"


@dataclass(frozen=True)
class Request:
    """Settings, and the source through which they came (a file, a variable, a function), for messages."""

    config: MiniSequenceConfig
    source: str


def read_section(mapping: Mapping[str, Any], source: str) -> Request | None:
    """What an engine's configuration asks for under `"mini_sequence"`; None if it has no such section.

    Raises:
        ValueError: the section is wrong, a key beside it looks like a misspelling of its name, or it stands inside of
            another section.
    """
    allowed = f"true, false or a mapping of {', '.join(MiniSequenceConfig().to_dict())}"
    for key, value in mapping.items():
        if key != SECTION and _looks_like_the_section(key):
            raise ValueError(
                f'{source}: unknown key {key!r} (value {value!r}); did you mean "{SECTION}"? Allowed there: {allowed}'
            )
        inside = next(filter(_looks_like_the_section, value), None) if isinstance(value, Mapping) else None
        if key != SECTION and inside is not None:
            raise ValueError(
                f"{source}: {inside!r} (value {value[inside]!r}) stands inside of {key!r}, where nobody reads it: move it to "
                f'the top level, as "{SECTION}". Allowed there: {allowed}'
            )
    if SECTION not in mapping:
        return None
    return Request(MiniSequenceConfig.from_value(mapping[SECTION], source=f'{source}, "{SECTION}"'), source)


def _looks_like_the_section(key: Any) -> bool:
    return bool(difflib.get_close_matches(str(key).lower(), [SECTION], cutoff=0.7))


def reconcile(*requests: Request | None) -> Request | None:
    """The one thing that all sources ask for (the first of equal requests); None if none asks for anything.

    Raises:
        ValueError: two of them disagree.
    """
    given = [request for request in requests if request is not None]
    for request in given[1:]:
        if request.config != given[0].config:
            one, other = given[0].config.to_dict(), request.config.to_dict()
            ours, theirs = ({k: v for k, v in d.items() if one[k] != other[k]} for d in (one, other))
            raise ValueError(
                f"two places ask for different mini-sequence settings:\n  {given[0].source}: {ours}\n"
                f"  {request.source}: {theirs}\nGive the same settings in both, or in one of them only "
                "(on a model that is converted already: after revert_mini_sequence)"
            )
    return given[0] if given else None


def requested_by_environment(*others: Request | None) -> Request | None:
    """What the environment asks for: `DS_MINIS_CONFIG` (`true`, `false` or a JSON mapping).

    Without it, a script started by `python -m ds_minis.run` asks for all defaults, unless one of the `others` asks for
    something.

    Raises:
        ValueError: the variable is not JSON, or its settings are wrong.
    """
    text, source = environment.config_text()
    if not text:
        by_run = environment.started_by_run() and not any(others)
        return Request(MiniSequenceConfig(), BY_RUN) if by_run else None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}: true, false or a JSON mapping of settings is allowed, got {text!r} ({error})"
        ) from None
    return Request(MiniSequenceConfig.from_value(value, source=source), source)


def hand_to_ranks(request: Request | None) -> None:
    """Puts a launcher's request into the environment, which its ranks inherit; None takes an earlier one out again.

    Raises:
        ValueError: `DS_MINIS_CONFIG` was set by the user, to something else.
    """
    environment.forget_config_text()
    by_user = requested_by_environment(request)
    reconcile(by_user, request)
    if by_user is None and request is not None:
        text = json.dumps(request.config.to_dict(), separators=(",", ":"))
        for forbidden in " ;<>":  # accelerate passes no variable with these to other machines
            text = text.replace(forbidden, f"\\u{ord(forbidden):04x}")
        environment.set_config_text(text, request.source)
