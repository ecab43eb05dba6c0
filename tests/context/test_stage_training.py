"""What examples/sft/train.py does of a long-context stage: RoPE on load, the first loss, the end that is asked for."""

import copy
import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import sft_runs
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerControl, TrainerState

from ds_minis.context import rope_theta_for
from ds_minis.context.rope import rope_theta_of


@pytest.fixture
def long_context(monkeypatch):
    monkeypatch.syspath_prepend(sft_runs.EXAMPLE)
    return importlib.import_module("long_context")


def arguments(**given):
    return SimpleNamespace(
        **{"rope_theta": None, "rope_base_length": None, "stop_file": None, "model_name_or_path": "some/model"} | given
    )


def config_of(**parameters):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 1000.0} | parameters
    return AutoConfig.for_model("llama", **sizes, max_position_embeddings=64, rope_parameters=rope)


def test_a_number_or_the_formulas_base_is_what_the_model_is_loaded_with(long_context):
    config = config_of()
    number = long_context.stage_config(arguments(rope_theta="4e6"), config, 4096)
    auto = long_context.stage_config(arguments(rope_theta="auto"), config, 4096)
    told = long_context.stage_config(arguments(rope_theta="auto", rope_base_length=32), config, 4096)
    assert rope_theta_of(number) == 4e6 and number.max_position_embeddings == 4096
    assert rope_theta_of(auto) == rope_theta_for(4096, 64, 1000.0)
    assert rope_theta_of(told) == rope_theta_for(4096, 32, 1000.0)
    assert long_context.stage_config(arguments(), config, 4096) is None and rope_theta_of(config) == 1000.0


@pytest.mark.parametrize(
    ("given", "length", "said"),
    [
        ({"rope_theta": "big"}, 64, "--rope_theta: a number or auto is allowed, got 'big'"),
        ({"rope_theta": "1e6"}, None, "--rope_theta: give --max_length"),
        ({"rope_base_length": 64}, 64, "--rope_base_length is for --rope_theta auto"),
    ],
)
def test_wrong_arguments_are_refused(long_context, given, length, said):
    with pytest.raises(ValueError, match=said):
        long_context.stage_config(arguments(**given), config_of(), length)


def test_the_formula_is_not_applied_to_a_scaled_rope(long_context):
    config = config_of(rope_type="linear", factor=2.0)
    with pytest.raises(ValueError, match=r"--rope_theta auto: this model's RoPE is scaled \(linear\).*now 1000"):
        long_context.stage_config(arguments(rope_theta="auto"), config, 128)


def test_angles_that_an_engine_has_rounded_stop_the_first_step(long_context):
    args = arguments(rope_theta="3.6e9")
    config = long_context.stage_config(args, config_of(), 1_048_576)
    model = AutoModelForCausalLM.from_config(config)
    plain = copy.deepcopy(model).bfloat16()
    check = next(c for c in long_context.callbacks(args, 1_048_576, pretrained=True) if hasattr(c, "length"))
    check.on_train_begin(None, None, None, model=long_context.prepare_model(model, config).bfloat16())
    with pytest.raises(ValueError, match="position 1,048,575 are wrong by .*bfloat16"):
        check.on_train_begin(None, None, None, model=plain)


UNTRAINED = math.log(64)
LOSSES = {  # first loss, the loss before, whether the weights were trained -> words of the line
    "near ln V": (0.98 * UNTRAINED, None, True, "is far above that of a trained model"),
    "from scratch": (0.98 * UNTRAINED, None, False, ""),
    "as trained": (1.2, None, True, ""),
    "far above the stage before": (1.9, 1.2, True, "1.90, is far above 1.20, the loss before this stage"),
    "far above, from scratch": (UNTRAINED, 1.2, False, "is far above 1.20"),
    "a little above the stage before": (1.4, 1.2, True, ""),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_first_loss_far_above_is_said_in_one_line(long_context, monkeypatch, name):
    loss, before, pretrained, words = LOSSES[name]
    lines = []
    monkeypatch.setattr(long_context.logger, "warning", lines.append)
    watch = next(
        c
        for c in long_context.callbacks(arguments(rope_theta="5e6"), 64, pretrained=pretrained)
        if hasattr(c, "looked")
    )
    history = [] if before is None else [{"loss": 9.0}, {"loss": before}, {"eval_loss": 0.1}]
    state = TrainerState(log_history=history, is_world_process_zero=True)
    model = SimpleNamespace(config=config_of())
    watch.on_train_begin(None, state, None)
    for logged in (loss, 100.0):
        watch.on_log(None, state, None, logs={"loss": logged}, model=model)
    assert len(lines) == bool(words) and "\n" not in "".join(lines)
    if words:
        assert (
            words in lines[0]
            and "4.16, ln 64, is that of an untrained model" in lines[0]
            and "was a RoPE override ignored" in lines[0]
        )


def test_the_loss_before_is_that_of_the_run_whose_weights_were_taken(long_context, tmp_path):
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"loss": 3.0}, {"loss": 1.5}, {"eval_loss": 1}]})
    )
    args = arguments(rope_theta="5e6", model_name_or_path=str(tmp_path))
    watch = next(c for c in long_context.callbacks(args, 64, pretrained=True) if hasattr(c, "looked"))
    watch.on_train_begin(None, TrainerState(), None)
    assert watch.before == 1.5
    watch.on_train_begin(None, TrainerState(log_history=[{"loss": 1.2}]), None)
    assert watch.before == 1.2


def test_a_file_that_appears_saves_and_stops_and_is_removed(long_context, tmp_path):
    asked = tmp_path / "stop"
    (stop,) = long_context.callbacks(arguments(stop_file=str(asked)), 64, pretrained=True)
    state, control = TrainerState(global_step=1, max_steps=3), TrainerControl()
    stop.on_step_end(None, state, control)
    assert not control.should_save and not control.should_training_stop and not stop.stopped
    asked.touch()
    stop.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop and stop.stopped and not asked.exists()


def _one_rank(rank: int, port: int, asked: str, results) -> None:
    sys.path.insert(0, str(sft_runs.EXAMPLE))
    import long_context

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    stop = long_context.StopFile(long_context.Path(asked))
    steps = []
    for step in (1, 2, 3):
        if step == 2 and rank == 0:
            open(asked, "w").close()
        steps.append(stop._is_asked(step))
    results.put((rank, steps))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_ranks_stop_at_the_step_at_which_rank_0_saw_the_file(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = torch.multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    ranks = [fork.Process(target=_one_rank, args=(rank, port, str(tmp_path / "stop"), results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    got = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join(60)
    assert got == {0: [False, True, False], 1: [False, True, False]}
