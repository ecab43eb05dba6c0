"""The benchmark of the LM head's loss: every way that runs here gives the right loss and gradients, and all is reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "loss_head.py"
SMALL = ["--device", "cpu", "--tokens", "512", "--hidden_size", "64", "--vocab_size", "1001", "--repeats", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_run_on_a_cpu(dtype, tmp_path):
    output = tmp_path / "results" / "loss_head.json"
    command = [sys.executable, SCRIPT, *SMALL, "--dtype", dtype, "--json", output]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    content = json.loads(output.read_text())
    assert {"device", "versions", "date", "commit", "command", "arguments"} <= content.keys()
    results = content["results"]
    for name, result in results.items():
        assert name in run.stdout and "failed" not in result, result
        if "skipped" in result:
            assert "CUDA" in result["skipped"] or "installed" in result["skipped"]
            continue
        assert len(result["all_seconds"]) == 2 and result["seconds"] > 0
        assert (result["weight_grad_error"] is None) == name.endswith("frozen head")
        assert (result["weight_grad_error"] or 0) < (1e-5 if dtype == "float32" else 2e-2)
        assert result["hidden_grad_error"] < (1e-5 if dtype == "float32" else 2e-2)
    ours, plain = results["ds_minis, torch path"], results["plain"]
    assert ours["peak_bytes"] < 0.7 * plain["peak_bytes"]
    assert (
        ours["weight_grad_error"] <= 1.3 * plain["weight_grad_error"]
    )  # a CPU rounds each chunk's product to bfloat16
    assert "CUDA" in results["ds_minis, kernel"]["skipped"]
