"""The matrix of engines and ways to train: which cells there are, and what a cell's result comes to.

A cell is *exact* when the converted model's parameters after 4 steps are those of the unconverted model under the same
engine, and those of one process on the data of all ranks; or *refused*, when the engine refuses the unconverted model
with the same words. There is nothing in between.

Where processes share sequences (`PARALLEL_ROWS`, `PARALLEL_COLUMNS`), the one process on the data of all replicas is all that
a cell is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from engine_cases import Case
from engine_worker import train_alone
from models import MOE_CONFIGS, relative_errors

RTOL = 1e-5
# The rounding of bfloat16 is 4e-3; both runs round, in another order. So the converted run is also held against
# float32, from which it must be no further away than the unconverted run is.
BF16_RTOL, BF16_EXCESS = 2e-2, 1.1
MAX_STANDARD_ERRORS = 4.0  # of runs with dropout; by chance one cell in some thousands comes above it
# Runs of each kind. The smallest fault that must be found is another mask in backward than in forward: it moved the mean by
# 5.5 standard errors in 24 runs, by 3.3 to 4.0 in 16 and 2.3 to 3.1 in 12. (Dropout left out, applied twice or scaled
# wrongly: 15 or more in 24, 9 or more in 12.)
SEEDS, RELABELINGS = 24, 2000

ROWS: dict[str, dict] = {
    "none (one process)": {"engine": "none"},
    "DDP": {"engine": "ddp"},
    "FSDP1, use_orig_params=True": {"engine": "fsdp1"},
    "FSDP1, use_orig_params=False": {"engine": "fsdp1_flat"},
    "FSDP2": {"engine": "fsdp2"},
    **{f"ZeRO-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    "ZeRO-2, optimizer offloaded": {"zero_stage": 2, "offload": True},
    "ZeRO-3, all offloaded": {"zero_stage": 3, "offload": True},
}
COLUMNS: dict[str, dict] = {
    "full": {},
    "LoRA": {"lora": True},
    "LoRA, LM head saved": {"lora": True, "save_head": True},
    "LoRA on LM head": {"lora": True, "lora_head": True},
    "QLoRA": {"lora": True, "quantized": True},
    "tied embeddings": {"family": "llama-tied-bias"},
    "accumulation 4": {"accumulation": 4},
    "uneven lengths": {"uneven": True},
    "one rank masked": {"masked_rank": 1},
    "bf16": {"dtype": "bfloat16"},
    "reentrant checkpointing": {"reentrant": True},
    "no checkpointing": {"checkpointing": False},
    "LoRA, no checkpointing": {"lora": True, "checkpointing": False},
    "frozen embeddings, no checkpointing": {"frozen_embeddings": True, "checkpointing": False},
    "two forwards": {"forwards": 2},
    "loss reads the head's weight": {"loss": "weight"},
    "the same, LoRA, LM head saved": {"loss": "weight", "lora": True, "save_head": True},
    "loss is a submodule": {"loss": "module"},
    "gradient clipping": {"clip": 0.5},
    "dropout 0.1": {"dropout": 0.1, "seeds": SEEDS},
}
ENGINES = {
    "DDP": {"engine": "ddp"},
    "FSDP1": {"engine": "fsdp1"},
    "FSDP2": {"engine": "fsdp2"},
    **{f"ZeRO-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
}
LAYOUTS = {
    "2 ranks": {"sequence_parallel": 2, "replicas": 1},
    "2 x 2 ranks": {"sequence_parallel": 2, "replicas": 2},
    "4 ranks": {"sequence_parallel": 4, "replicas": 1},
}
PARALLEL_ROWS = {f"{engine}, {layout}": ENGINES[engine] | LAYOUTS[layout] for engine in ENGINES for layout in LAYOUTS}
PARALLEL_COLUMNS = {
    f"{mode}, {scope}, {trained}": {"mode": mode, "scope": scope, "lora": trained == "LoRA"}
    for scope in ("layer", "tokens", "mlp")
    for mode in ("gather", "ring", "ulysses")
    for trained in ("full", "LoRA")
}
ENGINE_CLASSES = {
    "none": ("LlamaForCausalLM", "PeftModel"),
    "deepspeed": "DeepSpeedEngine",
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDP",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp1_flat": "FullyShardedDataParallel",
    "fsdp1_trainer": "FullyShardedDataParallel",
}


# What engines do not do, whoever asks: a part of the engine's own words, and the same for its user.
REFUSALS = {
    "Must flatten tensors with uniform `requires_grad` when `use_orig_params=False`": (
        "torch refuses frozen and trainable weights in one flat parameter: set `use_orig_params=True`"
    ),
    "FSDP does not support wrapping such modules when use_orig_params=False": (
        "torch refuses frozen and trainable weights in one flat parameter: set `use_orig_params=True`. (PEFT's auto-wrap "
        "policy gets around it by wrapping every adapter; ds_minis refuses that with the same advice)"
    ),
}


@dataclass(frozen=True)
class Judgement:
    """What a cell came to: kind is "exact", "refused" or "FAILED"; text has the figures or the reason."""

    kind: str
    text: str


def cell(row: str, column: str) -> Case:
    return Case(**{"accumulation": 1, **ROWS[row], **COLUMNS[column]})


def parallel_cell(row: str, column: str) -> Case:
    return Case(**PARALLEL_ROWS[row], **PARALLEL_COLUMNS[column])


def judge(case: Case, result: dict) -> Judgement:
    """Never raises: what is wrong with a result is its text."""
    try:
        if "died" in result:
            return Judgement("FAILED", f"its processes {result['died']}")
        if any("error" in run for run in result.values()):
            return _judge_errors(result["converted"].get("error"), result.get("plain", {}).get("error"), result)
        _require_engine(case, result)
        return Judgement("exact", _differences(case, result["converted"], result.get("plain") or _replica_alone(case)))
    except Exception as error:
        return Judgement("FAILED", f"{type(error).__name__}: {error}")


def _judge_errors(converted: str | None, plain: str | None, result: dict) -> Judgement:
    if plain is None:
        return Judgement("FAILED", f"only the converted model is refused: {converted}")
    if converted is None:
        return Judgement("FAILED", f"only the unconverted model is refused: {plain}")
    if converted != plain:
        return Judgement("FAILED", f"refused for two reasons. Converted: {converted}; unconverted: {plain}")
    for run in result.values():
        if run["ranks_with_error"] != run["processes"]:
            return Judgement("FAILED", f"refused on {run['ranks_with_error']} of {run['processes']} ranks: {plain}")
    for words, reason in REFUSALS.items():
        if words in plain:
            return Judgement("refused", reason)
    return Judgement("FAILED", f"refused, converted and unconverted, for a reason that is not known here: {plain}")


def _require_engine(case: Case, result: dict) -> None:
    """What was asked for is what ran; on a CPU, engines fall back to others without a word."""
    for kind, run in result.items():
        assert run["engine"].startswith(ENGINE_CLASSES[case.engine]), f"{kind}: the engine was a {run['engine']}"
        assert run["zero_stage"] == case.zero_stage, f"{kind}: the ZeRO stage was {run['zero_stage']}"
        assert run["offload"] == case.offload, f"{kind}: offload was {run['offload']}"
        assert run["processes"] == case.processes, f"{kind}: {run['processes']} processes ran"
        assert not run.get("hooked_inside"), f"{kind}: ZeRO-3 gathers {run['hooked_inside']} parts of tiled layers"
        tiled = 0
        if kind == "converted":
            tiled = 2 if case.scope == "mlp" else {"gemma2": 11, "qwen3": 11, "qwen2_moe": 9}.get(case.family, 7)
        assert run["tiled"] == tiled, f"{kind}: {run['tiled']} modules were tiled, not {tiled}"
        aside = case.loss == "weight" or (case.loss == "logits" and case.engine.startswith("fsdp1"))
        bypassed = aside and kind == "converted"
        assert bool(run["loss"]) == bypassed, f"{kind}: the loss was not tiled: {run['loss']}"
        captured = case.family in MOE_CONFIGS  # router logits, by hooks inside of the layers: run as they are then
        layers = 2 if kind == "converted" and case.scope == "layer" and not captured else 0
        assert run["layers"] == layers, f"{kind}: {run['layers']} layers were tiled as a whole, not {layers}"
        if case.sequence_parallel > 1:
            words = f"on {case.sequence_parallel} ranks, mode {case.mode}; attention by {case.mode}"
            assert run["parallel"].endswith(words), f"sequences were divided otherwise: {run['parallel']}"


def _differences(case: Case, converted: dict, plain: dict) -> str:
    """The figures of a run that is exact; raises if it is not."""
    assert all(loss == loss for loss in converted["losses"]), f"a loss is NaN: {converted['losses']}"
    if case.seeds:
        return _same_distribution(converted["params"], plain["params"])
    if case.masked_rank is None:  # the unconverted loss is NaN then, its gradients are zero
        losses = {f"loss {i}": torch.tensor(loss) for i, loss in enumerate(converted["losses"])}
        expected = {f"loss {i}": torch.tensor(loss) for i, loss in enumerate(plain["losses"])}
        _largest_error(losses, expected, RTOL if case.dtype == "float32" else BF16_RTOL)
    if case.dtype != "float32":
        return _as_close_to_float32(case, converted["params"], plain["params"])
    error = _largest_error(converted["params"], plain["params"], RTOL)
    alone = _alone(case)
    assert not case.clip or min(alone["norms"]) > case.clip, (
        f"nothing was to be clipped, the norms were {alone['norms']}"
    )
    error_alone = _largest_error(converted["params"], alone["params"], RTOL)
    return f"{max(error, error_alone):.0e}"


def _largest_error(tensors: dict, expected: dict, rtol: float) -> float:
    errors = relative_errors(tensors, expected)
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    assert errors[name] <= rtol, f"{name} differs by {errors[name]:.1e} of its largest entry"
    return errors[name]


def _alone(case: Case) -> dict:
    """One process on the data of all ranks: the same for every engine, and every way to divide sequences."""
    engine = {"engine": "none", "zero_stage": None, "offload": False, "dtype": "float32", "scaler": False}
    return _train_alone(dataclasses.replace(case, **engine, scope="layer", sequence_parallel=1, mode="gather"))


def _replica_alone(case: Case) -> dict:
    """The same, with the losses of the first replica, which are rank 0's."""
    alone = _alone(case)
    return alone | {"losses": alone["losses"][:: case.replicas]}


