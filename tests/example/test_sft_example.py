"""The SFT example as its users start it: `sh run_peft_deepspeed.sh`, two processes, from another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import warm

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sft"
COLD = {"PYTHON": sys.executable}  # imports everything anew, as a user's first run does
SMALL = {"MAX_LENGTH": "128", "MAX_STEPS": "4", "PER_DEVICE_BATCH_SIZE": "2", "LEARNING_RATE": "3e-3"}


def run_script(
    cwd: Path, *flags: str, script: str = "run_peft_deepspeed.sh", cold: bool = False, **env: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", str(EXAMPLE / script), *flags],
        cwd=cwd, env=os.environ | (COLD if cold else warm.environment()) | SMALL | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip


def trained(
    cwd: Path, *flags: str, script: str = "run_peft_deepspeed.sh", cold: bool = False, **env: str
) -> tuple[dict, list[float], Path, str]:
    """Summary, losses, output folder and printed text of a run that ended well."""
    done = run_script(cwd, *flags, script=script, cold=cold, **env)
    assert done.returncode == 0, done.stdout[-5000:]
    (folder,) = (cwd / "outputs").iterdir()
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return json.loads((folder / "summary.json").read_text()), losses, folder, done.stdout


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("default"), cold=True)


@pytest.mark.engine
def test_default_run_trains_with_the_engine_and_mini_sequences(default_run):
    summary, losses, folder, printed = default_run
    assert summary["engine"] == "DEEPSPEED, DeepSpeedEngine" and summary["num_processes"] == 2
    assert summary["tiled_modules"] == 13 and summary["mini_sequence"]["enabled"]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 2**27
    assert Path(summary["output_dir"]) == folder
    for line in (
        "tiled as a whole: 4 x LlamaDecoderLayer",
        "===== done =====",
        "peak memory",
        "throughput",
        str(folder),
    ):
        assert line in printed, line
    assert printed.count(" tokens/s") == len(losses) + 1  # of each step, by ds_minis, and in the summary
    assert (
        "loss: tiled, LM head ModulesToSaveWrapper; calls with fused_lm_head=True" in printed
        and "not tiled" not in printed
    )
    assert "Warning" not in printed and len(printed.splitlines()) + 20 - len(losses) <= 40  # of the default's 20 steps


@pytest.mark.engine
def test_same_seed_same_run(default_run, tmp_path):
    _, losses, folder, _ = default_run
    _, again, folder_again, _ = trained(tmp_path)
    assert again == losses
    one, two = (load_file(f / "adapter_model.safetensors") for f in (folder, folder_again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
{convert}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base_model")
model = PeftModel.from_pretrained(model, sys.argv[1]).eval()
torch.manual_seed(0)
with torch.no_grad():
    logits = model(input_ids=torch.randint(0, 4096, (1, 64))).logits
    with model.disable_adapter():
        base = model(input_ids=torch.zeros(1, 64, dtype=torch.long)).logits
torch.save([logits, base], sys.argv[2])
assert ("ds_minis.convert" in sys.modules) == {with_ds_minis}
"""


