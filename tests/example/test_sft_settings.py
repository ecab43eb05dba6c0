"""Wrong settings of the run scripts, and data that is a single file."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import sft_runs
from support import warm


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MAX_LENGHT": "128"}, ["MAX_LENGHT=128", "did you mean MAX_LENGTH?"]),
        ({"LEARNING_RATES": "1"}, ["LEARNING_RATES=1", "did you mean LEARNING_RATE?"]),
        ({"ZERO_STAGE": "4"}, ["ZERO_STAGE=4", "0, 1, 2, 2_offload, 3, 3_offload"]),
        ({"MINI_SEQUENCE_LOSS": "True"}, ["MINI_SEQUENCE_LOSS=True", "removed", "leave it out"]),
    ],
)
def test_a_wrong_setting_stops_the_script_with_one_line(tmp_path, variables, words):
    script = str(sft_runs.EXAMPLE / "run_peft_deepspeed.sh")
    env = os.environ | warm.environment() | variables
    done = subprocess.run(["sh", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and all(word in line for word in words) and not list(tmp_path.iterdir())


def test_right_settings_and_other_peoples_variables_are_left_alone(example):
    import settings

    right = dict.fromkeys(settings.NAMES, "1") | {"ZERO_STAGE": "3_offload"}
    others = {"MODELS": "x", "SEEDS": "1", "LORA": "1", "PYTHONPATH": "x", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    others |= {"HOME": "/", "SHELL": "sh", "MODE": "1", "USER": "u", "PYTHONHOME": "/", "PYTHON3": "x", "RANK": "0"}
    assert settings.wrong_settings(right | others | dict(os.environ), sft_runs.ROOT) == []
    own = {"ZERO_STAGE": "mine", "DEEPSPEED_CONFIG": "mine.json"}
    assert settings.wrong_settings(own, sft_runs.ROOT) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [("DATSET", "DATASET"), ("MODLE", "MODEL"), ("RESUM", "RESUME"), ("SPLIT", "SPLITS"), ("FLUL", "FULL"), ("SEDE", "SEED"),
     ("DATASETS", "DATASET"), ("MAX_STEP", "MAX_STEPS"), ("model", "MODEL"), ("NUM_PROCESES", "NUM_PROCESSES")],
)  # fmt: skip
def test_short_names_are_misspelt_too(example, name, meant):
    import settings

    (line,) = settings.wrong_settings({name: "1"}, sft_runs.ROOT)
    assert line.startswith(f"{name}=1: ") and f"did you mean {meant}?" in line


def test_every_setting_of_the_scripts_is_known(example):
    import re

    import settings

    texts = [path.read_text() for path in sft_runs.EXAMPLE.glob("*.sh")]
    used = {name for text in texts for name in re.findall(r"^\s*([A-Z_]+)=\$\{\1[:-]", text, re.M)}
    assert used and used <= set(settings.NAMES)


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text("\n".join([json.dumps({"messages": messages})] * 3))
    return path


def test_a_file_of_chats_is_training_data(example, chats):
    import data

    train, evaluation = data.load_splits(data.DataArguments(dataset_name=str(chats)))
    assert len(train) == 3 and train[0]["messages"][1]["content"] == "hello" and evaluation is None
    with pytest.raises(ValueError, match="one file, which is the split train"):
        data.load_splits(data.DataArguments(dataset_name=str(chats), splits="train,validation"))
    chats.rename(chats.with_suffix(".txt"))
    with pytest.raises(
        ValueError, match=r"chats.txt: a file that ends in one of .jsonl, .json, .parquet, .csv is allowed"
    ):
        data.load_splits(data.DataArguments(dataset_name=str(chats.with_suffix(".txt"))))


def test_a_file_that_is_not_there_is_not_asked_for_on_the_hub(example, chats):
    import data

    wrong = chats.with_name("chat.jsonl")
    with pytest.raises(ValueError, match=f"--dataset_name {wrong}: there is no such file .*; did you mean {chats}"):
        data.load_splits(data.DataArguments(dataset_name=str(wrong)))
    with pytest.raises(ValueError, match="there is no such file"):
        data.load_splits(data.DataArguments(dataset_name="nowhere/train.parquet"))


def test_a_model_that_is_not_there_names_the_folder_beside_it(example, tmp_path, monkeypatch):
    import modeling
    from arguments import ModelArguments

    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modeling.AutoTokenizer, "from_pretrained", _not_on_the_hub)
    with pytest.raises(OSError) as error:
        modeling.load_tokenizer(ModelArguments(model_name_or_path="mdoel"), SimpleNamespace(trust_remote_code=False))
    assert error.value.__notes__ == ["There is no folder mdoel here; did you mean model?"]


def _not_on_the_hub(*_, **__):
    raise OSError("not on the hub")


@pytest.mark.engine
def test_training_on_a_file_goes_without_the_evaluation_that_was_asked_for(tmp_path, chats):
    flags = {"dataset_name": chats, "eval_strategy": "epoch", "max_steps": 1, "save_strategy": "no"}
    status, printed = sft_runs.run("one", tmp_path / "out", **flags)
    assert status == 0 and f"no evaluation: {chats} has no second split" in printed, printed[-3000:]
