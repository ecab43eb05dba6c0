"""On a client's PYTHONPATH. At its end, rank 0 writes what ds_minis says of the models that it converted.

They are held until then, as `mini_sequence_report` knows more after the last step than what was printed before the first.
Without a GPU it also lets the client's engine run at all: see `examples/sft/cpu.py`, named in `CLIENT_CPU_ENGINES`.
"""

import atexit
import functools
import importlib.abc
import importlib.util
import os
import sys


def _remember_models(module):
    """Has `ds_minis.convert.convert` remember its models."""
    own, models = module.convert, []

    def convert(model, *args, **kwargs):
        models.append(model)
        return own(model, *args, **kwargs)

    module.convert = convert
    atexit.register(_write, module, models)


def _write(module, models):
    if not models:  # a launcher, whose ranks write
        return
    reports = dict.fromkeys(str(module.mini_sequence_report(model)) for model in models)
    with open(os.environ["CLIENT_REPORT"], "w", encoding="utf-8") as file:
        file.write("\n".join(reports))


def _run_engines_on_cpu(module):
    """Has accelerate run FSDP and DeepSpeed where there is no GPU, in the place of plain data parallelism."""
    spec = importlib.util.spec_from_file_location("engines_on_cpu", os.environ["CLIENT_CPU_ENGINES"])
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        cpu.prepare_deepspeed([])
    init = module.Trainer.__init__

    @functools.wraps(init)
    def init_on_cpu(self, *args, **kwargs):
        settings = next(value for value in (*args, *kwargs.values()) if isinstance(value, module.TrainingArguments))
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            cpu.prepare_fsdp(settings)
        init(self, *args, **kwargs)
        print(f"CLIENT ENGINE {self.accelerator.distributed_type.value} {self.accelerator.num_processes}", flush=True)

    module.Trainer.__init__ = init_on_cpu


def _leave():
    """Ends a rank that did well before Python takes itself apart, where gloo's threads abort at times."""
    if getattr(sys, "last_value", None) is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after its import."""

    def __init__(self, after):
        self._after = after

    def find_spec(self, name, path=None, target=None):
        act = self._after.pop(name, None)
        spec = importlib.util.find_spec(name) if act else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            act(module)

        spec.loader.exec_module = exec_module
        return spec


_after = {}
if os.environ.get("CLIENT_REPORT") and os.environ.get("RANK", "0") == "0":
    _after["ds_minis.convert"] = _remember_models
if os.environ.get("CLIENT_CPU_ENGINES") and "RANK" in os.environ:
    _after["transformers.trainer"] = _run_engines_on_cpu
    atexit.register(_leave)  # the first one that is registered is the last one that is called
if _after:
    sys.meta_path.insert(0, _Finder(_after))
