"""Runs token-wise modules (feed-forward, norms) over chunks of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.tiling.core.out_of_memory import in_a_chunk
from ds_minis.tiling.core.params import is_partitioned, submodules
from ds_minis.tiling.core.replay import AutocastState, has_values
from ds_minis.tiling.core.row_args import RowArgs, tensors_in
from ds_minis.tiling.core.tiled_op import runs_whole, tile_rows
from ds_minis.tiling.modules.compiling import outside_of_graphs
from ds_minis.tiling.modules.gate import run_whole
from ds_minis.tiling.modules.hooks import ALL, engine_of, global_user_hook, user_hook
from ds_minis.tiling.modules.state import experts_per_choice
from ds_minis.tiling.modules.swap import Tiled, own_forward, warn_once
from ds_minis.tiling.verify.follow import Reach
from ds_minis.tiling.verify.signature import STALE, ModuleAnalysis, Signature, module_signature
from ds_minis.tiling.verify.token_wise import attributes_read_by_module, token_wise_fallback_reason


class TiledModule(Tiled):
    """Mixin for a token-wise module's class: runs that class's own forward over chunks."""

    def forward(self, *args, **kwargs):
        forward, chunking = own_forward(self, super().forward), self.mini_sequence_chunking
        if chunking is None or chunking.suspended:
            return forward(*args, **kwargs)
        call = RowArgs(args, kwargs)
        if call.num_rows == 0:
            return _run_whole(self, forward, call)
        chunk_rows = chunking.module_rows(
            call.num_rows, call.width, experts_per_choice(self.parameters(recurse=False), call.choices)
        )
        if runs_whole(call.num_rows, chunk_rows):
            chunking.note("module", call.num_rows, chunk_rows, as_it_is=True)
            if torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            with in_a_chunk(chunking.config, "chunk_size", chunk_rows, call.num_rows):
                return forward(*args, **kwargs)
        return _forward_by_rows(self, forward, call, chunk_rows)


@outside_of_graphs
def _forward_by_rows(module: TiledModule, forward: Callable[..., Any], call: RowArgs, chunk_rows: int) -> Any:
    """Runs the module by chunks if it is token-wise; otherwise untiled, with one warning that says why."""
    if not _is_token_wise(module, forward, call, chunk_rows):
        return _run_whole(module, forward, call)
    require_weights(module)

    bare = call.without_rows()  # the graph holds `run` until the loss is freed, long after this backward

    def run(*rows: Tensor) -> Tensor:
        args, kwargs = bare.with_rows(rows)
        return forward(*args, **kwargs).flatten(0, -2)

    module.mini_sequence_chunking.note("module", call.num_rows, chunk_rows)
    guard = functools.partial(module.mini_sequence_chunking.guarded, "chunk_size", chunk_rows, call.num_rows)
    memory = module.mini_sequence_chunking.memory
    y = tile_rows(run, module, call.rows(), chunk_rows, guard, memory, way=call.flags)
    return y.view(*call.input.shape[:-1], y.shape[-1])


@outside_of_graphs
def _run_whole(module: TiledModule, forward: Callable[..., Any], call: RowArgs) -> Any:
    def few() -> list[Tensor]:
        return tensors_in(call.narrowed(2, 32, torch.randn_like).run(forward))

    few = None if call.reason or call.num_rows == 0 else few
    return run_whole(module, forward, call.run, module.mini_sequence_chunking.memory, call.flags, few)


def _is_token_wise(module: TiledModule, forward: Callable[..., Any], call: RowArgs, chunk_rows: int) -> bool:
    """Checks the module once per kind of call and signature. Hooks are checked at each call: they may come and go."""
    analyses = module.mini_sequence_analyses
    signature = module_signature(module, analyses.ignored)
    passing, with_grads = passing_state(module, signature), torch.is_grad_enabled() or module.training
    dtypes = call.input.dtype, AutocastState(call.input.device).dtype()
    kind = with_grads, call.keys, call.flags, call.reason, passing, call.input.dim(), *dtypes
    key = (*kind, signature.stable)
    analysis = analyses.get(key)
    if analysis is None or analyses.is_stale(analysis, signature.versions) or not _reaches(analysis, call, chunk_rows):
        analysis = _analyze(module, forward, call, chunk_rows, key, kind, signature, analysis)
        if analysis is None:
            return not has_values(call.input)
    analyses.note(module.training, analysis.reason)
    return not analysis.reason


def _reaches(analysis: ModuleAnalysis, call: RowArgs, chunk_rows: int) -> bool:
    return bool(analysis.reason) or analysis.reach is None or analysis.reach.holds(call.num_rows, chunk_rows)


def _analyze(
    module: TiledModule,
    forward: Callable[..., Any],
    call: RowArgs,
    chunk_rows: int,
    key: tuple,
    kind: tuple,
    signature: Signature,
    earlier: ModuleAnalysis | None,
) -> ModuleAnalysis | None:
    """A new analysis; None if the runs cannot tell."""
    analyses = module.mini_sequence_analyses
    passing = kind[4]
    reason, reach = call.reason or passing or analyses.changing, Reach()
    if not reason:
        if not has_values(call.input):
            return None
        require_weights(module)
        often = analyses.often_changed(kind, signature.stable)
        with module.mini_sequence_chunking.guarded():
            reason = token_wise_fallback_reason(
                module, forward, call, with_grads=with_grads_of(kind), chunk_rows=chunk_rows, reach=reach
            )
            if reason is None:
                return None
            if often:
                read = attributes_read_by_module(module, forward, call, often, signature)
                analyses.ignore_changing(often, read)
                reason = reason or analyses.changing
        if earlier is not None and not reason and not earlier.reason and earlier.reach is not None:
            reach = reach.extended(earlier.reach)
        if analyses.often_stale and earlier is not None:
            reason = reason or STALE
    versions = None if (reason and analyses.often_stale) or not reach.versions else signature.versions
    analysis = analyses[key] = ModuleAnalysis(reason, reach if not reason else None, versions if not passing else None)
    if reason:
        warn_once(module, "is run as a whole", reason)
    return analysis


def with_grads_of(kind: tuple) -> bool:
    return kind[0]


def passing_state(module: nn.Module, signature: Signature | None = None) -> str:
    """Transient hooks or parametrizations that recomputation would miss, in words; empty if there are none."""
    signature = module_signature(module) if signature is None else signature
    hook = user_hook(signature.hooked, ALL)
    if hook:  # PEFT passes per-sample arguments to layers in a hook
        return f"a part of it has the hook {hook}, which may look at all tokens"
    hook = global_user_hook()
    if hook:
        return f"every module has the hook {hook}, which may look at all tokens"
    if signature.has_parametrizations:  # PEFT's LoRA on parameters
        return "its weights are parametrized, perhaps for one call alone"
    return ""


def engine_inside(module: nn.Module, signature: Signature | None = None) -> str:
    """Names an engine that gathers the weights of a submodule separately; empty if none does."""
    if not any(engine_of(part) for part in (module_signature(module) if signature is None else signature).parts):
        return ""
    for name, child in module.named_modules():
        wrapper = engine_of(child)
        if name and wrapper:
            return f"{wrapper} was applied to its part {name}"
    return ""


def require_weights(module: nn.Module) -> None:
    """Refuses weights that an engine would gather inside, once per chunk: ranks that differ in length would hang.

    FSDP2 gathers when a module is called, which happens once. FSDP1 gathers in its wrapper's forward, which every chunk runs.

    Raises:
        RuntimeError: a submodule is wrapped by FSDP, or a weight is partitioned by ZeRO-3.
    """
    parts = submodules(module)
    partitioned = any(p is not None and is_partitioned(p) for part in parts for p in part._parameters.values())
    if not partitioned and not any(map(engine_of, parts)):
        return
    for name, child in module.named_modules():
        wrapper = engine_of(child)
        if wrapper and (child is not module or wrapper == "FullyShardedDataParallel"):
            place = f"{name} inside of a tiled {type(module).__name__}" if name else "an LM head whose loss is tiled"
            raise RuntimeError(
                f"{wrapper} was applied to {place}, so every chunk would gather its weights on its own (and hang where ranks "
                "differ in length). Apply it to the decoder layer, or to the whole module (FSDP1 takes a layer with frozen "
                "and trainable weights with use_orig_params=True, which is `fsdp_use_orig_params: true` under `fsdp_config` "
                'in accelerate\'s YAML), or leave the module out with "exclude" (the LM head: "loss": false) in the '
                "mini-sequence configuration"
            )
    for name, param in module.named_parameters():
        if param.numel() == 0 and is_partitioned(param):
            raise RuntimeError(
                f"{type(module).__name__}.{name} is partitioned by ZeRO-3 inside of a tiled module, so every chunk would "
                "gather it on its own (and hang where ranks differ in length). Convert the model before "
                "deepspeed.initialize, with ds_minis attached to DeepSpeed: do not set DS_MINIS_AUTOLOAD=0, or call "
                "ds_minis.register() first"
            )
