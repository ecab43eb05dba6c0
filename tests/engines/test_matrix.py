"""What judges the matrix of engines can fail: every way a cell may be wrong, and a case that ends its processes."""

import contextlib
import dataclasses
import io

import engines
import pytest
import torch
import torch.nn.functional as F
from engine_worker import stacked, train_again, train_alone
from parity import COLUMNS, REFUSALS, ROWS, SEEDS, cell, judge

from ds_minis.layer.passes.layer_passes import LayerPasses
from ds_minis.layer.passes.seeds import Seeds
from ds_minis.tiling.core.replay import Replay

FULL = cell("DDP", "full")
DROPOUT = cell("none (one process)", "dropout 0.1")
OF_MODULES = dataclasses.replace(DROPOUT, scope="tokens")


def run_of(case, **changes) -> dict:
    """What the worker would save of a run without a fault, but for the changes."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = train_alone(case, converted=True)
    return run | {"engine": "DistributedDataParallel", "processes": 2} | changes


@pytest.fixture(scope="module")
def result() -> dict:
    return {"plain": run_of(FULL, tiled=0, layers=0), "converted": run_of(FULL)}


def test_a_run_without_a_fault_is_exact(result):
    assert judge(FULL, result).kind == "exact"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"engine": "LlamaForCausalLM"}, "the engine was a Llama"),
        ({"processes": 1}, "1 processes ran"),
        ({"zero_stage": 2}, "ZeRO stage was 2"),
        ({"offload": True}, "offload was True"),
        ({"tiled": 0}, "0 modules were tiled"),
        ({"layers": 1}, "1 layers were tiled as a whole"),
        ({"losses": [float("nan")] * 8}, "NaN"),
        ({"losses": [5.0] * 8}, "loss"),
    ],
)
def test_a_run_that_is_not_what_was_asked_for_fails(result, changes, words):
    judgement = judge(FULL, result | {"converted": result["converted"] | changes})
    assert judgement.kind == "FAILED" and words in judgement.text


@pytest.mark.parametrize("kinds", [["converted"], ["plain"], ["plain", "converted"]])
def test_one_parameter_that_is_off_fails(result, kinds):
    """Also where converted and unconverted agree, and one process does not."""
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = dict(result)
    for kind in kinds:
        params = dict(result[kind]["params"])
        params[name] = params[name] * (1 + 1e-4)
        wrong[kind] = result[kind] | {"params": params}
    judgement = judge(FULL, wrong)
    assert judgement.kind == "FAILED" and name in judgement.text


def test_only_what_the_unconverted_model_is_refused_too_is_refused(result):
    words, reason = next(iter(REFUSALS.items()))
    error = {"error": f"ValueError: {words}. And so on", "ranks_with_error": 2, "processes": 2}
    other = error | {"error": "ValueError: something else"}
    assert judge(FULL, {"plain": error, "converted": error}).kind == "refused"
    assert judge(FULL, {"plain": error, "converted": error}).text == reason
    for plain, converted, expected in (
        (result["plain"], error, "only the converted model is refused"),
        (error, result["converted"], "only the unconverted model is refused"),
        (error, other, "refused for two reasons"),
        (other, other, "for a reason that is not known here"),
        (error | {"ranks_with_error": 1}, error, "refused on 1 of 2 ranks"),
    ):
        judgement = judge(FULL, {"plain": plain, "converted": converted})
        assert judgement.kind == "FAILED" and expected in judgement.text


def test_gradients_that_need_no_clipping_prove_nothing(result):
    case = cell("DDP", "full")
    object.__setattr__(case, "clip", 1e6)
    judgement = judge(case, result)
    assert judgement.kind == "FAILED" and "nothing was to be clipped" in judgement.text


def runs(converted: bool, case: engines.Case = DROPOUT) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        seeds = [4 * seed + 2 * converted for seed in range(SEEDS)]
        return stacked(train_again(case, converted=converted, seeds=seeds)) | {"processes": 1}


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    return runs(converted=False)


def test_dropout_over_chunks_has_the_distribution_of_the_unconverted_model(plain_runs):
    for case in (DROPOUT, OF_MODULES):
        assert judge(case, {"plain": plain_runs, "converted": runs(True, case)}).kind == "exact"


dropout = F.dropout


@pytest.mark.parametrize(
    "mutation",
    [
        lambda x, p=0.5, training=True, inplace=False: x,
        lambda x, p=0.5, training=True, inplace=False: dropout(dropout(x, p, training), p, training),
        lambda x, p=0.5, training=True, inplace=False: dropout(x, p, training) * (1 - p),
    ],
    ids=["left out", "applied twice", "scaled wrongly"],
)
def test_dropout_that_is_wrong_fails(plain_runs, mutation, monkeypatch):
    monkeypatch.setattr(F, "dropout", mutation)
    converted = runs(converted=True) | {
        "layers": 2
    }  # which are run as a whole, as they draw numbers while they are verified
    judgement = judge(DROPOUT, {"plain": plain_runs, "converted": converted})
    assert judgement.kind == "FAILED" and "standard errors" in judgement.text, judgement


def test_dropout_with_another_mask_in_backward_fails(plain_runs, monkeypatch):
    active, again, part = Replay.active, LayerPasses.again, Seeds.part
    offset = 0

    @contextlib.contextmanager
    def with_other_numbers(replay):
        with active(replay):
            torch.rand(100)
            yield

    @contextlib.contextmanager
    def with_other_seeds(passes):
        nonlocal offset
        offset = 1000
        try:
            with again(passes):
                yield
        finally:
            offset = 0

    monkeypatch.setattr(Replay, "active", with_other_numbers)
    monkeypatch.setattr(LayerPasses, "again", with_other_seeds)
    monkeypatch.setattr(Seeds, "part", lambda seeds, index: part(seeds, index + offset))
    for case in (DROPOUT, OF_MODULES):
        judgement = judge(case, {"plain": plain_runs, "converted": runs(True, case)})
        assert judgement.kind == "FAILED" and "standard errors" in judgement.text, judgement


WORKER = """
import json, os, sys, time, torch
names = {names}
for case in json.loads(sys.argv[1]):
    if case["clip"] == 1:
        os._exit(7)
    if case["clip"] == 2:
        time.sleep(600)
    file = f"{{sys.argv[2]}}/{{names[case['clip']]}}.pt"
    if os.environ["RANK"] == "0":
        torch.save(case, file + ".unfinished")
        os.rename(file + ".unfinished", file)
    while not os.path.exists(file):  # or a rank that is ahead would end the others before they are done
        time.sleep(0.01)
"""


@pytest.mark.engine
def test_a_case_that_ends_or_hangs_loses_no_other(tmp_path, monkeypatch):
    cases = [engines.Case(engine="ddp", clip=float(clip)) for clip in (3, 1, 4, 2, 5)]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(names={case.clip: case.name for case in cases}))
    monkeypatch.setattr(engines, "WORKER", worker)
    monkeypatch.setattr(engines, "CASE_SECONDS", 8)
    monkeypatch.setattr(engines, "START_SECONDS", 60)
    results = engines.run_cases(cases)
    assert [results[case.name].get("clip") for case in cases] == [3, None, 4, None, 5]
    assert "ended with status 1" in results[cases[1].name]["died"]
    assert "took too long" in results[cases[3].name]["died"]
    assert judge(cases[1], results[cases[1].name]).kind == "FAILED"


def test_every_row_and_column_of_the_matrix_is_another_case():
    assert len({cell(row, column).name for row in ROWS for column in COLUMNS}) == len(ROWS) * len(COLUMNS)