@pytest.mark.engine
def test_saved_adapter_loads_without_ds_minis(default_run, tmp_path):
    folder, outputs = default_run[2], []
    for name, convert in (("without", "sys.modules['ds_minis'] = None"), ("with", "import ds_minis")):
        code = LOGITS.format(convert=convert, with_ds_minis=name == "with")
        if name == "with":
            code = code.replace(".eval()", "; ds_minis.convert_to_mini_sequence(model, {'chunk_size': 7}).eval()")
        env = os.environ | (warm.environment() if name == "with" else {"DS_MINIS_AUTOLOAD": "0"})
        python = warm.python() if name == "with" else sys.executable
        subprocess.run([python, "-c", code, str(folder), str(tmp_path / name)], check=True, env=env)
        outputs.append(torch.load(tmp_path / name))
    assert torch.equal(outputs[0][0], outputs[1][0])
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(t.abs().max() > 1e-4 for n, t in adapter.items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"mini_sequnce_size": 512}, ["'mini_sequnce_size'", "512", '"mini_sequence"']),
        ({"mini_sequence": {"chunk_size": "512"}}, ["chunk_size", "'512'", "whole number"]),
        ({"mini_sequence": {"chunk_size": 0}}, ["chunk_size", "0", "from 1"]),
        ({"mini_sequence": {"chunck_size": 5}}, ["'chunck_size'", "5", 'did you mean "chunk_size"']),
    ],
)
@pytest.mark.engine
def test_a_wrong_json_stops_before_the_model_is_built(tmp_path, section, words):
    config = json.loads((ROOT / "deepspeed_configs" / "zero2.json").read_text())
    del config["mini_sequence"]
    (tmp_path / "ds.json").write_text(json.dumps(config | section))
    done = run_script(tmp_path, NUM_PROCESSES="1", DEEPSPEED_CONFIG="ds.json")
    assert done.returncode != 0
    assert all(word in done.stdout for word in [*words, "ds.json"]), done.stdout[-3000:]
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import arguments

    return arguments


REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def test_command_line_takes_the_names_of_peft_and_deepspeed(arguments, tmp_path):
    argv = [*REQUIRED, "--output_dir", str(tmp_path), "--max_seq_length", "77", "--add_special_tokens", "False"]
    model_args, data_args, training_args = arguments.parse_arguments(argv + ["--use_peft_lora", "True"])
    assert (training_args.max_length, data_args.splits, model_args.use_peft_lora) == (77, "train,test", True)
    assert training_args.use_cpu == (not torch.accelerator.is_available()) and training_args.trust_remote_code is False


@pytest.mark.parametrize("value", [True, False])
def test_variant_of_gradient_checkpointing(arguments, tmp_path, value):
    argv = [*REQUIRED, "--output_dir", str(tmp_path), "--gradient_checkpointing", "True", "--use_reentrant", str(value)]
    assert arguments.parse_arguments(argv)[2].gradient_checkpointing_kwargs == {"use_reentrant": value}


@pytest.mark.parametrize("given", [["--deepspeed=x.json"], ["--deepspeed_config", "x.json"], ["--deepspeed", "x.json"]])
def test_every_spelling_of_the_deepspeed_flag_prepares_for_the_cpu(arguments, tmp_path, monkeypatch, given):
    class Prepared(Exception):
        pass

    def prepare(argv):
        raise Prepared(*argv[-2:])

    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(arguments.cpu, "prepare_deepspeed", prepare)
    with pytest.raises(Prepared) as error:
        arguments.parse_arguments([*REQUIRED, "--output_dir", str(tmp_path), *given])
    assert error.value.args == ("--deepspeed", "x.json")


