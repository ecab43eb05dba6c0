"""accelerate under sequence parallelism: the ranks of a group are one replica, are given the same batches, and count once.

accelerate divides data among processes. Here it is told the number of replicas, and which of them this rank belongs to.
What it does with gradients and with `gather` stays as it is: both are about processes, see `ds_minis.parallel.model.decoder`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import data_loader
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DummyScheduler, broadcast_object_list, recursively_apply

from ds_minis.integrations.accelerate_replicas import Replicas
from ds_minis.parallel.communication.groups import replicas

_PREPARED_FOR: contextvars.ContextVar[int] = contextvars.ContextVar("ds_minis_prepared_for", default=1)
_ONCE: contextvars.ContextVar[int] = contextvars.ContextVar("ds_minis_each_replica_once", default=1)


def attach_data(accelerator_module: Any, replicas_of: Callable[[Any], Replicas]) -> None:
    """Has `Accelerator` prepare data loaders for replicas, and gather metrics of each replica once.

    Args:
        replicas_of: gives the `Replicas` of an accelerator.
    """
    cls = accelerator_module.Accelerator
    prepare_data_loader, gather, gather_for_metrics = cls.prepare_data_loader, cls.gather, cls.gather_for_metrics

    @functools.wraps(prepare_data_loader)
    def prepare_data_loader_for_replicas(self, *args, **kwargs):
        with _set(_PREPARED_FOR, replicas_of(self).size(self)):
            return prepare_data_loader(self, *args, **kwargs)

    @functools.wraps(gather)
    def gather_each_once(self, *args, **kwargs):
        result, size = gather(self, *args, **kwargs), _ONCE.get()
        return result if size == 1 else recursively_apply(of_first_ranks, result, self.num_processes, size)

    @functools.wraps(gather_for_metrics)
    def gather_for_metrics_each_once(self, *args, **kwargs):
        with each_replica_once(replicas_of(self).decided()):
            return gather_for_metrics(self, *args, **kwargs)

    gather_object = accelerator_module.gather_object

    @functools.wraps(gather_object)
    def gather_object_each_once(value):
        size = _ONCE.get()
        mine = size == 1 or torch.distributed.get_rank() % size == 0
        return gather_object(value if mine else [])

    cls.prepare_data_loader = prepare_data_loader_for_replicas
    cls.gather, cls.gather_for_metrics = gather_each_once, gather_for_metrics_each_once
    accelerator_module.gather_object = gather_object_each_once
    accelerator_module.prepare_data_loader = _for_replicas(accelerator_module.prepare_data_loader)
    for module in (accelerator_module, data_loader):  # of which the Trainer and the package take it
        attach_skipping(module)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def each_replica_once(size: int) -> contextlib.AbstractContextManager[None]:
    """Inside, `Accelerator.gather` gives what the first rank of each group gave, in the order of groups."""
    return _set(_ONCE, size)


def of_first_ranks(gathered: torch.Tensor, num_processes: int, size: int) -> torch.Tensor:
    """Of a tensor gathered from all ranks, `(num_processes * n, ...)`, the first rank's part of each group."""
    of_ranks = gathered.unflatten(0, (num_processes, gathered.shape[0] // num_processes))
    return of_ranks[::size].flatten(0, 1)


def _for_replicas(prepare_data_loader: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps accelerate's function that makes a data loader out of the user's."""
    signature = inspect.signature(prepare_data_loader)

    @functools.wraps(prepare_data_loader)
    def prepare_for_replicas(dataloader, *args, **kwargs):
        size = _PREPARED_FOR.get()
        if size == 1:
            return prepare_data_loader(dataloader, *args, **kwargs)
        given = signature.bind(dataloader, *args, **kwargs).arguments
        given["num_processes"] //= size
        given["process_index"] //= size
        given["torch_device_mesh"] = None  # of data-parallel ranks only, see _PEERS; accelerate would count these
        _seed_workers_alike(dataloader, size)
        loader = prepare_data_loader(**given)
        if isinstance(loader, DataLoaderDispatcher):
            dispatch_to_replicas(loader, size)
        else:
            _draw_the_same_order(loader, given["num_processes"])
        return loader

    return prepare_for_replicas


def _seed_workers_alike(dataloader: Any, size: int) -> None:
    """Has the Trainer's worker processes, seeded by rank, draw the same numbers on all ranks of a group."""
    function = getattr(dataloader, "worker_init_fn", None)
    if isinstance(function, functools.partial) and isinstance(function.keywords.get("rank"), int):
        keywords = {**function.keywords, "rank": function.keywords["rank"] // size}
        dataloader.worker_init_fn = functools.partial(function.func, *function.args, **keywords)


def _draw_the_same_order(loader: DataLoaderShard, num_replicas: int) -> None:
    """Has ranks whose loaders accelerate does not divide draw the same random order, whatever they were seeded with.

    With several replicas accelerate does so itself. With one, each rank would draw its own; a single process's order is
    that of rank 0.
    """
    source = loader.get_sampler() or loader.dataset
    if hasattr(source, "initial_seed"):  # accelerate's seedable sampler
        source.initial_seed = broadcast_object_list([source.initial_seed])[0]
    elif num_replicas == 1 and hasattr(source, "generator"):
        loader.synchronized_generator = source.generator
        loader.rng_types = ["torch"] if source.generator is None else ["torch", "generator"]


class _ReplicaState:
    """accelerate's state as a dispatcher sees it, which reads on process 0 and gives each replica its part."""

    def __init__(self, state: Any, size: int):
        self._state, self.size = state, size

    @property
    def num_processes(self) -> int:
        return self._state.num_processes // self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def dispatch_to_replicas(loader: DataLoaderDispatcher, size: int) -> None:
    """Has a data loader that reads on process 0 alone give one part of what it reads to all ranks of a group."""
    if loader.use_stateful_dataloader:
        raise ValueError(
            "sequence_parallel: a stateful data loader that dispatches its batches counts those of every process: set "
            "dispatch_batches=False or use_stateful_dataloader=False in DataLoaderConfiguration"
        )
    loader.state = _ReplicaState(loader.state, size)
    loader.slice_fn = functools.partial(slice_of_replica, loader.slice_fn, size)


def slice_of_replica(slice_fn, size: int, data, tensor_slice: slice, process_index=None, num_processes=None):
    """Calls `slice_fn` for this rank's replica: accelerate's slice begins at `process_index` times its width."""
    if tensor_slice.start:
        width = tensor_slice.stop - tensor_slice.start
        start = process_index // size * width
        tensor_slice = slice(start, start + width)
    return slice_fn(data, tensor_slice, process_index=process_index // size, num_processes=num_processes)


def attach_skipping(module: Any) -> None:
    """Has the `skip_first_batches` of a module (accelerate's or the Trainer's) skip those of replicas."""
    skip = module.skip_first_batches
    if hasattr(skip, "_ds_minis"):
        return

    @functools.wraps(skip)
    def skip_first_batches(dataloader, *args, **kwargs):
        loader = skip(dataloader, *args, **kwargs)
        state = getattr(dataloader, "state", None)
        if isinstance(state, _ReplicaState):
            dispatch_to_replicas(loader, state.size)
        return loader

    skip_first_batches._ds_minis = True
    module.skip_first_batches = skip_first_batches


@contextlib.contextmanager
def schedules_for_replicas(prepared: Iterable[Any], size: int) -> Iterator[None]:
    """Inside, accelerate divides the length of a schedule that DeepSpeed is to make by the number of replicas."""
    schedules = [s for s in prepared if isinstance(s, DummyScheduler) and s.total_num_steps is not None and size > 1]
    for schedule in schedules:
        schedule.total_num_steps *= size  # which accelerate divides by the number of processes
    try:
        yield
    finally:
        for schedule in schedules:
            schedule.total_num_steps //= size


class _ReplicaScheduler(AcceleratedScheduler):
    """Steps once for each replica's batch, where accelerate's steps once for each process's."""

    def step(self, *args, **kwargs):
        num_steps = self._num_replicas if self.gradient_state.sync_gradients and self.step_with_optimizer else 1
        for _ in range(num_steps):
            done = getattr(self.scheduler, "_step_count", 0) > getattr(self.scheduler, "total_steps", float("inf"))
            if not (num_steps > 1 and done):  # as accelerate for OneCycleLR
                super().step(*args, **kwargs)


def step_for_replicas(schedulers: Iterable[Any], size: int) -> None:
    """Has accelerate's wrappers of schedulers count replicas."""
    for scheduler in schedulers:
        if size > 1 and type(scheduler) is AcceleratedScheduler and not scheduler.split_batches:
            scheduler.__class__ = _ReplicaScheduler
            scheduler.split_batches = True  # each call of its `step` is one step
            scheduler._num_replicas = replicas(torch.distributed.get_world_size(), size)
