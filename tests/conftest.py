"""Skips, with the reason, what this machine cannot run; and what several tests look at."""

import os

# Tensors are small: threads that wait for each other cost more than they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from models import LLAMA_CALLS
from support import warm

from ds_minis.layer.tiled import tiled_layer
from ds_minis.loss.heads import tiled_sum
from ds_minis.tiling.core import tiled_op

LARGE_GIB = 19
# Files of more than a minute, the longest first: a worker that begins one of them last would be waited for.
LONGEST = """
test_clients test_engines test_compile test_sft_scripts test_sft_example test_head_groups_and_inputs test_faults_of_runs
test_launch_training
""".split()


def pytest_configure(config):
    config.warm_folder = warm.prepare()


def pytest_unconfigure(config):
    if config.warm_folder is not None:
        warm.clean_up(config.warm_folder)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    available = psutil.virtual_memory().available / 2**30
    for item in items:
        if "large" in item.keywords and available < LARGE_GIB:
            item.add_marker(pytest.mark.skip(reason=f"needs {LARGE_GIB} GiB of memory, {available:.0f} are free"))
        if "huge" in item.keywords and not os.environ.get("DS_MINIS_HUGE"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and 20 GiB; DS_MINIS_HUGE=1 runs it"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_by_accelerate():
    """What a file of tests has left is not the next one's: accelerate's state, and what `TrainingArguments` sets for it."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    _reset_accelerate()


@pytest.fixture
def clean_accelerate_state(monkeypatch):
    """For tests that make accelerate's state: none is left to the next test, and no DeepSpeed is asked for."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    yield
    _reset_accelerate()


def _reset_accelerate() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=LLAMA_CALLS)
def scope(request) -> str:
    return request.param


@pytest.fixture
def tiled_calls(monkeypatch) -> list[tuple[str, int]]:
    """Class of the module (also of a whole layer) and number of rows of each call that ran over chunks."""
    calls = []

    def counted_layer(module, forward, call, *args, **kwargs):
        calls.append((type(module).__name__, call.hidden.shape[:2].numel()))
        return own(module, forward, call, *args, **kwargs)

    own = tiled_layer.LayerPasses
    monkeypatch.setattr("ds_minis.layer.tiled.tiled_layer.LayerPasses", counted_layer)

    def count(function):
        def counted(row_function, module, inputs, *args, **kwargs):
            calls.append((type(module).__name__, len(inputs[0])))
            return function(row_function, module, inputs, *args, **kwargs)

        return counted

    monkeypatch.setattr("ds_minis.tiling.modules.tiled_module.tile_rows", count(tiled_op.tile_rows))
    monkeypatch.setattr("ds_minis.loss.heads.chunked_head.tile_rows", count(tiled_op.tile_rows))
    monkeypatch.setattr("ds_minis.loss.heads.chunked_head.sum_rows", count(tiled_sum.sum_rows))
    return calls


@pytest.fixture
def told(caplog):
    """A function that gives the reasons told so far why attentions are not kept."""
    return lambda: [
        r.message.partition("once more in backward: ")[2] for r in caplog.records if "once more" in r.message
    ]


@pytest.fixture
def sdpa_masks(monkeypatch) -> list[torch.Tensor | None]:
    """The mask of each call of torch's attention."""
    masks, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return masks
