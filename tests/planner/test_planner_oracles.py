"""What is planned against torch's own trackers of memory: a second opinion that shares no code with the planner's.

They run on fake tensors, and FSDP2 in a fake process group, so in this one process. Three things they cannot follow: a
frozen parameter (they put a hook on each, which torch refuses there), a tiled loss (the hook that they put on each module
asks deferred logits for their storage, which computes them), and tiled layers under FSDP2 (which run whole, as each has
those hooks inside).
"""

import contextlib
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from planner_models import SIZES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_minis import convert_to_mini_sequence
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner
from ds_minis.planner.step.stubs import register

TOKENS = 2000
CONFIG = LlamaConfig(**SIZES)


def tracked(setup: Setup) -> int:
    """Bytes at the peak of the second step, by torch's tracker."""
    mesh = init_device_mesh("cpu", (setup.gpus,)) if setup.engine == "fsdp2" else None
    with FakeTensorMode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation=register()).train()
        if setup.settings is not None:
            convert_to_mini_sequence(model, dict(setup.settings))
        elif setup.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if mesh is not None:
            for unit in (*model.model.layers, model):
                fully_shard(unit, mesh=mesh)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)

        def step():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        if mesh is not None:
            tracker = FSDPMemTracker(model, optimizer)
            with tracker:
                step()
                tracker.reset_mod_stats()
                step()
        else:
            step()
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                step()
    return max(bytes_of["Total"] for bytes_of in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize(
    "fields",
    [
        {"settings": None, "checkpointing": False},
        {"settings": None},
        {"settings": {"loss": False}},
    ],
    ids=["plain", "checkpointing", "layers, their loss whole"],
)
def test_one_process_by_torchs_tracker(fields):
    setup = Setup(dtype="float32", **fields)
    assert Planner(CONFIG).estimate(setup, TOKENS).allocated == pytest.approx(tracked(setup), rel=0.01)


def test_fsdp2_by_torchs_tracker():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        setup = Setup(dtype="float32", settings=None, engine="fsdp2", gpus=2)
        assert Planner(CONFIG).estimate(setup, TOKENS).allocated == pytest.approx(tracked(setup), rel=0.01)
    finally:
        dist.destroy_process_group()
