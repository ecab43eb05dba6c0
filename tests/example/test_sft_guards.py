"""`train.py` stops where accelerate would silently train with less than was asked for."""

import sys
from types import SimpleNamespace

import pytest
import sft_runs
from accelerate import DistributedType
from torch import nn


@pytest.fixture
def train(monkeypatch):
    """The script as a module, in a process that no launcher started."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    import train

    return train


def arguments(kind: DistributedType, processes: int = 1, deepspeed: str | None = None):
    state = SimpleNamespace(distributed_type=kind, num_processes=processes)
    return SimpleNamespace(distributed_state=state, deepspeed=deepspeed, world_size=processes)


def test_deepspeed_that_accelerate_would_replace_by_ddp(train, monkeypatch):
    ddp = arguments(DistributedType.MULTI_CPU, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.require_engine(ddp)
    train.require_engine(arguments(DistributedType.DEEPSPEED, 2, "ds.json"))
    with pytest.raises(RuntimeError, match="DeepSpeed was asked for, but accelerate would run MULTI_CPU"):
        train.require_engine(arguments(DistributedType.MULTI_CPU, 2, "ds.json"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RuntimeError, match="DeepSpeed was asked for"):
        train.require_engine(ddp)


def test_processes_that_would_train_alone(train, monkeypatch):
    train.require_engine(arguments(DistributedType.NO))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started, but each would train alone .*--use_cpu True"):
        train.require_engine(arguments(DistributedType.NO))


ENGINES = {
    "DeepSpeedEngine": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "FSDPModule": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "FullyShardedDataParallel": {"ACCELERATE_USE_FSDP": "true"},
    "DistributedDataParallel": {},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_was_wrapped_by_something_else_is_not_trained(train, monkeypatch, engine):
    for name, value in ENGINES[engine].items():
        monkeypatch.setenv(name, value)
    args = arguments(DistributedType.NO, processes=2)  # what matters is what the model became
    for name in ENGINES:
        wrapped = type("Wrapped", (type(name, (nn.Module,), {}),), {})()
        callback = train.RequireWrapped(SimpleNamespace(model_wrapped=wrapped))
        if name == engine:
            callback.on_train_begin(args, None, None)
        else:
            with pytest.raises(RuntimeError, match=f"{engine} was asked for, but accelerate would train with Wrapped"):
                callback.on_train_begin(args, None, None)


def test_one_process_needs_no_wrapper(train):
    callback = train.RequireWrapped(SimpleNamespace(model_wrapped=nn.Linear(1, 1)))
    callback.on_train_begin(arguments(DistributedType.NO), None, None)


def test_fsdp_on_the_cpu_needs_processes(train):
    import cpu

    with pytest.raises(RuntimeError, match="two processes or more"):
        cpu.prepare_fsdp(arguments(DistributedType.NO))
