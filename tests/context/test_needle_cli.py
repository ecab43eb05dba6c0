"""`ds-minis needle` and `ds-minis needle-plot`: flags, results, errors."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from needle_models import model, tokenizer

from ds_minis.cli import main
from ds_minis.cli.needle import add_arguments, cells_of, check_files, check_numbers, model_of, task_of
from ds_minis.context.needle import model as needle_model
from ds_minis.context.needle.task import NeedleTask, WrongTask

ROOT = Path(__file__).parents[2]
SMALL = ["--lengths", "200,260", "--depths", "0,1", "--num-samples", "1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


NANOTRON = (
    "--ckpt-path weights --max-context-length 12000 --min-context-length 4000 --context-interval 4000 --depth-interval 0.5 "
    "--num-samples 5 --num-distractors 2 --num-cities-retrieval 3 --rnd-number-digits 6 --haystack-dir texts --sp 4"
)


@pytest.mark.parametrize("line", [NANOTRON, NANOTRON.replace("-", "_").replace("__", "--")], ids=["-", "_"])
def test_nanotrons_flags_are_taken(line):
    args = parsed(*line.split())
    assert model_of(args) == "weights" and args.haystack == [Path("texts")] and args.sequence_parallel == 4
    assert cells_of(args) == [(n, d) for n in (4000, 8000, 12000) for d in (0.0, 0.5, 1.0)]
    assert task_of(args) == NeedleTask(num_samples=5, num_distractors=2, num_cities_retrieval=3, rnd_number_digits=6)


def test_defaults_are_nanotrons():
    args = parsed("weights")
    cells = cells_of(args)
    assert {n for n, _ in cells} == set(range(4000, 64001, 4000))
    assert sorted({d for _, d in cells}) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert task_of(args) == NeedleTask() and (NeedleTask().num_samples, NeedleTask().rnd_number_digits) == (2, 7)


def test_easycontexts_flags_are_taken():
    line = "--model m --max_context_length 2000 --min_context_length 1000 --context_interval 1000 --depth_interval 0.1"
    args = parsed(*line.split(), *"--num_samples 3 --rope_theta 1e6 --haystack_dir h --num_distractor 1".split())
    assert model_of(args) == "m" and args.rope_theta == 1e6 and task_of(args).num_distractors == 1
    assert [d for n, d in cells_of(args) if n == 1000][-3:] == [0.8, 0.9, 1.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m", "--depth-interval", "0"], "--depth-interval: more than 0"),
        (["m", "--min-context-length", "9", "--max-context-length", "8"], "are no lengths"),
        (["m", "--depths", "0,1.5"], "0 to 1.*got 1.5"),
        (["m", "--ckpt-path", "m"], "a model is needed"),
        ([], "a model is needed"),
        (["m", "--lengths", ","], "--lengths: one number or more"),
        (["m", "--depths", ","], "--depths: one number or more"),
        (["m", "--batch-size", "0"], "--batch-size: 1 or more is allowed, got 0"),
        (["m", "--sp", "-1"], "--sequence-parallel: 1 or more is allowed, got -1"),
        (["m", "--rope-theta", "nan"], "--rope-theta: more than 1 is allowed, got nan"),
        (["m", "--output", "/"], "--output: a file in a folder is allowed, got /"),
        (["m", "--output", f"{__file__}/r.json"], "--output: a file in a folder is allowed"),
        (["m", "--plot", "map.xyz"], "--plot: a name that ends in .png, .jpg, .pdf, .svg is allowed, got map.xyz"),
    ],
)
def test_wrong_arguments_are_refused(argv, words):
    with pytest.raises(WrongTask, match=words):
        args = parsed(*argv)
        model_of(args), cells_of(args), check_numbers(args), check_files(args)


def test_a_run_writes_results_a_picture_and_says_how_it_went(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["needle", str(saved), *SMALL, "--variant", "niah_multikey"]) == 0
    out = capsys.readouterr().out
    assert (
        "4/4  260 tokens, depth 100%: 0 of 1 right" in out
        and "0.0% of 4 answers right; all right in 0 of 4 cells" in out
    )
    results = json.loads((tmp_path / "needle_tiny_niah_multikey.json").read_text())
    assert results["task"]["num_distractors"] == 3 and results["rope_theta"] == 10000.0 and results["accuracy"] == 0
    assert len(results["cells"]) == 4 and results["cells"][0]["samples"][0]["written"]
    assert (tmp_path / "needle_tiny_niah_multikey.png").exists()
    # Again: nothing is left to do. With another seed: refused, unless it is to be forgotten.
    again = ["needle", "--ckpt-path", str(saved), *SMALL, "--variant", "niah_multikey"]
    assert main(again) == 0 and "] 1/" not in capsys.readouterr().out
    assert main([*again, "--seed", "1"]) == 2
    assert "task.seed was 0 and is 1. Give another --output, or --overwrite" in capsys.readouterr().err
    assert main([*again, "--seed", "1", "--overwrite"]) == 0
    assert main(["needle-plot", "needle_tiny_niah_multikey.json", "--output", "map.gif"]) == 0
    two = "needle_tiny_niah_multikey.json,needle_tiny_niah_multikey.json"
    assert main(["needle-plot", two, "--output", "map.png", "--titles", "one", "two"]) == 0
    assert main(["needle-plot", two, "--output", "map.png", "--titles", "one"]) == 2
    assert (tmp_path / "map.gif").exists() and (tmp_path / "map.png").exists()


def test_results_of_other_weights_in_the_same_folder_are_refused(tmp_path, capsys):
    tokenizer().save_pretrained(tmp_path / "m")
    argv = ["needle", str(tmp_path / "m"), *SMALL, "--output", str(tmp_path / "r.json")]
    for seed, status in ((0, 0), (0, 0), (1, 2)):
        model(seed).save_pretrained(tmp_path / "m")
        assert main(argv) == status, seed
    assert "results of another run: weights was" in capsys.readouterr().err


def test_a_picture_of_no_kind_that_can_be_drawn_is_refused(tmp_path, capsys):
    assert main(["needle-plot", "r.json", "--output", str(tmp_path / "map.xyz")]) == 2
    assert "a file whose name ends in .png, .jpg, .pdf, .svg, .gif is allowed" in capsys.readouterr().err


def test_an_adapter_is_tested_with_its_base(saved, tmp_path, capsys):
    adapted = peft.get_peft_model(
        model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, words = needle_model.load(str(tmp_path / "adapter"), length=300)
    base, _ = needle_model.load(str(saved), length=300)
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (loaded, base)]
    assert not weights[0].equal(weights[1]) and len(words) == len(tokenizer())
    assert weights[0].allclose(adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight)


def test_another_base_of_rope_is_another_test(saved):
    plain, _ = needle_model.load(str(saved), length=300)
    changed, _ = needle_model.load(str(saved), length=100_000, rope_theta=1e7)
    assert plain.config.rope_parameters["rope_theta"] == 10000 and changed.config.rope_parameters["rope_theta"] == 1e7
    assert changed.config.max_position_embeddings == 100_000
    assert needle_model.describe(changed, "tiny")["rope_theta"] == 1e7


def test_lengths_beyond_the_configuration_are_said(saved, tmp_path, capsys):
    argv = ["needle", str(saved), "--lengths", "513", "--depths", "1", "--num-samples", "1", "--output"]
    assert main([*argv, str(tmp_path / "r.json")]) == 0
    assert "the model's configuration has 512 positions" in capsys.readouterr().out


def test_an_adapter_without_a_base_is_refused(tmp_path, capsys):
    peft.LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert main(["needle", str(tmp_path), *SMALL]) == 2
    assert "adapter_config.json names no base model" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["needle", str(tmp_path / "none"), *SMALL]) == 2
    assert "no model could be loaded" in capsys.readouterr().err


def test_more_processes_than_there_are_cannot_share_a_sequence(saved, capsys):
    assert main(["needle", str(saved), *SMALL, "--sp", "3"]) == 2
    assert "sequence_parallel: 1 is allowed with 1 processes, got 3" in capsys.readouterr().err


def test_the_script_is_the_same_command():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "needle.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "--num-cities-retrieval" in done.stdout
