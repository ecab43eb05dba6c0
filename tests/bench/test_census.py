"""The census: a sample of it, what it says of what is wrong, and its page."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import census
import census_page
import census_trl
import pytest
import transformers

from ds_minis.loss.forward import fused_outputs
from ds_minis.loss.kernels.token_statistics import token_statistics

ROOT = Path(__file__).parents[2]
GOOD = {
    **{"class": "A", "exact": True, "loss_error": 0.0, "grad_error": 4e-7, "grad_name": "w", "logits_held": False},
    **{"checkpointing_error": 4e-7, "router_error": None, "loss": "tiled", "notes": []},
    **{
        "layers": {"ALayer": 1},
        "layers_left": [["ALayer", "as a whole: it has 2 attentions", 3]],
        "tiled": {"AMLP": 2, "ANorm": 5},
        "untiled": [["AAttention", "mixes tokens", "attn", 2], ["AMoE", "mixes rows", "moe", 1]],
    },
}


def test_sample_covers_what_exists():
    assert len(set(census.SAMPLE)) == 26 and set(census.SAMPLE) <= set(census.all_architectures())


def test_sample_is_exact(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, ROOT / "scripts" / "census.py", "--sample", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    results = json.loads(file.read_text())
    wrong = {name: census.verdict(result) for name, result in results.items() if not result.get("exact")}
    assert not wrong and done.returncode == 0, done.stdout + done.stderr
    assert list(results) == census.SAMPLE
    assert [name for name, result in results.items() if result["router_error"] is not None]
    held = {name: result for name, result in results.items() if result["logits_held"]}
    assert list(held) == ["causal:musicgen"] and held["causal:musicgen"]["loss"].startswith(
        "not tiled (several LM heads"
    )


def _examined(architecture, settings=None):
    if architecture == "crashes":
        os._exit(3)
    if architecture == "hangs":
        time.sleep(60)
    if architecture == "raises":
        raise RuntimeError("out of order")
    return {**GOOD, "exact": architecture == "good"}


def test_what_crashes_hangs_or_raises_fails_alone(monkeypatch):
    monkeypatch.setattr(census, "examine", _examined)
    results = census.run_all(["crashes", "good", "hangs", "raises", "bad"], jobs=2, timeout=2)
    assert [name for name, result in results.items() if census.failed(result)] == ["crashes", "hangs", "raises", "bad"]
    assert "after 2 seconds" in results["hangs"]["crash"] and "out of order" in results["raises"]["crash"]


def test_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(census, "warm_up", lambda: None)
    monkeypatch.setattr(
        census, "examine", lambda architecture, settings=None: {**GOOD, "exact": architecture != "causal:gpt2"}
    )
    assert census.main(["llama"]) == 0
    assert census.main(["llama", "gpt2"]) == 1
    assert "not exact: causal:gpt2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        census.main(["lama"])


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"names": []}, ["causal:a", "causal:llama", "image-text:a"]),
        ({"names": ["a"]}, ["causal:a", "image-text:a"]),
        ({"names": ["image-text:a", "llama"]}, ["causal:llama", "image-text:a"]),
        ({"names": ["causal"]}, ["causal:a", "causal:llama"]),
        ({"names": ["b"]}, "no architecture is called b; allowed: such as causal:a, causal:llama, image-text:a"),
        ({"names": ["a"], "whole": True}, "--write needs the results of all architectures"),
        ({"names": [], "sample": True}, ["image-text:a", "causal:a"]),
    ],
)
def test_names_choose_architectures(given, chosen, monkeypatch, capsys):
    known = ["causal:a", "causal:llama", "image-text:a"]
    monkeypatch.setattr(census, "SAMPLE", ["image-text:a", "causal:b", "causal:a"])
    if isinstance(chosen, list):
        assert census.choose(argparse.ArgumentParser(), known, **given) == chosen
        return
    with pytest.raises(SystemExit):
        census.choose(argparse.ArgumentParser(), known, **given)
    assert chosen in capsys.readouterr().err


def test_model_that_does_not_run_is_no_failure():
    result = census.examine("image-text:pi0")
    assert "state" in result["plain_fails"] and not census.failed(result)


def test_page_shows_what_is_wrong():
    page = census_page.page(
        {
            "causal:a": GOOD,
            "causal:b": {**GOOD, "exact": False, "grad_error": 0.5, "logits_held": True, "checkpointing_error": 0.5},
            "causal:c": {"crash": "ValueError: x | y"},
            "image-text:d": {"plain_fails": "no\nPIL"},
        }
    )
    assert (
        "| `a` | yes, 4e-07 | equal | 1 of 4; `ALayer`: it has 2 attentions | 2 of 3; `moe` (AMoE): mixes rows | 5 |"
        in page
    )
    assert "with whole layers tiled" in page
    assert "| `b` | **no**, 5e-01 | **5e-01** |" in page and "full logits held" in page
    assert "**no**: ValueError: x / y" in page and "- `d`: no PIL" in page
    assert "| Causal language models | 3 | 3 | 1 of 3 |" in page


def test_page_is_of_these_architectures():
    page = census.PAGE.read_text(encoding="utf-8")
    if transformers.__version__ not in page:
        pytest.skip("the page was made with another version of transformers")
    for kind, title in census_page.TITLES.items():
        section = page.split(f"## {title}")[1].split("\n## ")[0]
        listed = re.findall(r"^(?:\| |- )`([^`]+)`", section, re.MULTILINE)
        assert sorted(listed) == sorted(census.NAMES[kind])


TRLS = {"class": "A", "answered": True, "exact": True, "error": 4e-7, "where": "loss", "line": "", "trl": {}}
VERDICTS = {
    "exact: 4e-07": {},
    "wrong: entropy by 5.0e-01": {"exact": False, "error": 0.5, "where": "entropy"},
    "wrong: left to TRL without a line": {"answered": False, "trl": {"exact": True, "error": 0.0, "where": ""}},
    "left to TRL: not tiled (why)": {"answered": False, "line": "not tiled (why)"},
    "wrong: ValueError: x": {"answered": False, "line": "not tiled (why)", "fails": "ValueError: x"},
}


@pytest.mark.parametrize("said", VERDICTS)
def test_words_for_an_answer_to_trls_call(said):
    assert census_trl.verdict({**TRLS, **VERDICTS[said]}) == said


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs TRL")
@pytest.mark.parametrize(("name", "trl"), [("bert", "wrong: "), ("mixtral", "exact: ")])
def test_trls_call_is_answered_from_the_models_own_logits(name, trl):
    """Bert transforms hidden states before its head, of which TRL's own answer knows nothing."""
    result = census_trl.examine(f"causal:{name}")
    assert census_trl.verdict(result).startswith("exact: ") and census_trl.of_trl(result).startswith(trl), result


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs TRL")
def test_an_answer_from_other_logits_is_seen(monkeypatch):
    """As TRL's own is for architectures whose logits it does not know."""
    monkeypatch.setattr(fused_outputs, "token_statistics", lambda x, *rest: token_statistics(x * 1.001, *rest))
    assert census_trl.verdict(census_trl.examine("causal:llama")).startswith("wrong: ")
