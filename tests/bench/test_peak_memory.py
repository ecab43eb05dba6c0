"""Peak memory of a step, counted tensor by tensor by the script that the README's figures come from."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "peak_memory.py"


def test_peak_falls_below_half_of_plain_checkpointing(tmp_path):
    output = tmp_path / "peak.json"
    small = ["--tokens", "3072", "--hidden_size", "128", "--layers", "2"]
    subprocess.run([sys.executable, SCRIPT, *small, "--repeats", "1", "--json", output], check=True)
    results = json.loads(output.read_text())["results"]
    plain, ours = results["plain checkpointing"], results["everything (the default)"]
    assert ours["peak_bytes"] < 0.5 * plain["peak_bytes"]
    assert abs(ours["loss"] - plain["loss"]) < 1e-5 * plain["loss"]
