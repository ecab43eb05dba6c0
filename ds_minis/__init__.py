"""Mini-sequence training for Hugging Face decoders: exact long-sequence training in less memory.

The package is imported by ``import torch`` itself (entry point group ``torch.backends``), so this file imports nothing
heavy: every public name is loaded when it is first used (PEP 562).
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    # configuration
    "MiniSequenceConfig": "ds_minis.config",
    # conversion
    "convert_to_mini_sequence": "ds_minis.convert",
    "revert_mini_sequence": "ds_minis.convert",
    "mini_sequence_report": "ds_minis.convert",
    "ConversionReport": "ds_minis.conversion.report",
    # data loaders
    "sampler_arguments": "ds_minis.replicas",
    # engines
    "register": "ds_minis.integrations.autoload",
    "MiniSequencePlugin": "ds_minis.integrations.accelerate",
    "MiniSequenceCallback": "ds_minis.integrations.transformers",
}

# Imported first: an engine attaches ds_minis while it is imported, which an integration in the middle of its own import is
# not ready for.
_ENGINES = {"MiniSequencePlugin": "accelerate", "MiniSequenceCallback": "transformers"}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        try:
            if name in _ENGINES:
                importlib.import_module(_ENGINES[name])
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in _ENGINES.values():
                raise ImportError(
                    f"ds_minis.{name} needs {missing}, which is not installed here: pip install {missing}"
                ) from None
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
