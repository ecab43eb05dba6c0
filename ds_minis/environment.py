"""The only place that touches environment variables. Light, as `import torch` imports it.

DS_MINIS_AUTOLOAD   "0", "false" or "off": `import torch` attaches nothing
DS_MINIS_CONFIG     settings, as JSON (a launcher hands them to its ranks in it); DS_MINIS_CONFIG_SOURCE where they came from
DS_MINIS_RUN        set where `python -m ds_minis.run` started this process
DS_MINIS_TOLD       set where a variable with a misspelt name was told of, for the processes that this one starts
TORCH_DEVICE_BACKEND_AUTOLOAD  torch's: "0" and it calls no entry point
DEEPSPEED_TIMEOUT   DeepSpeed's, minutes for its process groups
XDG_CACHE_HOME      where caches of programs are; ~/.cache if it is not set
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE  the launcher's
"""

from __future__ import annotations

import os

CONFIG = "DS_MINIS_CONFIG"
_AUTOLOAD, _CONFIG_SOURCE, _RUN, _TOLD = "DS_MINIS_AUTOLOAD", "DS_MINIS_CONFIG_SOURCE", "DS_MINIS_RUN", "DS_MINIS_TOLD"
_ON, _OFF = ("", "1", "true", "on"), ("0", "false", "off")


def autoload_enabled() -> bool:
    """Whether `import torch` may attach ds_minis to the engines: `DS_MINIS_AUTOLOAD` is not "0", "false" or "off"."""
    return os.environ.get(_AUTOLOAD, "1").lower() not in _OFF


def wrong_variables() -> list[str]:
    """Variables that are meant for ds_minis and that nothing here reads, and values that mean nothing: a line each."""
    if _TOLD in os.environ:
        return []
    known = (CONFIG, _AUTOLOAD, _CONFIG_SOURCE, _RUN)
    lines = [
        f"{name}={value}: no variable has this name; did you mean {_nearest(name, known)}?"
        for name, value in os.environ.items()
        if name.upper().startswith("DS") and "MINI" in name.upper() and name not in known and _nearest(name, known)
    ]
    if os.environ.get(_AUTOLOAD, "").lower() not in _ON + _OFF:
        allowed = ", ".join(filter(None, _OFF + _ON))
        lines.append(f"{_AUTOLOAD}={os.environ[_AUTOLOAD]}: one of {allowed} is allowed; taken for 1")
    return lines


def _nearest(name: str, known: tuple[str, ...]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(name.upper(), known[:2], n=1, cutoff=0.8)), "")


def mark_told() -> None:
    """Notes that `wrong_variables` were told, so that no process that this one starts tells them again."""
    os.environ[_TOLD] = "1"


def process_rank() -> int:
    """This process's rank as its launcher set it (`RANK`), 0 when there was none."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def local_rank() -> int:
    """This process's number on its machine as its launcher set it (`LOCAL_RANK`), 0 when there was none."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return int(rank) if rank.isdigit() else 0


def local_world_size() -> int:
    """How many processes its launcher started on this machine (`LOCAL_WORLD_SIZE`), 1 when there was none."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def world_size() -> int | None:
    """How many processes its launcher started on all machines (`WORLD_SIZE`), None when there was none."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else None


def config_text() -> tuple[str, str]:
    """The settings in `DS_MINIS_CONFIG` (an empty string if there are none), and where they came from."""
    return os.environ.get(CONFIG, ""), os.environ.get(_CONFIG_SOURCE) or f"environment variable {CONFIG}"


def set_config_text(text: str, source: str) -> None:
    """Hands settings to the processes that this one starts."""
    os.environ[CONFIG], os.environ[_CONFIG_SOURCE] = text, source


def forget_config_text() -> None:
    """Takes out what `set_config_text` put in; what the user set stays."""
    if os.environ.pop(_CONFIG_SOURCE, None) is not None:
        os.environ.pop(CONFIG, None)


def started_by_run() -> bool:
    """Whether `python -m ds_minis.run` started this process (or one that it comes from)."""
    return _RUN in os.environ


def mark_run() -> None:
    """Notes that `python -m ds_minis.run` started this process."""
    os.environ[_RUN] = "1"


def cache_home() -> str:
    """The user's folder for caches (`XDG_CACHE_HOME`)."""
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def torch_autoload_enabled() -> bool:
    """Whether torch calls entry points at its import (`TORCH_DEVICE_BACKEND_AUTOLOAD` is not "0")."""
    return os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0"


def deepspeed_timeout() -> str:
    """Minutes until DeepSpeed's process groups give up (`DEEPSPEED_TIMEOUT`), an empty string for its default."""
    return os.environ.get("DEEPSPEED_TIMEOUT", "")
