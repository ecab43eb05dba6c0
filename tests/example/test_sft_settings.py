"""Wrong settings of the run scripts, and data that is a single file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sft_runs
from support import warm

ZERO2 = str(sft_runs.ROOT / "deepspeed_configs" / "zero2.json")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MAX_LENGHT": "128"}, ["MAX_LENGHT=128", "did you mean MAX_LENGTH?"]),
        ({"LEARNING_RATES": "1"}, ["LEARNING_RATES=1", "did you mean LEARNING_RATE?"]),
        ({"DS_MINIS_CONFG": "true"}, ["DS_MINIS_CONFG=true", "did you mean DS_MINIS_CONFIG?"]),
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


@pytest.mark.parametrize(
    ("python", "words"), [("/no/python", "there is no such program"), ("bare", "it lacks ds_minis, torch")]
)
def test_a_python_that_cannot_run_it_is_one_line(tmp_path, python, words):
    if python == "bare":
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    command = ["sh", str(sft_runs.EXAMPLE / "run_peft_fsdp.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"PYTHON={python}: ") and words in line


def test_right_settings_and_other_peoples_variables_are_left_alone(example):
    import settings

    right = {"ZERO_STAGE": "3_offload", "FULL": "1", "MAX_STEPS": "-1", "LEARNING_RATE": "1e-4", "LOGGING_STEPS": "0.1"}
    right |= {
        "PACKING": "true",
        "USE_FLASH_ATTN": "False",
        "SAVE_STRATEGY": "steps",
        "EVAL_STRATEGY": "no",
        "SEED": "0",
    }
    right |= {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_PROCESS_IP": "10.0.0.1", "MAIN_PROCESS_PORT": "29500"}
    right |= {
        "NUM_PROCESSES": "16",
        "DATASET": "x",
        "MODEL": "x",
        "RESUME": "last",
        "LORA_R": "",
        "ACCELERATE_CONFIG": "",
    }
    others = {"MODELS": "x", "SEEDS": "1", "LORA": "1", "PYTHONPATH": "x", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    others |= {"HOME": "/", "SHELL": "sh", "MODE": "1", "USER": "u", "PYTHONHOME": "/", "PYTHON3": "x", "RANK": "0"}
    assert settings.wrong_settings(right | others | dict(os.environ), sft_runs.ROOT, "deepspeed") == []
    own = {"ZERO_STAGE": "mine", "DEEPSPEED_CONFIG": ZERO2}
    assert settings.wrong_settings(own, sft_runs.ROOT, "deepspeed") == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [("DATSET", "DATASET"), ("MODLE", "MODEL"), ("RESUM", "RESUME"), ("SPLIT", "SPLITS"), ("FLUL", "FULL"), ("SEDE", "SEED"),
     ("DATASETS", "DATASET"), ("MAX_STEP", "MAX_STEPS"), ("model", "MODEL"), ("NUM_PROCESES", "NUM_PROCESSES")],
)  # fmt: skip
def test_short_names_are_misspelt_too(example, name, meant):
    import settings

    (line,) = settings.wrong_settings({name: "1"}, sft_runs.ROOT, "multigpu")
    assert line.startswith(f"{name}=1: ") and f"did you mean {meant}?" in line


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *launch.py*) echo "$@" ;;
    *-c*) echo 0 ;;
esac
"""


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({}, "--num_train_epochs 1 --max_steps 20 "),
        ({"NUM_TRAIN_EPOCHS": "3"}, "--num_train_epochs 3 --max_steps -1 "),
        ({"NUM_TRAIN_EPOCHS": "3", "MAX_STEPS": "7"}, "--num_train_epochs 3 --max_steps 7 "),
        ({"MAX_STEPS": "", "SEED": "3"}, "--seed 3 "),
        ({"FULL": "1"}, "--use_peft_lora False "),
    ],
)
def test_what_is_given_reaches_the_training(tmp_path, given, flags):
    """As was seen: the default's 20 steps were taken in the place of the epochs that were asked for."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python)} | given
    command = ["sh", str(sft_runs.EXAMPLE / "run_peft_deepspeed.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert flags in done.stdout and done.stderr == ""


WRONG = {
    "NUM_PROCESSES": ("two", "0", "-1", "1.5"),
    "NUM_MACHINES": ("x", "0"),
    "MACHINE_RANK": ("x", "-1"),
    "MAIN_PROCESS_PORT": ("x", "99999"),
    "FULL": ("yes", "2"),
    "FSDP_VERSION": ("3",),
    "ACCELERATE_CONFIG": ("/no.yaml", "."),
    "DEEPSPEED_CONFIG": ("/no.json", __file__),
    "QUANT_DTYPE": ("float8",),
    "LORA_R": ("x", "0"),
    "LORA_ALPHA": ("x",),
    "LORA_DROPOUT": ("x", "1", "nan"),
    "MAX_LENGTH": ("x", "0", "8K"),
    "PACKING": ("maybe",),
    "LEARNING_RATE": ("fast", "0", "inf"),
    "NUM_TRAIN_EPOCHS": ("x", "0"),
    "MAX_STEPS": ("x", "0", "-2"),
    "PER_DEVICE_BATCH_SIZE": ("x", "0"),
    "GRADIENT_ACCUMULATION_STEPS": ("x", "0"),
    "CHAT_TEMPLATE": ("chatlm",),
    "USE_FLASH_ATTN": ("perhaps",),
    "LOGGING_STEPS": ("x", "0"),
    "EVAL_STRATEGY": ("epochs",),
    "SAVE_STRATEGY": ("sometimes",),
    "SEED": ("x", "-1"),
}


def test_every_wrong_value_is_one_line_with_what_is_allowed(example):
    import settings

    assert WRONG.keys() == settings.RULES.keys()
    for name, values in WRONG.items():
        for value in values:
            (line,) = settings.wrong_settings({name: value}, sft_runs.ROOT, "multigpu")
            assert line.startswith(f"{name}={value}: ") and " is allowed" in line
    (line,) = settings.wrong_settings({"CHAT_TEMPLATE": "chatlm"}, sft_runs.ROOT, "multigpu")
    assert line.endswith("did you mean chatml?")


@pytest.mark.parametrize(
    ("engine", "given", "words"),
    [
        ("multigpu", {"ZERO_STAGE": "2"}, ["ZERO_STAGE=2: this script does not read it, but run_peft_deepspeed.sh"]),
        ("qlora-zero3", {"ZERO_STAGE": "2"}, ["ZERO_STAGE=2"]),
        ("deepspeed", {"FSDP_VERSION": "1"}, ["FSDP_VERSION=1"]),
        ("fsdp", {"DEEPSPEED_CONFIG": ZERO2}, ["DEEPSPEED_CONFIG="]),
        ("fsdp", {"QUANT_DTYPE": "float16"}, ["QUANT_DTYPE=float16"]),
        ("fsdp", {"FULL": "1", "LORA_R": "4", "LORA_DROPOUT": "0"}, ["LORA_R=4: FULL=1", "LORA_DROPOUT=0: FULL=1"]),
        ("fsdp", {"MACHINE_RANK": "5"}, ["MACHINE_RANK=5: 0 to 0 is allowed"]),
        ("fsdp", {"MAIN_PROCESS_IP": "10.0.0.1"}, ["MAIN_PROCESS_IP=10.0.0.1"]),
        ("fsdp", {"NUM_MACHINES": "2"}, ["MAIN_PROCESS_IP", "NUM_PROCESSES"]),
        ("fsdp", {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "a", "NUM_PROCESSES": "5"}, ["a multiple of NUM_MACHINES=2"]),
        ("fsdp", {"FSDP_VERSION": "2", "FULL": "1"}, []),
        ("qlora-zero3", {"DEEPSPEED_CONFIG": ZERO2, "QUANT_DTYPE": "float16"}, []),
        ("qlora-fsdp", {"QUANT_DTYPE": "float16", "LORA_R": "4"}, []),
    ],
)
def test_a_setting_that_would_change_nothing_is_an_error(example, engine, given, words):
    import settings

    lines = settings.wrong_settings(given, sft_runs.ROOT, engine)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "JSON parse error"),
        ("", "no rows|Couldn't infer|empty"),
        ('{"texts": "hello"}', "rows with messages, or .* are allowed, got texts"),
        ('{"prompt": "hello"}', "prompt and completion, .* got prompt"),
        ('{"messages": "hello"}', "messages: a list of .* is allowed, got 'hello'"),
        ('{"messages": [{"from": "user", "value": "hi"}]}', "messages: a list of"),
        ('{"text": "hello"}', ""),
        ('{"prompt": "hello", "completion": "world"}', ""),
        ('{"conversations": [{"from": "user", "value": "hi"}]}', ""),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(example, tmp_path, text, words):
    import data

    file = tmp_path / "own.jsonl"
    file.write_text(f"{text}\n" if text else "")
    arguments = data.DataArguments(dataset_name=str(file))
    if not words:
        assert len(data.load_splits(arguments)[0]) == 1
        return
    with pytest.raises(ValueError, match=f"--dataset_name {file}: .*({words})"):
        data.load_splits(arguments)


@pytest.mark.parametrize("kind", ["saved", "saved after a filter", "parquet", "csv"])
def test_a_split_without_rows_is_refused_with_the_folders_name(example, tmp_path, kind):
    import data
    from datasets import Dataset, DatasetDict, Features, Value

    full, none = (Dataset.from_dict({"text": rows}, Features({"text": Value("string")})) for rows in (["a"], []))
    if kind == "parquet":
        none.to_parquet(tmp_path / "test.parquet")
        full.to_parquet(tmp_path / "train.parquet")
    elif kind == "csv":
        (tmp_path / "train.csv").write_text("text\na\n")
        (tmp_path / "test.csv").write_text("text\n")
    else:
        none = none if kind == "saved" else full.filter(lambda row: False)
        DatasetDict(train=full, test=none).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=f"^--dataset_name {tmp_path}: a split of it has no rows"):
        data.load_splits(data.DataArguments(dataset_name=str(tmp_path), splits="train,test"))


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
    words = r"--model_name_or_path mdoel: there is no such folder here \(did you mean model\?\).*: not on the hub"
    with pytest.raises(ValueError, match=words):
        modeling.load_tokenizer(ModelArguments(model_name_or_path="mdoel"), SimpleNamespace(trust_remote_code=False))
    with pytest.raises(OSError, match="^not on the hub$"):  # of a folder that is there
        modeling.load_tokenizer(ModelArguments(model_name_or_path="model"), SimpleNamespace(trust_remote_code=False))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_modules_to_save": "embed_tokens,lmhead"}, "--lora_modules_to_save: .* 'lmhead'; did you mean lm_head?"),
        ({"lora_target_modules": "q_proj,nope"}, r"--lora_target_modules: .* 'nope'\. Allowed: act_fn, .*q_proj"),
        ({"lora_target_modules": "self_attn.q_proj,v_proj", "lora_modules_to_save": "lm_head"}, ""),
        ({}, ""),
    ],
)
def test_names_of_modules_that_the_model_has_not(example, given, words):
    """As was seen: PEFT passes over them, and nothing of that name is trained."""
    import modeling
    from arguments import ModelArguments
    from models import build

    arguments = ModelArguments(model_name_or_path="m", use_peft_lora=True, **given)
    if not words:
        modeling.require_adapted_modules(arguments, build("llama"))
        return
    with pytest.raises(ValueError, match=words):
        modeling.require_adapted_modules(arguments, build("llama"))


def _not_on_the_hub(*_, **__):
    raise OSError("not on the hub")


@pytest.mark.engine
def test_training_on_a_file_goes_without_the_evaluation_that_was_asked_for(tmp_path, chats):
    flags = {"dataset_name": chats, "eval_strategy": "epoch", "max_steps": 1, "save_strategy": "no"}
    status, printed = sft_runs.run("one", tmp_path / "out", **flags)
    assert status == 0 and f"no evaluation: {chats} has no second split" in printed, printed[-3000:]
