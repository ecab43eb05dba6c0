"""A recipe for an extension to a long context: read, checked, and divided into stages.

It takes the names of nanotron's create_config.py (`sequence_length`, `rope_theta`, `train_steps`, `sp`, ...), each a list
with one value for each stage, or one value for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ds_minis.config_values import MODES, SequenceParallel
from ds_minis.context.recipes.estimate import GIB, Need, need_of
from ds_minis.context.recipes.fields import (
    CLUSTER_FIELDS,
    FIELDS,
    STAGE_FIELDS,
    WHOLE,
    RecipeError,
    by_stage,
    check_fields,
    filled,
    number,
    text,
    whole,
)
from ds_minis.context.schedule import Stage, rope_theta_for

if TYPE_CHECKING:
    from ds_minis.planner.plan.planner import Planner


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage with all that its launch needs.

    Attributes:
        index: from 0.
        stage: length, base, steps of its own, accumulation.
        total_steps: steps of this stage and all before it.
        nodes, gpus_per_node: machines, and ranks on each.
        size: ranks that share a sequence.
        settings: `STAGE_FIELDS` of this stage.
        need: memory, as planned; None where the model's sizes are not known.
    """

    index: int
    stage: Stage
    total_steps: int
    nodes: int
    gpus_per_node: int
    size: int
    settings: Mapping[str, Any]
    need: Need | None = None

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.gpus_per_node

    @property
    def replicas(self) -> int:
        """Groups of ranks, each with sequences of its own."""
        return self.world // self.size

    @property
    def samples(self) -> int:
        """Sequences of one optimizer step."""
        return self.replicas * self.stage.accumulation * self.stage.micro_batch_size

    @property
    def folder(self) -> str:
        """nanotron's name of the stage's configuration."""
        theta = f"{self.stage.rope_theta / 1e6:.6g}"
        return f"config_{self.index}_theta={theta}M_steps={self.total_steps}_seq_len={self.stage.sequence_length}"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its fields (`FIELDS`, with the cluster's under "cluster"), and its stages."""

    fields: Mapping[str, Any]
    stages: tuple[PlannedStage, ...]


def read_recipe(
    given: Mapping[str, Any], planner_for: Callable[[Mapping[str, Any]], Planner | None] | None = None
) -> Recipe:
    """Checks a recipe.

    Args:
        given: the recipe as it was read.
        planner_for: gives, of a recipe's fields, the planner of its model, or None where its sizes are not known; called once
            all else is right.

    Raises:
        RecipeError: with the stage, the field and the fix.
    """
    if not isinstance(given, Mapping):
        raise RecipeError("the recipe is no mapping of fields to values: see examples/long_context/")
    fields = filled(given, FIELDS | STAGE_FIELDS, "")
    if not isinstance(fields["cluster"], Mapping):
        raise RecipeError("cluster: a mapping is allowed, with nodes and gpus_per_node")
    fields["cluster"] = filled(fields["cluster"], CLUSTER_FIELDS, "cluster.")
    mini_sequence = check_fields(fields)
    values = {name: fields[name] for name in STAGE_FIELDS} | {"nodes": fields["cluster"]["nodes"]}
    stages: list[PlannedStage] = []
    for settings in by_stage(values):
        stages.append(_planned(fields, settings, stages))
        if stages[-1].size > 1 and mini_sequence is None:
            raise RecipeError(
                f"stage {stages[-1].index}: sp: needs mini_sequence, which is false; set that to true, or sp to 1"
            )
    planner = None if planner_for is None else planner_for(fields)
    if planner is not None:
        stages = [_with_need(planned, fields, planner, mini_sequence) for planned in stages]
    return Recipe(fields, tuple(stages))


def _planned(fields: Mapping[str, Any], settings: dict[str, Any], before: list[PlannedStage]) -> PlannedStage:
    index = len(before)
    where = f"stage {index} (sequence_length {settings['sequence_length']})"
    for name in WHOLE:
        field = "cluster.nodes" if name == "nodes" else name
        settings[name] = whole(settings[name], f"{where}: {field}")
    steps, total = _steps(fields, settings, before, where)
    stage = Stage(
        sequence_length=settings["sequence_length"],
        rope_theta=_theta(fields, settings, where),
        steps=steps,
        accumulation=settings["batch_accumulation_per_replica"],
        micro_batch_size=settings["micro_batch_size"],
    )
    text(settings["dataset_folder"], f"{where}: dataset_folder")
    _check_rates(fields, settings, steps, where)
    nodes, gpus, size = settings["nodes"], fields["cluster"]["gpus_per_node"], settings["sp"] * settings["tp"]
    world = nodes * gpus
    if world % size:
        allowed = [divisor for divisor in range(1, world + 1) if world % divisor == 0]
        with_tp = f" x tp {settings['tp']}" if settings["tp"] > 1 else ""
        raise RecipeError(
            f"{where}: sp: {world} ranks ({nodes} nodes of {gpus}) cannot be divided into groups of {size} (sp "
            f"{settings['sp']}{with_tp}); set it to one of {', '.join(map(str, allowed))}, or cluster.nodes to a multiple of "
            f"{size // math.gcd(size, gpus)}"
        )
    if before and fields["optimizer"] == "resume" and world != before[-1].world and fields["engine"].startswith("zero"):
        raise RecipeError(
            f"{where}: cluster.nodes: {world} ranks continue a checkpoint of {before[-1].world}, whose optimizer DeepSpeed "
            "cannot divide anew; keep the number of ranks (and let sp grow), or set optimizer: fresh, or engine: fsdp"
        )
    if size > 1 and SequenceParallel.from_value({"size": size, "mode": fields["sp_mode"]}) is None:
        raise RecipeError(
            f"{where}: sp_mode: one of {', '.join(MODES)}, or a mapping of ulysses and ring whose product is {size}, is "
            f"allowed, got {fields['sp_mode']!r}"
        )
    return PlannedStage(
        index=index,
        stage=stage,
        total_steps=total,
        nodes=nodes,
        gpus_per_node=gpus,
        size=size,
        settings=settings,
    )


def _steps(
    fields: Mapping[str, Any], settings: Mapping[str, Any], before: list[PlannedStage], where: str
) -> tuple[int, int]:
    """A stage's own steps, and those of all stages so far."""
    done, given = before[-1].total_steps if before else 0, settings["train_steps"]
    if fields["steps_are"] == "each":
        return given, done + given
    if given <= done:
        raise RecipeError(
            f"{where}: train_steps: {given} is not more than {done}, where the stage before ends, and train_steps are "
            f"cumulative; give {done + given} for {given} steps of this stage, or set steps_are: each"
        )
    return given - done, given


def _theta(fields: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> float:
    if settings["rope_theta"] != "auto":
        theta = number(settings["rope_theta"], f"{where}: rope_theta")
        if not theta > 1:
            raise RecipeError(f"{where}: rope_theta: more than 1 is allowed, got {theta}; or auto, for the formula's")
        return theta
    for name in ("rope_base_length", "rope_base_theta"):
        if fields[name] is None:
            raise RecipeError(
                f"{where}: rope_theta: auto takes the formula, which needs {name}; add it (Llama-3's are 8192 and 500000), "
                "or give a number"
            )
    base_theta = number(fields["rope_base_theta"], "rope_base_theta")
    try:
        return rope_theta_for(
            settings["sequence_length"], whole(fields["rope_base_length"], "rope_base_length"), base_theta
        )
    except ValueError as error:
        raise RecipeError(f"{where}: rope_theta: auto: {error}") from None


def _check_rates(fields: Mapping[str, Any], settings: dict[str, Any], steps: int, where: str) -> None:
    for name in ("learning_rate", "min_decay_lr"):
        if settings[name] is not None:
            settings[name] = number(settings[name], f"{where}: {name}")
            most = settings["learning_rate"]  # which is read first
            if not (settings[name] > 0 if name == "learning_rate" else 0 <= settings[name] <= most):
                allowed = "more than 0" if name == "learning_rate" else f"0 to {most:g} (learning_rate)"
                raise RecipeError(f"{where}: {name}: {allowed} is allowed, got {settings[name]:g}")
    whole(settings["lr_warmup_steps"], f"{where}: lr_warmup_steps", least=0)
    decays = settings["min_decay_lr"] not in (None, settings["learning_rate"])
    if decays and fields["optimizer"] == "resume":
        raise RecipeError(
            f"{where}: min_decay_lr: {settings['min_decay_lr']:g} is not learning_rate ({settings['learning_rate']:g}), and "
            "a scheduler that is continued by stages cannot decay in each; set both to one value (nanotron's recipe does), "
            "or optimizer: fresh"
        )
    own_steps = steps - settings["lr_warmup_steps"]
    if decays and own_steps < 1:
        raise RecipeError(
            f"{where}: lr_warmup_steps: {settings['lr_warmup_steps']} leaves none of {steps} steps to decay in"
        )
    if decays and settings["lr_decay_steps"] not in (None, own_steps):
        raise RecipeError(
            f"{where}: lr_decay_steps: {settings['lr_decay_steps']} is not {own_steps}, the stage's steps after its warm-up, "
            "over which the rate decays; leave it out"
        )


def _with_need(
    planned: PlannedStage, fields: Mapping[str, Any], planner: Planner, mini_sequence: Mapping[str, Any] | None
) -> PlannedStage:
    """The stage with the memory it needs.

    Raises:
        RecipeError: the cluster does not have it.
    """
    cluster, stage = fields["cluster"], planned.stage
    where = f"stage {planned.index} (sequence_length {stage.sequence_length})"

    def need_with(factor: int = 1, **settings: Any) -> Need:
        """With so many times the nodes, and groups so many times as large."""
        parallel = {"sequence_parallel": planned.size * factor} if planned.size * factor > 1 else {}
        return need_of(
            planner,
            fields["engine"],
            tokens=stage.sequence_length,
            batch=stage.micro_batch_size,
            gpus=planned.world * factor,
            gpus_per_node=planned.gpus_per_node,
            settings=None if mini_sequence is None else {**mini_sequence, **settings, **parallel},
        )

    device, host = (cluster[name] or float("inf") for name in ("memory_per_gpu", "memory_per_node"))
    need = need_with()
    if need.device > device:
        ways = []
        if mini_sequence is not None and need_with(offload="cpu").device <= device:
            ways.append("mini_sequence: {offload: cpu}")
        factor = next((2**i for i in range(1, 8) if need_with(2**i).device <= device), None)
        if factor:
            ways.append(f"cluster.nodes {planned.nodes * factor} with sp {planned.settings['sp'] * factor}")
        raise RecipeError(
            f"{where}: cluster.memory_per_gpu: {device / GIB:.1f} GiB, but as planned it needs {need}; set "
            f"{', or '.join(ways or ['another engine, or GPUs with more memory'])}"
        )
    if need.host > host:
        raise RecipeError(
            f"{where}: cluster.memory_per_node: {host / GIB:.1f} GiB, but as planned it needs {need}; use more nodes, or "
            "offload less (engine, mini_sequence.offload)"
        )
    return replace(planned, need=need)
