"""Attaches ds_minis to the engines when they are imported, whoever imports them.

`import torch` calls `autoload` (entry point group `torch.backends`), which only puts a finder in front of
`sys.meta_path`; an engine that is never imported costs nothing and is never imported from here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

from ds_minis.environment import autoload_enabled, config_text, mark_told, process_rank, wrong_variables

# module of an engine -> the function that attaches ds_minis to it, called with that module right after its import
ATTACH = {
    "deepspeed": "ds_minis.integrations.deepspeed:attach_initialize",
    "deepspeed.ops.op_builder.all_ops": "ds_minis.integrations.deepspeed:attach_op_builder",
    "deepspeed.runtime.zero.parameter_offload": "ds_minis.integrations.deepspeed:attach_zero3",
    "accelerate.utils.deepspeed": "ds_minis.integrations.deepspeed:attach_config_check",
    "accelerate.commands.config.config_args": "ds_minis.integrations.accelerate:attach_config_file",
    "accelerate.accelerator": "ds_minis.integrations.accelerate:attach_accelerator",
    "transformers.trainer": "ds_minis.integrations.transformers:attach_trainer",
}


def autoload() -> None:
    """What `import torch` calls. Never raises; `DS_MINIS_AUTOLOAD=0` turns it off."""
    try:
        tell_wrong_variables()
        if autoload_enabled():
            register()
            if config_text()[0]:
                importlib.import_module("ds_minis.unread_settings").watch()
    except Exception as error:  # `import torch` must work whatever happens here
        warnings.warn(f"ds_minis could not attach itself to the training engines: {error!r}", stacklevel=2)


def tell_wrong_variables() -> None:
    """One line for each misspelt variable, which would change nothing without a word; once for a launcher and its ranks."""
    lines = wrong_variables()
    for line in lines if process_rank() == 0 else ():
        print(f"ds_minis: {line}", file=sys.stderr)
    if lines:
        mark_told()


def register() -> None:
    """Attaches ds_minis to DeepSpeed, accelerate and transformers: those imported already, and those yet to come.

    Needed only where the automatic entry point is off (`DS_MINIS_AUTOLOAD=0`). Calling it again changes nothing. Call it
    before `from deepspeed import initialize`, as a name that was imported before cannot be exchanged.
    """
    if not any(isinstance(finder, AttachingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AttachingFinder())
    for name in ATTACH:
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "_initializing", False):
            module.__spec__.__class__ = _WatchedSpec
        elif module is not None:
            _attach(module)


class AttachingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: has the modules of `ATTACH` found by the others, and attaches after their import."""

    def __init__(self):
        self._in_search: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in ATTACH or name in self._in_search:  # another finder may ask all finders, this one too
            return None
        self._in_search.add(name)
        try:
            return self._found_by_others(name, path, target)
        finally:
            self._in_search.discard(name)

    def _found_by_others(self, name, path, target):
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = AttachingLoader(spec.loader)
                return spec
        return None


class AttachingLoader(importlib.abc.Loader):
    """Stands in for a module's loader during its import, and is gone afterwards."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        module.__dict__.pop("_ds_minis_attached", None)  # after importlib.reload
        self._loader.exec_module(module)
        _attach(module)


class _WatchedSpec(importlib.machinery.ModuleSpec):
    """Spec of a module whose import began before the finder was there: `import deepspeed` is what imports torch, say.

    The import system clears `_initializing` when such an import ends.
    """

    @property
    def _initializing(self) -> bool:
        return self.__dict__["_initializing"]

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = importlib.machinery.ModuleSpec
            if self.name in sys.modules:  # it is not, when the import failed
                _attach(sys.modules[self.name])


def _attach(module) -> None:
    """Attaches to one module, once. A failure is reported and leaves the engine as it is."""
    if module.__dict__.get("_ds_minis_attached"):
        return
    module._ds_minis_attached = True
    place, _, function = ATTACH[module.__name__].partition(":")
    try:
        getattr(importlib.import_module(place), function)(module)
    except Exception as error:
        version = getattr(sys.modules.get(module.__name__.partition(".")[0]), "__version__", "of unknown version")
        warnings.warn(
            f"ds_minis could not attach itself to {module.__name__} ({version}): {error!r}. Mini-sequences cannot be "
            "turned on from that engine's configuration; convert_to_mini_sequence(model) still works",
            stacklevel=2,
        )
        with contextlib.suppress(Exception):  # the engine's import goes on
            importlib.import_module("ds_minis.versions").warn_of_old_versions()
