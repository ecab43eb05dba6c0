"""`sh examples/long_context/run_tiny.sh`, with a few training steps: all its parts run and leave what they say."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support import warm

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'ds_minis[plots]'")
ROOT = Path(__file__).parents[2]


@pytest.mark.engine
def test_a_shortened_run_leaves_models_results_and_pictures(tmp_path):
    done = subprocess.run(
        ["sh", ROOT / "examples" / "long_context" / "run_tiny.sh"],
        env=os.environ | warm.environment() | {"SCALE": "0.01", "LENGTHS": "64,200", "OUTPUT_DIR": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "98,880 parameters, 2 processes" in done.stdout and "each sequence on 2 ranks" in done.stdout
    thetas = {"growing": 96919, "fixed": 100}
    for way, theta in thetas.items():
        results = json.loads((tmp_path / f"{way}.json").read_text())
        assert len(results["cells"]) == 10 and all(cell["total"] == 4 for cell in results["cells"])
        config = json.loads((tmp_path / way / "config.json").read_text())
        for found in (results["rope_theta"], config["rope_parameters"]["rope_theta"]):
            assert round(found) == theta
        frames = [json.loads((tmp_path / f"{way}-{i}.json").read_text()) for i in range(4)]
        assert [frame["trained_length"] for frame in frames] == [64, 256, 1024, 2048]
        grown = [100, 1565, 24498, 96919]
        assert [round(frame["rope_theta"]) for frame in frames] == (grown if way == "growing" else [100] * 4)
    assert {path.name for path in tmp_path.iterdir()} >= {"ablation.png", "training.gif", "growing.png", "fixed.png"}
