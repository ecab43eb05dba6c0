"""Settings in the environment that nobody read: one line when a process that trained ends.

Only accelerate and DeepSpeed read `DS_MINIS_CONFIG`; a training loop of one's own does not, and trains as ever. Launchers,
`ds_report` and workers that load data have the variable too, and train nothing: they say nothing.
"""

from __future__ import annotations

import atexit
import gc
import sys

from ds_minis import environment
from ds_minis.config_sources import requested_by_environment

_CONVERTED = "_mini_sequence"  # a converted model's report, see `ds_minis.convert`


def watch() -> None:
    """To be called where the environment has settings: looks at the first optimizer step, and once more at the end."""
    if environment.process_rank() != 0:
        return
    try:
        request, wrong = requested_by_environment(), ""
    except ValueError as error:  # who reads them raises it, and no step is made
        request, wrong = None, str(error)
    if not wrong and (request is None or not request.config.enabled):
        return
    asks = f"{wrong}. Nobody has read it:" if wrong else f"{request.source} asks for mini-sequences, and"
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def first_step(optimizer, args, kwargs) -> None:
        handle.remove()
        if not has_converted_model():
            atexit.register(_tell, asks)

    handle = register_optimizer_step_post_hook(first_step)


def _tell(asks: str) -> None:
    if not has_converted_model():
        print(
            f"ds_minis: {asks} this process has trained without converting a model. Only "
            "accelerate (Accelerator.prepare, so every HF Trainer) and deepspeed.initialize read these settings: call "
            "convert_to_mini_sequence(model) in your own loop, or take the settings out",
            file=sys.stderr,
        )


def has_converted_model() -> bool:
    # By their types: asking an object of somebody else for its class may run code.
    module = sys.modules["torch.nn"].Module
    return any(issubclass(type(thing), module) and _CONVERTED in thing.__dict__ for thing in gc.get_objects())
