"""Parameters of a tiled layer that one rank uses and another does not, under ZeRO-3: as in the unconverted model.

As was seen: the first backward ended with "'NoneType' object has no attribute 'numel'", or hung where the layer was run as a
whole, as a tiled layer's parameters are reduced each by itself, and a rank had none for an expert without tokens.
"""

from pathlib import Path

import pytest
import torch
from engines import launch
from models import assert_same_tensors


@pytest.mark.engine
def test_experts_without_tokens_get_zeros(tmp_path):
    launch(Path(__file__).parents[1] / "experts_worker.py", str(tmp_path / "out.pt"))
    plain, runs = torch.load(tmp_path / "out.pt")
    assert set(runs) == {"tiled", "no leaf but ours", "whole"}
    for name, params in runs.items():
        assert_same_tensors(params, plain, rtol=1e-5), name