@pytest.mark.parametrize(
    ("value", "settings"),
    [("true", True), ("True", True), ("False", False), ('{"chunk_size": 5}', {"chunk_size": 5})],
)
def test_mini_sequence_flag(arguments, value, settings):
    args = arguments.ModelArguments(model_name_or_path="m", mini_sequence=value)
    assert args.mini_sequence_settings() == settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"chat_template_format": "chatlm"}, "chatml"),
        ({"use_4bit_quantization": True}, "use_peft_lora"),
        ({"use_4bit_quantization": True, "use_8bit_quantization": True, "use_peft_lora": True}, "exclude each other"),
        ({"mini_sequence": "{chunk: 3}"}, "JSON"),
        (
            {"mini_sequence": '{"chunk_sise": 3}'},
            "--mini_sequence: unknown key 'chunk_sise' .*did you mean \"chunk_size\"",
        ),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, wrong, words):
    with pytest.raises(ValueError, match=words):
        arguments.ModelArguments(model_name_or_path="m", **wrong).mini_sequence_settings()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "fast"], "argument --learning_rate.*invalid float value: 'fast'"),
        (["--lerning_rate", "1"], "no such argument: --lerning_rate 1; did you mean --learning_rate?"),
        (["--learning_rate"], "expected one argument"),
        (["extra"], "no such argument: extra"),
        (["--save_strategy", "always"], "'no', 'steps', 'epoch', 'best'"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_one_line(arguments, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        arguments.parse_arguments([*REQUIRED, "--output_dir", str(tmp_path), *flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: fast", "learning_rate: 'fast' is not allowed: could not convert"),
        ("max_length: 12.5", "max_length: 12.5 is not allowed"),
        ("seed: true", "seed: True is not allowed: true and false are no numbers"),
        ("use_peft_lora: maybe", "use_peft_lora: 'maybe' is not allowed"),
        ("save_strategy: always", "save_strategy"),
        ("lora_rank: 3", r"no such argument: lora_rank \(value 3\)"),
        ("max_stepps: 3", "did you mean --max_steps?"),
        ("- a list", "is no YAML"),
    ],
)
def test_a_file_of_arguments_is_checked_as_the_command_line_is(arguments, tmp_path, line, words):
    file = tmp_path / "train.yaml"
    begin = f"model_name_or_path: m\ndataset_name: d\noutput_dir: {tmp_path}\n"
    file.write_text(f"{begin}{line}\n")
    with pytest.raises(ValueError, match=words):
        arguments.parse_arguments([str(file)])
    file.write_text(
        f"{begin}learning_rate: 1e-4\nuse_peft_lora: 'false'\nlogging_steps: 3\nresume_from_checkpoint: last\n"
    )
    model_args, _, training_args = arguments.parse_arguments([str(file)])
    assert training_args.learning_rate == 1e-4 and model_args.use_peft_lora is False
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="a mapping of arguments is allowed, got list"):
        arguments.parse_arguments([str(file)])


def test_missing_split_lists_those_there_are(arguments):
    import data

    with pytest.raises(ValueError, match="no split 'trian'; allowed: train, test"):
        data.load_splits(data.DataArguments(dataset_name=str(EXAMPLE / "default" / "data"), splits="trian"))


@pytest.mark.parametrize("value", ["True", "False"])
def test_a_flag_that_was_removed_says_what_to_do(arguments, tmp_path, value):
    with pytest.raises(ValueError, match="--mini_sequence_loss has been removed: leave it out"):
        arguments.parse_arguments([*REQUIRED, "--output_dir", str(tmp_path), "--mini_sequence_loss", value])


TRAINED_HEADS = [
    (
        {"use_peft_lora": True, "lora_modules_to_save": "embed_tokens,lm_head"},
        {"FSDP_VERSION": "2"},
        "under FSDP2",
    ),
    (
        {"use_peft_lora": True, "lora_modules_to_save": "lm_head", "mini_sequence": "true"},
        {"FSDP_VERSION": "1"},
        "under FSDP1",
    ),
]


@pytest.mark.parametrize(("model_args", "env", "words"), TRAINED_HEADS)
def test_engines_that_would_train_the_head_wrongly_are_refused(arguments, monkeypatch, model_args, env, words):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        arguments.check_head(arguments.ModelArguments(model_name_or_path="m", **model_args))
    if "FSDP1" not in words:
        arguments.check_head(arguments.ModelArguments(model_name_or_path="m", **model_args, mini_sequence="true"))
        with pytest.raises(ValueError, match=words):
            untiled = model_args | {"mini_sequence": '{"loss": false}'}
            arguments.check_head(arguments.ModelArguments(model_name_or_path="m", **untiled))
        monkeypatch.setenv("DS_MINIS_CONFIG", "true")  # as accelerate hands the section of its YAML to the ranks
        arguments.check_head(arguments.ModelArguments(model_name_or_path="m", **model_args))
    adapters = model_args | {"use_peft_lora": True, "lora_modules_to_save": None}
    arguments.check_head(arguments.ModelArguments(model_name_or_path="m", **adapters))
