"""Where backward runs out of memory in a loop of accelerate's or DeepSpeed's, the note is the one of a Trainer's step."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from ds_minis import convert_to_mini_sequence
from ds_minis.integrations import loop_advice, trainer_advice
from ds_minis.integrations.loop_advice import attach_loop_advice, of_accelerator, of_deepspeed
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=None
)
SETTINGS = {"chunk_size": 16}


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trainer_advice, "device_bytes", lambda: 2**20)


def model_and_loss(rows: int = 2, tokens: int = 24):
    """A converted model, and a loss of its whose backward runs out of memory."""
    model = convert_to_mini_sequence(LlamaForCausalLM(CONFIG).train(), SETTINGS)
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    loss = model(input_ids=ids, labels=ids).loss
    loss.register_hook(lambda grad: _raise(torch.OutOfMemoryError("tried to allocate 2 GiB")))
    return model, loss


def _raise(error: Exception):
    raise error


def notes(call) -> list[str]:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        call()
    return [note for note in getattr(caught.value, "__notes__", ()) if note.startswith(trainer_advice.PLANS)]


def test_a_loop_of_accelerates(monkeypatch):
    attach_loop_advice(Accelerator, of_accelerator)  # once more changes nothing
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, loss = model_and_loss()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (note,) = notes(lambda: accelerator.backward(loss))
    setup = Setup(settings=SETTINGS, accumulation=4, dtype="float32", optimizer="sgd")
    needs = Planner(CONFIG).estimate(setup, 48).device / 2**30
    assert note.startswith(f"ds_minis plans {needs:.1f} GiB on each device for this step of 48 tokens")
    monkeypatch.setattr(trainer_advice, "what_fits", lambda *args: 1 / 0)
    assert not notes(lambda: accelerator.backward(model_and_loss()[1]))


def test_a_loop_of_deepspeeds(monkeypatch):
    model, loss = model_and_loss()
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}

    class Engine:
        module, basic_optimizer = model, torch.optim.Adam(model.parameters())
        _config = SimpleNamespace(_param_dict=config)

        def bfloat16_enabled(self):
            return True

        def forward(self):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

        def backward(self, loss):
            loss.backward()

    planned = []
    monkeypatch.setattr(loop_advice.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(trainer_advice, "what_fits", lambda *args: planned.append(args) or trainer_advice.PLANS)
    attach_loop_advice(Engine, of_deepspeed)
    attach_loop_advice(Engine, of_deepspeed)
    assert notes(lambda: Engine().backward(loss)) == [trainer_advice.PLANS]
    setup = Setup(engine="zero2", gpus=4, settings=SETTINGS, accumulation=3)
    assert planned == [(model.config, setup, 48, 2**20)]
    assert notes(Engine().forward) == [trainer_advice.PLANS] and planned[1:] == planned[:1]


def test_a_trainers_step_says_it_itself():
    accelerator = Accelerator(cpu=True)
    model, loss = model_and_loss()
    accelerator.prepare(model)
    token = trainer_advice.IN_TRAINER.set(True)
    try:
        assert notes(lambda: accelerator.backward(loss)) == []
    finally:
        trainer_advice.IN_TRAINER.reset(token)


def test_a_loop_of_another_model_gets_no_note():
    accelerator, plain = Accelerator(cpu=True), LlamaForCausalLM(CONFIG)
    accelerator.prepare(plain)
    loss = plain(input_ids=torch.zeros(1, 8, dtype=torch.int64), labels=torch.zeros(1, 8, dtype=torch.int64)).loss
    loss.register_hook(lambda grad: _raise(torch.OutOfMemoryError("out")))
    assert notes(lambda: accelerator.backward(loss)) == []
