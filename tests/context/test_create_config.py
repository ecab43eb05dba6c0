"""Recipes, and the configurations that scripts/create_config.py makes of them."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from support import warm

from ds_minis.config import MiniSequenceConfig
from ds_minis.context import SEED_STAGES, rope_theta_for
from ds_minis.context.recipes.estimate import GIB, bytes_of
from ds_minis.context.recipes.recipe import RecipeError, read_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "create_config.py"
SHIPPED = sorted((ROOT / "examples" / "long_context").glob("*.yaml"))
RECIPE = {
    "name": "two",
    "init_weights_path": "some/model",
    "dataset_folder": "some/data",
    "checkpoints_path": "outputs/two",
    "sequence_length": [65536, 131072],
    "rope_theta": ["22.4e6", 8e7],
    "train_steps": [10, 20],
    "sp": 8,
    "cluster": {"nodes": 1, "gpus_per_node": 8, "memory_per_gpu": "80GB", "memory_per_node": "1TB"},
}


def changed(**fields):
    """The recipe with other fields; those of the cluster by `cluster__NAME`."""
    cluster = {
        name.removeprefix("cluster__"): fields.pop(name) for name in list(fields) if name.startswith("cluster__")
    }
    return RECIPE | {"cluster": RECIPE["cluster"] | cluster} | fields


@pytest.fixture
def create_config(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("create_config")


def test_without_arguments_the_seeds_table_is_written(tmp_path):
    """In a process of its own, as its users run it."""
    command = [warm.python(), SCRIPT, "--output_dir", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | warm.environment(), check=True)
    rows = [line.split()[:5] for line in ran.stdout.splitlines() if line.strip()[:1].isdigit() and " x " in line]
    assert rows[:4] == [
        ["65,536", "22.4M", "10", "32", "1"],
        ["131,072", "80M", "10", "32", "1"],
        ["524,288", "1e9", "10", "16", "1"],
        ["1,048,576", "3.6e9", "10", "8", "1"],
    ]
    assert (tmp_path / "stages").read_text().splitlines() == [
        "config_0_theta=22.4M_steps=10_seq_len=65536",
        "config_1_theta=80M_steps=20_seq_len=131072",
        "config_2_theta=1000M_steps=30_seq_len=524288",
        "config_3_theta=3600M_steps=40_seq_len=1048576",
    ]
    for stage, name in zip(SEED_STAGES, (tmp_path / "stages").read_text().splitlines(), strict=True):
        train = yaml.safe_load((tmp_path / name / "train.yaml").read_text())
        assert train["max_length"] == stage.sequence_length and float(train["rope_theta"]) == stage.rope_theta
        assert train["gradient_accumulation_steps"] == stage.accumulation and train["learning_rate"] == 2e-5


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_gives_complete_stages(create_config, tmp_path, path):
    recipe = create_config.load(path)
    create_config.write(recipe, tmp_path, path.name)
    for planned in recipe.stages:
        folder = tmp_path / planned.folder
        accelerate = yaml.safe_load((folder / "accelerate.yaml").read_text())
        assert accelerate["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
        deepspeed = json.loads((folder / "deepspeed.json").read_text())
        settings = MiniSequenceConfig.from_value(deepspeed["mini_sequence"])
        assert settings.sequence_parallel.size == planned.size
        sourced = subprocess.run(
            ["sh", "-c", '. "$1/stage.env" && echo "$NODES $NUM_PROCESSES $STAGE_NAME"', "sh", folder],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        expected = [planned.nodes, planned.world, f"{recipe.fields['name']}-{planned.index}"]
        assert sourced.stdout.split() == list(map(str, expected))
        assert yaml.safe_load((folder / "train.yaml").read_text())["ddp_timeout"] in (300, 1800)


def test_the_arguments_are_ones_that_train_py_takes(create_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "sft")
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    arguments = importlib.import_module("arguments")
    decaying = {"learning_rate": 1e-3, "min_decay_lr": 1e-4, "lr_warmup_steps": 2, "optimizer": "fresh"}
    recipe = read_recipe(changed(**decaying, training_arguments={"packing": True}))
    create_config.write(recipe, tmp_path, "r")
    parsed = [arguments.parse_arguments([str(tmp_path / stage.folder / "train.yaml")]) for stage in recipe.stages]
    model, _, training = parsed[1]
    assert (model.rope_theta, training.max_length, training.packing) == ("80000000.0", 131072, True)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": pytest.approx(0.1)} and training.max_steps == 10


def test_resume_continues_in_one_folder_and_fresh_takes_the_weights_alone(create_config):
    resume, fresh = (read_recipe(changed(optimizer=optimizer)) for optimizer in ("resume", "fresh"))
    first, second = (create_config.train_arguments(resume, stage) for stage in resume.stages)
    assert first["output_dir"] == second["output_dir"] == "outputs/two" and second["max_steps"] == 20
    assert first["resume_from_checkpoint"] == "last_if_any" and second["resume_from_checkpoint"] == "last"
    assert first["model_name_or_path"] == second["model_name_or_path"] == "some/model"
    first, second = (create_config.train_arguments(fresh, stage) for stage in fresh.stages)
    assert second["model_name_or_path"] == first["output_dir"] == "outputs/two/stage_0"
    assert second["max_steps"] == 10 and second["resume_from_checkpoint"] == "last_if_any"


def test_what_a_stage_is_given_beside_its_lengths(create_config, tmp_path):
    recipe = read_recipe(changed(sp_mode="ring", cluster__save_before_end_seconds=77))
    create_config.write(recipe, tmp_path, "r")
    folder = tmp_path / recipe.stages[1].folder
    train = yaml.safe_load((folder / "train.yaml").read_text())
    expected = {
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "save_steps": 10,
    }
    assert expected.items() <= train.items()
    assert yaml.safe_load((folder / "accelerate.yaml").read_text())["deepspeed_config"]["zero3_init_flag"] is True
    settings = json.loads((folder / "deepspeed.json").read_text())["mini_sequence"]
    assert settings["sequence_parallel"] == {"size": 8, "mode": "ring"}
    variables = (folder / "stage.env").read_text()
    assert "SAVE_BEFORE_END=77" in variables and "--gres=gpu:8" in variables and "DEVICE=gpu" in variables


def test_nanotrons_fields_and_parallelism_are_taken(create_config):
    recipe = read_recipe(
        changed(
            tokenizer_path="some/model", resume_checkpoint_path="outputs/two", checkpoint_interval=5, min_decay_lr=2e-5,
            lr_decay_steps=100, lr_warmup_steps=0, learning_rate=2e-5, tp=8, sp=[4, 8], cluster__nodes=[4, 8],
            batch_accumulation_per_replica=[32, 32], micro_batch_size=[1, 1], optimizer="fresh",
        )
    )  # fmt: skip
    assert [(planned.world, planned.size, planned.replicas, planned.samples) for planned in recipe.stages] == [
        (32, 32, 1, 32),
        (64, 64, 1, 32),
    ]
    assert create_config.train_arguments(recipe, recipe.stages[0])["save_steps"] == 5


def test_replicas_share_the_samples_of_a_step():
    planned = read_recipe(changed(sp=4, batch_accumulation_per_replica=3, micro_batch_size=5)).stages[0]
    assert (planned.replicas, planned.samples) == (2, 30)


def test_the_formula_gives_a_base_that_is_left_out():
    recipe = read_recipe(changed(rope_theta="auto", rope_base_length=8192, rope_base_theta="5.0e5"))
    assert [planned.stage.rope_theta for planned in recipe.stages] == [
        rope_theta_for(length, 8192, 5e5) for length in (65536, 131072)
    ]


def test_steps_of_each_stage_may_be_given():
    recipe = read_recipe(changed(train_steps=7, steps_are="each"))
    assert [(planned.stage.steps, planned.total_steps) for planned in recipe.stages] == [(7, 7), (7, 14)]


WRONG = {
    "no such field": ({"sequence_lenght": [1]}, 'sequence_lenght: no field has this name; did you mean "sequence_length"'),
    "no such field of the cluster": ({"cluster__node": 2}, 'cluster.node: .* did you mean "nodes"'),
    "a field is missing": ({"name": None}, "name: the recipe has none; add it"),
    "lists of unequal length": (
        {"sp": [8]},
        "stage 1: sp: 1 values, but sequence_length has 2; give one for each stage, or one value for all",
    ),
    "nodes of unequal length": ({"cluster__nodes": [1, 1, 1]}, "stage 2: cluster.nodes: 3 values"),
    "a world that does not divide": (
        {"sp": [8, 3]},
        r"stage 1 .sequence_length 131072.: sp: 8 ranks .1 nodes of 8. cannot be divided into groups of 3 .*one of 1, 2, 4, "
        "8, or cluster.nodes to a multiple of 3",
    ),
    "groups over machines that do not divide": ({"sp": 12}, "groups of 12 .*cluster.nodes to a multiple of 3$"),
    "steps that do not grow": (
        {"train_steps": [10, 10]},
        "stage 1 .*: train_steps: 10 is not more than 10, .*cumulative; give 20 for 10 steps of this stage, or set "
        "steps_are: each",
    ),
    "no number": ({"micro_batch_size": [1, 0]}, "stage 1 .*: micro_batch_size: a whole number of 1 or more is .*got 0"),
    "no base": ({"rope_theta": "large"}, "stage 0 .*: rope_theta: a number is allowed, got 'large'"),
    "auto without a base": ({"rope_theta": "auto"}, "stage 0 .*: rope_theta: auto .* needs rope_base_length; add it"),
    "another tokenizer": ({"tokenizer_path": "x"}, "tokenizer_path: 'x' is not init_weights_path.*copy the tokenizer"),
    "another checkpoint": ({"resume_checkpoint_path": "x"}, "resume_checkpoint_path: 'x' is not checkpoints_path"),
    "a rate that decays over stages": (
        {"learning_rate": "2e-5", "min_decay_lr": 1e-5},
        "stage 0 .*: min_decay_lr: 1e-05 is not learning_rate .2e-05.*optimizer: fresh",
    ),
    "no engine": ({"engine": "megatron"}, "engine: one of ddp, fsdp, .* is allowed, got 'megatron'"),
    "a setting of mini-sequences": ({"mini_sequence": {"chunk": 2}}, "mini_sequence: .*chunk"),
    "sequence parallelism twice": ({"mini_sequence": {"sequence_parallel": 2}}, "mini_sequence.sequence_parallel: .*give sp"),
    "no size": ({"cluster__memory_per_gpu": "lots"}, "cluster.memory_per_gpu: a size such as 80GB"),
    "DeepSpeed's optimizer over another number of ranks": (
        {"cluster__nodes": [1, 2]},
        "stage 1 .*: cluster.nodes: 16 ranks continue a checkpoint of 8, .*optimizer: fresh, or engine: fsdp",
    ),
    "sequence parallelism without mini-sequences": ({"mini_sequence": False}, "stage 0: sp: needs mini_sequence"),
    "no stage": ({"sequence_length": []}, "sequence_length: the list is empty"),
    "an infinite base": ({"rope_theta": ".inf"}, "stage 0 .*: rope_theta: a number is allowed, got '.inf'"),
    "no positive rate": ({"learning_rate": 0}, "stage 0 .*: learning_rate: more than 0 is allowed, got 0"),
    "a rate that rises": (
        {"learning_rate": 1e-5, "min_decay_lr": 1e-3, "optimizer": "fresh"},
        r"stage 0 .*: min_decay_lr: 0 to 1e-05 .learning_rate. is allowed, got 0.001",
    ),
    "a warm-up in words": ({"lr_warmup_steps": "two"}, "stage 0 .*: lr_warmup_steps: a whole number of 0 or more"),
    "a warm-up longer than the stage": (
        {"lr_warmup_steps": 10, "min_decay_lr": 1e-6, "optimizer": "fresh"},
        "stage 0 .*: lr_warmup_steps: 10 leaves none of 10 steps",
    ),
    "a data set that is none": ({"dataset_folder": ["a", 3]}, "stage 1 .*: dataset_folder: a text is allowed, got 3"),
    "no seed": ({"seed": "x"}, "seed: a whole number of 0 or more is allowed, got 'x'"),
    "no timeout": ({"timeout_seconds": "30min"}, "timeout_seconds: a whole number of 1 or more"),
    "no interval": ({"checkpoint_interval": 0}, "checkpoint_interval: a whole number of 1 or more"),
    "no folder name": ({"name": "../other"}, "name: letters, digits, - and . are allowed .*got '../other'"),
    "no folder": ({"checkpoints_path": ["a", "b"]}, "checkpoints_path: a text is allowed"),
    "arguments in a list": ({"training_arguments": ["packing"]}, "training_arguments: a mapping of"),
    "an hour that YAML has made a number": (
        {"cluster__time_limit": 86400}, 'cluster.time_limit: a text such as "24:00:00" .*quotes',
    ),
    "too long a signal": ({"cluster__save_before_end_seconds": 70000}, "save_before_end_seconds: Slurm takes 65535 at most"),
    "a signal before the start": (
        {"cluster__time_limit": "30:00"}, "save_before_end_seconds: 3600 is not less than cluster.time_limit, 30:00 .1800 s.",
    ),
    "no time": ({"cluster__time_limit": "one day"}, "cluster.time_limit: minutes, .* is allowed, got 'one day'"),
    "flags as one text": ({"cluster__sbatch": "--partition=a"}, "cluster.sbatch: a list of flags without spaces"),
    "a flag with a space": ({"cluster__sbatch": ["--comment=a b"]}, "cluster.sbatch: a list of flags without spaces"),
    "no gres": ({"cluster__gres": 4}, "cluster.gres: a text is allowed, got 4"),
    "a grid of another size": (
        {"sp_mode": {"ulysses": 2, "ring": 2}}, "stage 0 .*: sp_mode: .*whose product is 8, is allowed",
    ),
    "no mapping": (["a"], "the recipe is no mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_stops_with_the_stage_the_field_and_the_fix(name):
    fields, said = WRONG[name]
    with pytest.raises(RecipeError, match=said):
        read_recipe(changed(**fields) if isinstance(fields, dict) else fields)


def test_a_wrong_recipe_is_one_line_and_writes_nothing(create_config, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(sp=3)))
    assert create_config.main([str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stage 0" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("weight_decay", None),
        ("weight_decai", 'train.py has no such argument; did you mean "weight_decay"?'),
        ("max_length", "the recipe's sequence_length decides it; change that, and leave this out"),
    ],
)
def test_an_argument_that_train_py_has_not_or_a_field_decides_is_refused(
    create_config, tmp_path, capsys, argument, said
):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(training_arguments={argument: 1e-5})))
    assert create_config.main([str(tmp_path / "r.yaml"), "--check"]) == (0 if said is None else 1)
    assert (f"training_arguments.{argument}: {said}" in capsys.readouterr().err) == (said is not None)


def test_what_train_py_is_given_of_a_field_cannot_be_given_twice(create_config):
    """Each argument that follows from a field is one that the configuration has."""
    recipe = read_recipe(changed())
    written = create_config.train_arguments(recipe, recipe.stages[0])
    assert create_config.FIELD_OF_ARGUMENT.keys() <= written.keys()


def test_a_field_that_is_given_twice_is_refused(create_config, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed()) + "sp: 4\n")
    assert create_config.main([str(tmp_path / "r.yaml"), "--check"]) == 1
    assert "sp: given twice, again in line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("10:00:01", 36001),
        ("0-2", 7200),
        ("0-1:30", 5400),
        ("0-0:1:5", 65),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(limit, seconds):
    read_recipe(changed(cluster__time_limit=limit, cluster__save_before_end_seconds=(seconds or 65536) - 1))
    if seconds is not None:
        with pytest.raises(RecipeError, match=f".{seconds} s."):
            read_recipe(changed(cluster__time_limit=limit, cluster__save_before_end_seconds=seconds))


TOO_LONG = {"init_weights_path": "meta-llama/Meta-Llama-3-8B", "sequence_length": [65536, 4194304]}
TOO_LARGE = {
    "on a GPU": (
        {},
        r"stage 1 .sequence_length 4194304.: cluster.memory_per_gpu: 74.5 GiB, but as planned it needs \d+.\d GiB on each "
        r"GPU .*layer inputs 128.0.*; set mini_sequence: {offload: cpu}, or cluster.nodes 4 with sp 32",
    ),
    "on a GPU, by a little": (
        {"sequence_length": [65536, 131072], "cluster__memory_per_gpu": "24GiB"},
        "stage 1 .sequence_length 131072.: cluster.memory_per_gpu: 24.0 GiB, but as planned it needs 25.6 GiB on each GPU",
    ),
    "on a host": (
        {"mini_sequence": {"offload": "cpu"}},
        "stage 1 .*: cluster.memory_per_node: 931.3 GiB, but as planned it needs .* 1024.0 GiB on each host; use more nodes",
    ),
}


@pytest.mark.parametrize("where", TOO_LARGE)
def test_a_stage_that_cannot_fit_stops_with_what_it_needs_and_what_would_do(create_config, where):
    fields, said = TOO_LARGE[where]
    with pytest.raises(RecipeError, match=said):
        read_recipe(changed(**TOO_LONG | fields), create_config.planner_for)


def test_a_model_without_known_sizes_is_not_planned_and_says_so(create_config):
    recipe = read_recipe(changed(), create_config.planner_for)
    assert "memory not planned (add model_config)" in create_config.table(recipe)
    with pytest.raises(RecipeError, match="model_config: KeyError.'model_type'.*config.json"):
        read_recipe(changed(model_config={"hidden_size": 8}), create_config.planner_for)


def test_the_page_says_what_the_planner_plans(create_config, tmp_path):
    eight, many = (ROOT / "examples" / "long_context" / f"1M_4stages_{n}gpus.yaml" for n in (8, 64))
    offload = tmp_path / "r.yaml"
    offload.write_text(eight.read_text() + "mini_sequence: {offload: cpu}\n")
    plans = [create_config.load(path).stages for path in (eight, many, offload)]
    page = (ROOT / "docs" / "long_context.md").read_text(encoding="utf-8")
    for on_eight, on_many, offloaded in zip(*plans, strict=True):
        needs = [f"{stage.need.device / GIB:.1f}" for stage in (on_eight, on_many, offloaded)]
        row = [f"{on_eight.stage.sequence_length:,}", *needs, f"{offloaded.need.host / GIB:.0f}"]
        assert f"| {' | '.join(row)} |" in page


def test_sizes():
    assert bytes_of("80GB") == 80e9 and bytes_of("1.5 TiB") == 1.5 * 2**40
