"""The command `ds-minis`: its version, its errors as one line each, its settings; adapters to check."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from peft import LoraConfig
from test_check import saved
from transformers import LlamaConfig

import ds_minis
from ds_minis.cli import check as check_module
from ds_minis.cli import main


@pytest.fixture
def llama(tmp_path):
    """The file of a configuration."""
    return str(saved(tmp_path, LlamaConfig(num_hidden_layers=3, num_key_value_heads=8)))


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed == f"ds-minis {ds_minis.__version__}\n" and metadata.version("ds_minis") in printed


@pytest.mark.parametrize("flags", [["--debug", "check"], ["check", "--debug"], ["check"]])
def test_an_error_is_one_line_without_debug(capsys, monkeypatch, llama, flags):
    def fail(*args, **kwargs):
        error = RuntimeError("it broke\nin two lines")
        error.add_note("and a note")
        raise error

    monkeypatch.setattr(check_module, "check", fail)
    if "--debug" in flags:
        with pytest.raises(RuntimeError, match="it broke"):
            main([*flags, llama])
        return
    assert main([*flags, llama]) == 3
    printed = capsys.readouterr()
    assert printed.err == "ds-minis check: RuntimeError: it broke in two lines: and a note (--debug shows where)\n"
    assert not printed.out


def test_an_interrupt_is_one_line(capsys, monkeypatch, llama):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "check", interrupt)
    assert main(["check", llama]) == 130 and capsys.readouterr().err == "ds-minis check: interrupted\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ds-minis: the following arguments are required: command"),
        (["chekc", "x"], "'chekc'; did you mean \"check\"?"),
        (["check"], "ds-minis check: the following arguments are required: model"),
        (["check", "x", "--jsn"], 'ds-minis check: no such argument: --jsn; did you mean "--json"?'),
        (["config", "valdate", "x"], 'did you mean "validate"?'),
        (["config", "validate", "x", "--quite"], "ds-minis config validate: no such argument: --quite ("),
        (["env", "x"], "ds-minis env: no such argument: x ("),
        (["needle", "x", "--max-context-length", "x"], "invalid int value: 'x'"),
        (["needle-plot", "x.json"], "--output"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_what_is_nearest(capsys, words, said):
    with pytest.raises(SystemExit) as end:
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in line and line.endswith("--help)")


def test_settings(capsys, llama):
    settings = ["--set", "scope=tokens", "--set", "chunk_size=37", "--set", 'exclude=["model.norm"]']
    assert main(["check", "--json", llama, *settings]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"] and result["layers"] == {} and result["tiled"] == {"LlamaMLP": 3, "LlamaRMSNorm": 6}
    assert result["settings"] == {"scope": "tokens", "chunk_size": 37, "exclude": ["model.norm"]}


def test_groups_of_heads_that_the_tiny_instance_does_not_have(capsys, llama):
    assert main(["check", "--json", llama, "--set", "head_groups=8"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {"LlamaDecoderLayer": 3}
    assert main(["check", llama, "--set", "num_mini_sequences=3"]) == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("scope=layers", "--set: scope: .*got 'layers' .*did you mean \"layer\""),
        ("chunksize=3", 'unknown key .*did you mean "chunk_size"'),
        ("tokens", "KEY=VALUE is allowed, such as scope=tokens, got 'tokens'"),
        ("head_groups=3", '3 groups cannot be made of 8 KV heads; allowed: 1, 2, 4, 8 or "auto"'),
    ],
)
def test_wrong_settings(capsys, llama, setting, words):
    assert main(["check", llama, "--set", setting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_an_adapter(tmp_path, capsys, llama):
    adapter = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", base_model_name_or_path=llama)
    adapter.save_pretrained(tmp_path / "adapter")
    assert main(["check", "--json", str(tmp_path / "adapter")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"] and result["adapter"] == "LORA" and result["base_model"] == llama
    assert "lora_" in result["grad_name"] and result["layers"] == {"LlamaDecoderLayer": 3}
    adapter.base_model_name_or_path = None
    adapter.save_pretrained(tmp_path / "adapter")
    assert main(["check", str(tmp_path / "adapter")]) == 2
    assert "names no base model" in capsys.readouterr().err


MISSING = """
import sys
sys.modules["accelerate"] = None
try:
    from ds_minis import MiniSequencePlugin
except ImportError as error:
    print(type(error).__name__, error)
from ds_minis import MiniSequenceConfig
"""


def test_an_engine_that_is_not_installed():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=100)
    expected = "ImportError ds_minis.MiniSequencePlugin needs accelerate, which is not installed here: "
    assert done.stdout == f"{expected}pip install accelerate\n", done.stderr
