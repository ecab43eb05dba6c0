"""Settings in the environment that nobody read: one line at the end of a process that trained, and only of that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        (TRAINS, {"DS_MINIS_CONFIG": "maybe"}, False),
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
