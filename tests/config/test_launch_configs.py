"""The configuration files: readable by their engines, with launch lines that say what works."""

import argparse
import json
import os
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig

import ds_minis

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
JSONS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
TYPES = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "fsdp1": "FSDP", "fsdp_sp": "FSDP"}


def launch_line(path: Path) -> list[str]:
    """The command in a file's header, from `accelerate launch` to the end of its last continued line."""
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    first = next(i for i, line in enumerate(lines) if line.startswith("accelerate launch"))
    last = next(i for i, line in enumerate(lines) if i >= first and not line.endswith("\\"))
    return shlex.split(" ".join(line.rstrip("\\") for line in lines[first : last + 1]))


def test_every_engine_has_its_files():
    assert {p.stem for p in YAMLS} == {"ddp", "fsdp", "fsdp1", "fsdp_sp", "zero2", "zero3", "zero3_offload"}
    assert {p.stem for p in JSONS} == {"zero0", "zero1", "zero2", "zero3", "zero3_sp", "zero2_offload", "zero3_offload"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for variable in ("DS_MINIS_CONFIG", "DS_MINIS_CONFIG_SOURCE"):  # a launcher sets them; gone again after the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    ds_minis.register()
    config = load_config_from_file(str(path))
    assert ("DS_MINIS_CONFIG" in os.environ) == (config.distributed_type != "DEEPSPEED")  # or else it is in the JSON
    assert config.distributed_type == TYPES.get(path.stem, "DEEPSPEED")
    assert "num_processes" not in path.read_text().partition("compute_environment")[2]
    if config.distributed_type == "DEEPSPEED":
        name = config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(Path(name).read_text())["mini_sequence"] is True
        assert config.deepspeed_config["zero3_init_flag"] == ("zero3" in name)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_reads_the_file(path):
    config = HfDeepSpeedConfig(str(path))
    assert config.config["zero_optimization"]["stage"] == int(path.stem[4])
    assert config.is_offload() == path.stem.endswith("offload")
    assert "mini_sequence" in config.config


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_launch_line_of_the_header(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "sft"))
    from arguments import DataArguments, ModelArguments
    from transformers import HfArgumentParser
    from trl import SFTConfig

    line = launch_line(path)
    assert line[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(line[2:])
    assert Path(args.config_file) == path.relative_to(ROOT) and Path(args.training_script).is_file()
    flags, unknown = HfArgumentParser((ModelArguments, DataArguments, SFTConfig)).parse_known_args(
        args.training_script_args
    )
    assert not unknown and isinstance(flags, argparse.Namespace)
    assert Path(flags.model_name_or_path, "config.json").is_file() and Path(flags.dataset_name, "train.jsonl").is_file()
    assert Path(flags.output_dir) == Path("outputs", path.stem)


@pytest.mark.parametrize("path", [*YAMLS, *JSONS], ids=lambda path: path.name)
def test_file_is_named_where_users_look(path):
    page = (ROOT / "deepspeed_configs" / "README.md").read_text() + (
        ROOT / "examples" / "sft" / "README.md"
    ).read_text()
    assert path.name in page
