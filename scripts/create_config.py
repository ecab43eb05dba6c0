"""From one recipe, the configuration of every stage of an extension to a long context.

    python scripts/create_config.py                                     the shipped recipe, Llama-3-8B from 8K to 1M tokens
    python scripts/create_config.py RECIPE.yaml [--output_dir FOLDER]   configs/NAME by default
    python scripts/create_config.py RECIPE.yaml --check                 writes nothing

Writes a folder for each stage, with nanotron's name for it: train.yaml (arguments of examples/sft/train.py), accelerate.yaml,
deepspeed.json under DeepSpeed, and stage.env (nodes, GPUs, folders); and `stages`, their names in order, which
scripts/launch_training.slurm and scripts/launch_training.sh run. Paths in a recipe are relative to the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ds_minis.config_values import nearest
from ds_minis.context.recipes.estimate import GIB
from ds_minis.context.recipes.recipe import PlannedStage, Recipe, RecipeError, read_recipe

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "long_context" / "1M_4stages_8gpus.yaml"
# Arguments of train.py that follow from a recipe's fields.
FIELD_OF_ARGUMENT = {
    "model_name_or_path": "init_weights_path",
    "dataset_name": "dataset_folder",
    "output_dir": "checkpoints_path",
    "resume_from_checkpoint": "optimizer",
    "max_length": "sequence_length",
    "rope_theta": "rope_theta",
    "stop_file": "checkpoints_path",
    "max_steps": "train_steps",
    "gradient_accumulation_steps": "batch_accumulation_per_replica",
    "per_device_train_batch_size": "micro_batch_size",
    "learning_rate": "learning_rate",
    "warmup_steps": "lr_warmup_steps",
    "save_steps": "checkpoint_interval",
    "seed": "seed",
    "ddp_timeout": "timeout_seconds",
}
_HEADER = "# Made by scripts/create_config.py from {recipe}: change that, not this.\n"


def main(argv: list[str] | None = None) -> int:
    """Writes the configurations; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    try:
        recipe = load(args.recipe)
    except (RecipeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"create_config.py: {args.recipe}: {error}", file=sys.stderr)
        return 1
    print(table(recipe))
    if not args.check:
        folder = args.output_dir or ROOT / "configs" / recipe.fields["name"]
        write(recipe, folder.resolve(), args.recipe.name)
        print(
            f"\nwritten to {folder}; run: sbatch scripts/launch_training.slurm {shlex.quote(_from_root(folder.resolve()))}"
        )
    return 0


