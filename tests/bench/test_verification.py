"""What the analysis of a layer costs, counted: matrix products and live bytes. Seconds are for the script to print."""

import contextlib

import pytest
import torch
import verification

from ds_minis.tiling.verify.fingerprints import fingerprint


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.bfloat16}, {"lora": True}], ids=["full", "bfloat16", "LoRA"])
def test_within_its_bounds(settings):
    row = verification.measure(512, 2048, 512, **settings)
    assert row["flops"] <= 1 and row["bytes"] <= 2, row
    assert row["flops"] > 0.3 and row["bytes"] > 0.3, row  # it was counted


def test_script_prints_its_rows(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["verification.py", "--hidden", "128", "--tokens", "256", "--chunk", "64"])
    with contextlib.suppress(SystemExit):
        verification.main()
    assert capsys.readouterr().out.count("the bytes of its weights") == len(verification.CASES)


@pytest.mark.parametrize("shape", [(200, 100), (4, 50, 60), (100_000, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_shows_each_element(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    before = fingerprint(grad)
    assert before.numel() < grad.numel() or shape[-1] == 2
    assert torch.equal(before, fingerprint(grad.clone())) and before.isfinite().all()
    for place in ((0,) * len(shape), tuple(n // 2 for n in shape), tuple(n - 1 for n in shape)):
        changed = grad.clone()
        changed[place] += 8
        assert not torch.allclose(before.float(), fingerprint(changed).float(), rtol=1e-3, atol=1e-3)
        changed[place] = torch.nan
        assert fingerprint(changed).isnan().any()


def test_small_gradients_are_their_own_fingerprints():
    for grad in (torch.randn(10, 20), torch.randn(100_000)):
        assert fingerprint(grad) is grad