@functools.cache
def _train_alone(case: Case) -> dict:
    return train_alone(case)


def _as_close_to_float32(case: Case, converted: dict, plain: dict) -> str:
    error = _largest_error(converted, plain, BF16_RTOL)
    exact = _alone(case)["params"]
    distances = [sum((run[n] - exact[n]).square().sum() for n in exact).sqrt().item() for run in (converted, plain)]
    excess = distances[0] / distances[1]
    assert excess <= BF16_EXCESS, f"{excess:.2f} times as far from float32 as the unconverted model"
    return f"{error:.0e} ({excess:.2f}x)"


def _same_distribution(converted: dict, plain: dict) -> str:
    """Compares runs of many seeds (first dimension of every tensor): means of the parameters, and their spread.

    The distance of the means is put beside those of 2,000 random divisions of the same runs into two groups. Dropout
    that is scaled wrongly, or whose backward has another mask than its forward, shifts the mean; dropout that is left
    out or applied twice changes the spread as well.
    """
    num_runs = len(next(iter(plain.values())))
    scaled = []
    for name, tensor in plain.items():
        both = torch.cat([converted[name], tensor]).flatten(1).double()
        spread = max(group.var(0).sum().sqrt().item() for group in both.split(num_runs))
        assert spread > 0, f"{name} is the same whatever the random numbers"
        scaled.append((both - both.mean(0)) / spread)
    runs_2SP = torch.cat(scaled, dim=1)

    sides = torch.cat([torch.ones(num_runs), -torch.ones(num_runs)]).double() / num_runs
    generator = torch.Generator().manual_seed(0)
    divisions = torch.stack([sides[torch.randperm(2 * num_runs, generator=generator)] for _ in range(RELABELINGS)])
    products = runs_2SP @ runs_2SP.T
    distances = ((torch.cat([sides[None], divisions]) @ products) * torch.cat([sides[None], divisions])).sum(1).sqrt()
    mean = ((distances[0] - distances[1:].mean()) / distances[1:].std()).item()

    squares = [(group - group.mean(0)).square().sum(1) for group in runs_2SP.split(num_runs)]
    standard_error = sum(s.var() / num_runs for s in squares).sqrt()
    spread = ((squares[0].mean() - squares[1].mean()) / standard_error).item()
    within = mean <= MAX_STANDARD_ERRORS and abs(spread) <= MAX_STANDARD_ERRORS
    assert within, f"means {mean:+.1f} and spreads {spread:+.1f} standard errors apart"
    return f"{mean:+.1f}, {spread:+.1f} s.e."