def load(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        RecipeError: with the stage, the field and the fix.
    """
    recipe = read_recipe(_EachKeyOnce(path.read_text(encoding="utf-8")).get_single_data(), planner_for)
    if recipe.fields["training_arguments"]:
        check_names(recipe.fields["training_arguments"])
    return recipe


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings name each key once; PyYAML takes the last of several and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise RecipeError(
                    f"{key.value}: given twice, again in line {key.start_mark.line + 1}; keep one of them"
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def check_names(given: Mapping[str, Any]) -> None:
    """Raises a RecipeError for an argument that train.py has not, or that the recipe has a field for."""
    for name, field in FIELD_OF_ARGUMENT.items():
        if name in given:
            raise RecipeError(
                f"training_arguments.{name}: the recipe's {field} decides it; change that, and leave this out"
            )
    sys.path.insert(0, str(ROOT / "examples" / "sft"))
    try:
        from arguments import DataArguments, ModelArguments, SFTConfig
    except ModuleNotFoundError:  # trl, where this machine only writes configurations: train.py will say it
        return
    finally:
        sys.path.pop(0)
    known = [field.name for kind in (ModelArguments, DataArguments, SFTConfig) for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise RecipeError(f"training_arguments.{name}: train.py has no such argument{nearest(name, known)}")


def planner_for(fields: Mapping[str, Any]):
    """The planner of a recipe's model, of which no weights are read; None where its configuration is not at hand.

    Raises:
        RecipeError: the recipe's `model_config` is none.
    """
    from transformers import AutoConfig

    from ds_minis.planner.inputs.models import shipped_config
    from ds_minis.planner.plan.planner import Planner
    from ds_minis.planner.step.profile import cache_folder

    folder = ROOT / fields["init_weights_path"]
    if fields["model_config"] is not None:
        try:
            sizes = dict(fields["model_config"])
            config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        except (KeyError, ValueError, TypeError) as error:
            raise RecipeError(
                f"model_config: {error!r}; give the names and values of the model's config.json"
            ) from None
    elif (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder)
    else:
        config = shipped_config(fields["init_weights_path"])
    return None if config is None else Planner(config, cache=cache_folder())


def table(recipe: Recipe) -> str:
    """The stages as nanotron's recipe has them, and what each needs."""
    steps = "cumulative" if recipe.fields["steps_are"] == "cumulative" else "each stage's own"
    lines = [
        f"{recipe.fields['name']}: {len(recipe.stages)} stages, train_steps are {steps}, optimizer: "
        f"{recipe.fields['optimizer']}",
        f"{'sequence_length':>15} {'rope_theta':>11} {'steps':>6} {'accumulation':>12} {'micro':>6}  "
        "ranks = replicas x size, and memory (as planned)",
    ]
    for planned in recipe.stages:
        stage = planned.stage
        need = "memory not planned (add model_config)"
        if planned.need is not None:
            need = f"{planned.need.device / GIB:.1f} GiB on each GPU, {planned.need.host / GIB:.1f} on each host"
        lines.append(
            f"{stage.sequence_length:>15,} {_theta(stage.rope_theta):>11} {stage.steps:>6} {stage.accumulation:>12} "
            f"{stage.micro_batch_size:>6}  {planned.world} = {planned.replicas} x {planned.size}; {need}"
        )
    return "\n".join(lines)


def write(recipe: Recipe, folder: Path, recipe_name: str) -> None:
    """Writes every stage's files."""
    header = _HEADER.format(recipe=recipe_name)
    for planned in recipe.stages:
        stage_folder = folder / planned.folder
        stage_folder.mkdir(parents=True, exist_ok=True)
        engine = recipe.fields["engine"]
        accelerate = _accelerate(recipe, planned, stage_folder)
        _write_yaml(stage_folder / "accelerate.yaml", header, accelerate)
        if engine.startswith("zero"):
            config = json.loads((ROOT / "deepspeed_configs" / f"{engine}.json").read_text(encoding="utf-8"))
            config |= {"mini_sequence": _mini_sequence(recipe, planned)}
            (stage_folder / "deepspeed.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_yaml(stage_folder / "train.yaml", header, train_arguments(recipe, planned))
        (stage_folder / "stage.env").write_text(header + _environment(recipe, planned), encoding="utf-8")
    (folder / "stages").write_text("".join(f"{planned.folder}\n" for planned in recipe.stages), encoding="utf-8")


def train_arguments(recipe: Recipe, planned: PlannedStage) -> dict[str, Any]:
    """Arguments of `examples/sft/train.py`; the recipe's own come last."""
    fields, settings, stage = recipe.fields, planned.settings, planned.stage
    resume = fields["optimizer"] == "resume"
    first = planned.index == 0
    floor = settings["min_decay_lr"]
    decays = floor not in (None, settings["learning_rate"])
    arguments = {
        "model_name_or_path": fields["init_weights_path"] if resume or first else _output(recipe, planned.index - 1),
        "dataset_name": settings["dataset_folder"],
        "splits": "train",
        "output_dir": _output(recipe, planned.index),
        # A stage goes on where the one before it has ended, or itself was interrupted.
        "resume_from_checkpoint": "last_if_any" if first or not resume else "last",
        "max_length": stage.sequence_length,
        "rope_theta": str(stage.rope_theta),
        "stop_file": _stop_file(recipe),
        "max_steps": planned.total_steps if resume else stage.steps,
        "gradient_accumulation_steps": stage.accumulation,
        "per_device_train_batch_size": stage.micro_batch_size,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine_with_min_lr" if decays else "constant_with_warmup",
        "warmup_steps": settings["lr_warmup_steps"],
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": fields["checkpoint_interval"] or stage.steps,
        "logging_steps": 1,
        "eval_strategy": "no",
        "report_to": "none",
        "seed": fields["seed"],
        "ddp_timeout": fields["timeout_seconds"],
    }
    if decays:
        # As a part of the rate: `min_lr` is looked up in the optimizer, and DeepSpeed's has no such field.
        arguments["lr_scheduler_kwargs"] = {"min_lr_rate": floor / settings["learning_rate"]}
    return arguments | fields["training_arguments"]


def _accelerate(recipe: Recipe, planned: PlannedStage, folder: Path) -> dict[str, Any]:
    engine = recipe.fields["engine"]
    if not engine.startswith("zero"):
        base = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text(encoding="utf-8"))
        return base | {"mini_sequence": _mini_sequence(recipe, planned)}
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": _from_root(folder / "deepspeed.json"),
            # The launch line is started on every machine, and not by pdsh from the first.
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": engine.startswith("zero3"),
        },
    }


def _mini_sequence(recipe: Recipe, planned: PlannedStage) -> dict[str, Any]:
    given = recipe.fields["mini_sequence"]
    settings = dict(given) if isinstance(given, dict) else {"enabled": bool(given)}
    mode = recipe.fields["sp_mode"]
    if planned.size > 1:
        settings["sequence_parallel"] = planned.size if mode == "auto" else {"size": planned.size, "mode": mode}
    return settings


def _environment(recipe: Recipe, planned: PlannedStage) -> str:
    """Variables for the launch scripts, as a shell reads them."""
    cluster = recipe.fields["cluster"]
    gres = cluster["gres"] or f"gpu:{planned.gpus_per_node}"
    values = {
        "STAGE_NAME": f"{recipe.fields['name']}-{planned.index}",
        "DEVICE": "cpu" if gres == "none" else "gpu",
        "NODES": planned.nodes,
        "GPUS_PER_NODE": planned.gpus_per_node,
        "NUM_PROCESSES": planned.world,
        "SEQUENCE_PARALLEL": planned.size,
        "CHECKPOINTS": recipe.fields["checkpoints_path"],
        "OUTPUT_DIR": _output(recipe, planned.index),
        "STOP_FILE": _stop_file(recipe),
        "TIME_LIMIT": cluster["time_limit"],
        "SAVE_BEFORE_END": cluster["save_before_end_seconds"],
        "SBATCH_FLAGS": " ".join([*([] if gres == "none" else [f"--gres={gres}"]), *cluster["sbatch"]]),
    }
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def _output(recipe: Recipe, index: int) -> str:
    """nanotron's one folder, in which each stage continues; or, where each starts anew, one for each."""
    folder = recipe.fields["checkpoints_path"]
    return folder if recipe.fields["optimizer"] == "resume" else f"{folder}/stage_{index}"


def _stop_file(recipe: Recipe) -> str:
    return f"{recipe.fields['checkpoints_path']}/save_and_stop"


def _theta(theta: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, "e9"), (1e6, "M")) if theta >= s), (1, ""))
    return f"{theta / scale:.4g}{unit}"


def _from_root(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _write_yaml(path: Path, header: str, content: dict[str, Any]) -> None:
    path.write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
