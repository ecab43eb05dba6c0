"""`MiniSequenceCallback` adds memory, speed and MFU to what the Trainer hands to its reporters."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ds_minis import MiniSequenceCallback
from ds_minis.integrations import trainer_metrics
from ds_minis.integrations.trainer_metrics import StepMetrics, attach_metrics

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
TOKENS, BATCH, ACCUMULATION = 24, 2, 2


class Reporter(TrainerCallback):
    """Stands for TensorBoard's: it comes before the user's callbacks, and is handed the logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trained(folder, *callbacks, **arguments) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=None))
    ids = torch.arange(TOKENS) % 60
    rows = [{"input_ids": ids, "labels": ids}] * 16
    settings = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": BATCH, "report_to": "none"}
    settings |= {
        "use_cpu": True,
        "save_strategy": "no",
        "gradient_accumulation_steps": ACCUMULATION,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **settings | arguments)
    Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks)).train()


@pytest.fixture(autouse=True)
def trainer_as_before(monkeypatch):
    monkeypatch.setattr(Trainer, "log", Trainer.log)


@pytest.mark.parametrize("counted", ["no", "all"])
def test_reporters_get_memory_and_speed(counted, tmp_path, monkeypatch):
    times = iter(range(0, 10**6, 2))
    monkeypatch.setattr(trainer_metrics.time, "perf_counter", lambda: next(times))
    reporter = Reporter()
    callback = MiniSequenceCallback(chunk_size=8)
    trained(tmp_path, reporter, callback, include_num_input_tokens_seen=counted)
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert len(steps) == 3
    for logs in steps:
        assert logs["peak_memory_gib"] > 0.01
        # Two seconds between two logs. What else asks for the time makes it more.
        most = TOKENS * BATCH * ACCUMULATION / 2
        assert 0 < logs["tokens_per_second"] <= most and math.log2(most / logs["tokens_per_second"]) < 10
        assert "mfu" not in logs  # of a CPU
    assert "peak_memory_gib" not in reporter.logs[-1]  # of the run's summary
    assert callback.mini_sequence_metrics is None


def test_tensorboard_gets_memory_and_speed(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trained(tmp_path, MiniSequenceCallback(chunk_size=8), report_to="tensorboard")
    (folder,) = {file.parent for file in (tmp_path / "events").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("peak_memory_gib", "tokens_per_second", "loss"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]
    assert all(event.value > 0.01 for event in events.Scalars("train/peak_memory_gib"))


def test_without_the_callback_logs_stay_as_they_are(tmp_path):
    attach_metrics(Trainer)
    reporter = Reporter()
    trained(tmp_path, reporter)
    assert not any("peak_memory_gib" in logs for logs in reporter.logs)


def test_attaching_twice_changes_nothing():
    attach_metrics(Trainer)
    log = Trainer.log
    attach_metrics(Trainer)
    assert Trainer.log is log


def test_mfu_of_a_known_device(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=None))
    weights = sum(p.numel() for p in model.parameters()) - 64 * 32  # the embedding is a lookup

    class State:
        global_step = num_input_tokens_seen = 0

    class Args:
        gradient_accumulation_steps = world_size = 1

    times = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(trainer_metrics.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(trainer_metrics, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(trainer_metrics, "tokens_of_last_call", lambda model: 100)
    metrics = StepMetrics(model, State)
    State.global_step, State.num_input_tokens_seen = 1, 100
    logs = metrics.since_last_log(State, Args)
    expected = (6 * weights + 6 * 2 * 32 * 100) * 100 / 1e9
    assert logs["mfu"] == pytest.approx(expected, abs=1e-4) and logs["tokens_per_second"] == 100
    assert metrics.since_last_log(State, Args) == {}


def test_figures_are_of_all_ranks_and_of_the_steps_since_the_last_log(monkeypatch):
    """2 ranks, 3 calls a step, a frozen LM head; then an interval of half the length."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=None))
    model.lm_head.requires_grad_(False)
    head = 64 * 32
    trained = sum(p.numel() for p in model.parameters()) - 2 * head

    class State:
        global_step = num_input_tokens_seen = 0

    class Args:
        gradient_accumulation_steps, world_size = 3, 2

    times = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(trainer_metrics.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(trainer_metrics, "peak_flops", lambda: 1e8)
    monkeypatch.setattr(trainer_metrics, "tokens_of_last_call", lambda model: 100)
    metrics = StepMetrics(model, State)
    for step, speed in ((4, 4 * 100 * 3 * 2 / 2), (8, 4 * 100 * 3 * 2 / 1)):
        State.global_step = step
        logs = metrics.since_last_log(State, Args)
        per_token = 6 * trained + 4 * head + 6 * 2 * 32 * 100
        assert logs["tokens_per_second"] == speed
        assert logs["mfu"] == pytest.approx(per_token * speed / (1e8 * 2), abs=1e-4)
