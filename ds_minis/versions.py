"""Whether the installed packages are at least those that ds_minis was tested with."""

from __future__ import annotations

import functools
import logging
from importlib import metadata

from ds_minis.ranks import is_main_process

logger = logging.getLogger("ds_minis")
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl")


def older_than_tested() -> list[str]:
    """The installed packages that are older than ds_minis's own metadata asks for, in words.

    Empty where that metadata is absent (a source tree on PYTHONPATH).
    """
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in metadata.requires("ds_minis") or ()]
    except (metadata.PackageNotFoundError, ImportError):
        return []
    found = {}
    for requirement in requirements:
        if requirement.name not in PACKAGES:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found[requirement.name] = f"{requirement.name} {version} (tested: {requirement.specifier})"
    return list(found.values())


@functools.cache
def warn_of_old_versions() -> None:
    """Once, on rank 0; a warning and no error, as an older version may well do."""
    old = older_than_tested() if is_main_process() else []
    if old:
        logger.warning(
            "ds_minis was not tested with versions this old: %s. Results may differ from the unconverted model's, or the "
            "conversion may fail: upgrade them (pip install -U %s)",
            ", ".join(old),
            " ".join(words.split()[0] for words in old),
        )
