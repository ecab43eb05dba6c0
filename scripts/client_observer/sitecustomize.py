"""On a client's PYTHONPATH: at its end, rank 0 writes what ds_minis says of the models that it converted.

They are held until then, as `mini_sequence_report` knows more after the last step than what was printed before the first.
"""

import atexit
import importlib.abc
import importlib.util
import os
import sys

_MODULE = "ds_minis.convert"


class _Finder(importlib.abc.MetaPathFinder):
    """Has the module's `convert` remember its models."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            own, models = module.convert, []

            def convert(model, *args, **kwargs):
                models.append(model)
                return own(model, *args, **kwargs)

            module.convert = convert
            atexit.register(_write, module, models)

        spec.loader.exec_module = exec_module
        return spec


def _write(module, models):
    if not models:  # a launcher, whose ranks write
        return
    reports = dict.fromkeys(str(module.mini_sequence_report(model)) for model in models)
    with open(os.environ["CLIENT_REPORT"], "w", encoding="utf-8") as file:
        file.write("\n".join(reports))


if os.environ.get("CLIENT_REPORT") and os.environ.get("RANK", "0") == "0":
    sys.meta_path.insert(0, _Finder())
