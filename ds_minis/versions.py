"""How old the installed packages are: older than what works, or only than what is tested on each change."""

from __future__ import annotations

import functools
import logging
from importlib import metadata

from ds_minis.ranks import is_main_process

logger = logging.getLogger("ds_minis")
TESTED = {  # by CI, as constraints.txt has them
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "trl": "1.16.0",
}


def too_old() -> list[str]:
    """The installed packages that are older than ds_minis's own metadata requires, in words.

    Empty where that metadata is absent (a source tree on PYTHONPATH). What an extra of ds_minis asks for does not count, as
    somebody else's program may have brought it.
    """
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in metadata.requires("ds_minis") or ()]
    except (metadata.PackageNotFoundError, ImportError):
        return []
    return [
        f"{requirement.name} {version} (needed: {requirement.specifier})"
        for requirement in requirements
        if requirement.marker is None
        and (version := _installed(requirement.name))
        and not requirement.specifier.contains(version, prereleases=True)
    ]


def older_than_tested() -> list[str]:
    """The installed packages that are older than those that CI tests, in words."""
    try:
        from packaging.version import Version
    except ImportError:
        return []
    return [
        f"{name} {version} (CI: {tested})"
        for name, tested in TESTED.items()
        if (version := _installed(name)) and Version(version) < Version(tested)
    ]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def warn_of_old_versions() -> None:
    """Once, on rank 0: a warning of what is too old; else one line about what CI does not test."""
    if not is_main_process():
        return
    if too_old():
        logger.warning(
            "ds_minis: not known to work with versions this old: %s. Results may differ from the unconverted model's, or "
            "the conversion may fail",
            ", ".join(too_old()),
        )
    elif older_than_tested():
        logger.warning(
            "ds_minis: older than what its CI tests, see docs/versions.md: %s", ", ".join(older_than_tested())
        )
