"""Settings in the environment that nobody read: one line at the end of a process that trained, and only of that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_minis import environment, unread_settings

ROOT = Path(__file__).parents[2]
TRAINS = """
import torch
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""
CONVERTS = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from models import batch, build
from ds_minis import convert_to_mini_sequence
import torch
def main():
    model = convert_to_mini_sequence(build("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch(5)).loss.backward()
    optimizer.step()
main()
"""
FAILS = "import torch\nraise SystemExit('no data')"


def printed(code: str, **env: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "DS_MINIS_AUTOLOAD": "1"} | env
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("ds_minis: "))


@pytest.mark.parametrize(
    ("code", "env", "tells"),
    [
        (TRAINS, {"DS_MINIS_CONFIG": "true"}, True),
        (TRAINS, {"DS_MINIS_CONFIG": '{"chunk_size": 5}', "DS_MINIS_CONFIG_SOURCE": "accelerate config my.yaml"}, True),
        (TRAINS, {"DS_MINIS_CONFIG": "false"}, False),
        (TRAINS, {"DS_MINIS_CONFIG": "true", "RANK": "1"}, False),
        (TRAINS, {"DS_MINIS_CONFIG": ""}, False),
        (FAILS, {"DS_MINIS_CONFIG": "maybe"}, False),
        (FAILS, {"DS_MINIS_CONFIG": "true"}, False),
        (CONVERTS, {"DS_MINIS_CONFIG": "true"}, False),
    ],
    ids=["trained", "by a launcher", "off", "another rank", "none", "wrong", "trained nothing", "converted"],
)
def test_one_line_where_a_process_has_trained_and_converted_nothing(code, env, tells):
    text = printed(code, **env)
    if not tells:
        assert text == ""
        return
    source = env.get("DS_MINIS_CONFIG_SOURCE", "environment variable DS_MINIS_CONFIG")
    assert text.startswith(
        f"ds_minis: {source} asks for mini-sequences, and this process has trained without converting"
    )
    assert "convert_to_mini_sequence(model)" in text and "\n" not in text


@pytest.mark.parametrize(
    ("value", "words"),
    [("maybe", "true, false or"), ('{"chunk_sise": 5}', "chunk_size"), ("true", ""), ("false", None)],
)
def test_wrong_settings_that_nobody_read_are_told_after_a_training_too(monkeypatch, capsys, value, words):
    told = []
    monkeypatch.setenv("DS_MINIS_CONFIG", value)
    monkeypatch.setattr(unread_settings.atexit, "register", lambda *call: told.append(call))
    monkeypatch.setattr(unread_settings, "has_converted_model", lambda: False)
    unread_settings.watch()
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters()).step()
    for call, *args in told:
        call(*args)
    text = capsys.readouterr().err
    if words is None:
        assert text == ""
        return
    assert "environment variable DS_MINIS_CONFIG" in text and "has trained without converting" in text
    assert words in text and text.count("\n") == 1


BEGINS = "from ds_minis.integrations.autoload import autoload; autoload()"  # as `import torch` does, in less time
LAUNCHES = f"{BEGINS}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {BEGINS!r}])"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DS_MINIS_CONFG", "true", "did you mean DS_MINIS_CONFIG?"),
        ("DS_MINI_CONFIG", "true", "did you mean DS_MINIS_CONFIG?"),
        ("DS_MINIS_AUTO_LOAD", "0", "did you mean DS_MINIS_AUTOLOAD?"),
        ("DS_MINIS_AUTOLOAD", "flase", "one of 0, false, off, 1, true, on is allowed"),
    ],
)
def test_a_misspelt_variable_is_told_once_by_a_launcher_and_what_it_starts(name, value, words):
    text = printed(LAUNCHES, **{name: value})
    assert text.startswith(f"ds_minis: {name}={value}: ") and words in text and "\n" not in text


def test_other_peoples_variables_are_left_alone(monkeypatch):
    for name in ("MINI_BATCH", "GEMINI_API_KEY", "DS_MINIS_HUGE", "MINIO_CONFIG", "DS_CONFIG", "MINI_SEQUENCE_LOSS"):
        monkeypatch.setenv(name, "1")
    for value in ("", "0", "Off", "1", "true", "ON"):
        monkeypatch.setenv("DS_MINIS_AUTOLOAD", value)
        assert environment.wrong_variables() == []
