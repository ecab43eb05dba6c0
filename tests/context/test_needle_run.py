"""A needle run: what counts as an answer, processes, results files."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from models import CONFIGS, VOCAB_SIZE
from needle_models import maker, model
from needle_worker import CELLS, results_of
from support import warm
from transformers import AutoModelForCausalLM, GPT2Config

from ds_minis.context.needle.model import predict, prepare
from ds_minis.context.needle.run import OtherRun, Ranks, load_done, of_all_groups, read, run_needle
from ds_minis.context.needle.task import NeedleTest, WrongTask

HERE = Path(__file__).parent
GPT2 = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
FAMILIES = {**{name: CONFIGS[name] for name in ("llama", "qwen3", "mistral", "gemma2")}, "gpt2": lambda: GPT2}
RIGHT = [True] + [False] * 4


def answers_around(model, prompt: torch.Tensor) -> list[NeedleTest]:
    """The answer that greedy decoding writes, with a cache, and four that differ from it in one token each."""
    count = prompt.shape[1]
    # No end of sequence: an answer goes on.
    whole = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    tests = [NeedleTest(whole[:count], whole[count:], "")]
    for i in range(4):
        answer = list(whole[count:])
        answer[i] = (answer[i] + 1) % VOCAB_SIZE
        tests.append(NeedleTest(whole[:count], answer, ""))
    return tests


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forced_is_right_where_greedy_decoding_is(family, converted):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    prompts = torch.randint(1, VOCAB_SIZE, (3, 41))
    tests = [test for prompt in prompts for test in answers_around(model, prompt[None])]
    if converted:
        prepare(model, length=64)
    outcomes = predict(model, tests)
    assert [outcome.is_right for outcome in outcomes] == 3 * RIGHT
    for test, outcome in zip(tests, outcomes, strict=True):
        # Up to the first difference, what the model writes is what greedy decoding writes.
        same = next(
            (i for i, (a, b) in enumerate(zip(test.answer_ids, outcome.predicted_ids, strict=True)) if a != b), 4
        )
        assert outcome.predicted_ids[: same + 1] == tests[tests.index(test) // 5 * 5].answer_ids[: same + 1]


def test_answers_of_several_lengths_are_read_in_one_pass():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    whole = answers_around(model, torch.randint(1, VOCAB_SIZE, (1, 41)))[0]
    tests = [
        NeedleTest(whole.prompt_ids + whole.answer_ids[:cut], whole.answer_ids[cut:], "") for cut in (0, 1, 3)
    ]  # fmt: skip
    assert all(outcome.is_right for outcome in predict(model, tests))
    with pytest.raises(ValueError, match="tests of one length"):
        predict(model, [whole, dataclasses.replace(whole, prompt_ids=whole.prompt_ids[1:])])


def test_the_head_runs_at_the_answer_alone_and_there_is_no_cache():
    tiny = model()
    rows, caches = [], []
    tiny.lm_head.register_forward_hook(lambda module, args, output: rows.append(tuple(output.shape)))
    tiny.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    tests = [maker().make(300, 0.5, i) for i in range(2)]
    predict(tiny, tests)
    longest = max(len(test.answer_ids) for test in tests)
    assert rows == [(2, longest, 4096)] and caches == [None] and longest < 10
    tiny(torch.tensor([tests[0].prompt_ids]))
    assert rows[-1][1] == len(tests[0].prompt_ids)  # and is as it was


def test_a_divided_pass_keeps_nothing_for_a_backward():
    """It runs with gradients on, or its sequence would not be divided."""
    tiny, kept = prepare(model(), length=400), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        predict(tiny, [maker().make(300, 0.5, 0)], divided=True)
        assert not kept
        tiny(torch.tensor([[1, 2, 3]]))
        assert kept


def test_a_model_in_training_is_left_as_it_was():
    tiny = model().train()
    tiny.lm_head.weight.requires_grad_(False)
    predict(tiny, [maker().make(300, 0.5, 0)])
    assert tiny.training and not tiny.lm_head.weight.requires_grad and tiny.model.norm.weight.requires_grad


@pytest.fixture(scope="module")
def alone():
    return results_of(1, Ranks())


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    done = subprocess.run(
        [warm.python(), str(HERE / "needle_worker.py"), str(folder)],
        env=os.environ | warm.environment() | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("name", ["shared", "in turn"])
def test_two_processes_say_what_one_does(name, alone, on_two_processes):
    """Not only whether an answer was right: also what was written in its place."""
    written = {str(sample.get("written")) for cell in alone["cells"] for sample in cell["samples"]}
    assert len(written) > 8  # or the same would be little
    for rank in range(2):
        assert json.loads((on_two_processes / f"{rank}.json").read_text())[name] == alone
    saved = read(on_two_processes / f"{name}.json")
    assert [(cell["length"], cell["depth"]) for cell in saved["cells"]] == CELLS


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(tmp_path, alone):
    output, tiny, calls = tmp_path / "results.json", model(), []
    prepare(tiny, length=400)
    arguments = {"about": {"model": "tiny"}, "output": output, "batch_size": 2}
    task = maker(num_samples=2, num_distractors=1)

    def stop(cell, number, total):
        calls.append((number, total))
        if len(calls) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run_needle(tiny, task, CELLS, progress=stop, **arguments)
    before = read(output)["cells"]
    assert len(before) == 3
    results = run_needle(tiny, task, CELLS, progress=stop, **arguments)
    assert calls[4:] == [(number, 3) for number in (1, 2, 3)]  # nothing is run twice
    assert results["cells"] == read(output)["cells"] and all(cell in results["cells"] for cell in before)
    kept = [{k: v for k, v in cell.items() if k != "seconds"} for cell in results["cells"]]
    assert kept == alone["cells"]
    forward = tiny.forward
    tiny.forward = None  # not called again
    assert run_needle(tiny, task, CELLS, **arguments)["cells"] == results["cells"]
    tiny.forward = forward
    with_another = run_needle(tiny, task, [*CELLS, (170, 0.5)], **arguments)["cells"]
    assert with_another[0]["length"] == 170 and with_another[1:] == results["cells"]
    assert sorted(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, "model was 'tiny' and is 'other'"),
        ({"task": {"seed": 1}}, r"task.seed was 0 and is 1"),
    ],
)
def test_results_of_something_else_are_not_gone_on_with(tmp_path, change, words):
    output = tmp_path / "results.json"
    task = maker()
    about = {"format": 1, "task": task.task.to_value(), "model": "tiny"}
    run_needle(model(), task, CELLS[:1], about={"model": "tiny"}, output=output)
    assert list(load_done(output, about)) == ["201 0.000000"]
    about |= {"task": about["task"] | change["task"]} if "task" in change else change
    with pytest.raises(OtherRun, match=f"{words}.*--output, or --overwrite"):
        load_done(output, about)


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    for text in ("", "[]", '{"format": 2, "cells": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(OtherRun, match="no results file"):
            read(tmp_path / "results.json")


def test_a_size_that_does_not_divide_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    with pytest.raises(WrongTask, match="sequence_parallel: 1, 2, 4 is allowed with 4 processes, got 3"):
        Ranks.current(3)
    with pytest.raises(WrongTask, match="got -2"):
        Ranks.current(-2)
    assert Ranks.current(2) == Ranks(2, 1, 2, False)


def test_each_group_of_ranks_gives_one_result(monkeypatch):
    def gather(values, mine):
        values[:] = ["a", "a", "b", "b"]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert of_all_groups("b", Ranks(size=2, group=1, num_groups=2, is_main=False)) == ["a", "b"]
    assert of_all_groups("mine", Ranks()) == ["mine"]
