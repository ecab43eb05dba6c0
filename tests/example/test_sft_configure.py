"""`SEQUENCE_PARALLEL` of the run scripts: copies of the configurations with one more setting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def configure(folder: Path, setting: str, *files: Path | str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples" / "sft" / "configure.py", folder, setting, *files]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_yaml_has_the_setting_beside_what_it_had(tmp_path):
    source = tmp_path / "mine.yaml"
    source.write_text("distributed_type: FSDP\nmini_sequence: {chunk_size: 64}\n")
    (tmp_path / "copies").mkdir()
    assert configure(tmp_path / "copies", "sequence_parallel=2", source, "").returncode == 0
    copy = yaml.safe_load((tmp_path / "copies" / "mine.yaml").read_text())
    assert copy == {"distributed_type": "FSDP", "mini_sequence": {"chunk_size": 64, "sequence_parallel": 2}}


def test_with_deepspeed_the_json_has_it_and_the_yaml_names_the_copy(tmp_path):
    setting = {"size": 2, "mode": "ring"}
    files = ROOT / "accelerate_configs" / "zero3.yaml", ROOT / "deepspeed_configs" / "zero3.json"
    assert configure(tmp_path, f"sequence_parallel={json.dumps(setting)}", *files).returncode == 0
    copy, plain = json.loads((tmp_path / "zero3.json").read_text()), json.loads(files[1].read_text())
    assert copy == plain | {"mini_sequence": {"sequence_parallel": setting}}
    section = yaml.safe_load((tmp_path / "zero3.yaml").read_text())["deepspeed_config"]
    assert section["deepspeed_config_file"] == str(tmp_path / "zero3.json") and section["zero3_init_flag"] is True


@pytest.mark.parametrize(
    ("setting", "section", "words"),
    [
        ("sequence_parallel=2", "false", "mini_sequence is false"),
        ("sequence_parallel=two", "true", "a JSON value is allowed"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, setting, section, words):
    source = tmp_path / "mine.yaml"
    source.write_text(f"mini_sequence: {section}\n")
    done = configure(tmp_path, setting, source)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["accelerate_configs/fsdp_sp.yaml", "deepspeed_configs/zero3_sp.json"])
def test_the_shipped_configurations_differ_in_the_section_alone(name):
    load = json.loads if name.endswith("json") else yaml.safe_load
    shipped, plain = (load((ROOT / file).read_text()) for file in (name, name.replace("_sp", "")))
    assert shipped == plain | {"mini_sequence": {"sequence_parallel": 2}}
