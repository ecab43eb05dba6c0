"""Where a Trainer's step runs out of memory, the error's note tells a setting and the length that fits, by the planner."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ds_minis import MiniSequenceCallback, convert_to_mini_sequence
from ds_minis.integrations import trainer_advice
from ds_minis.integrations.trainer_advice import attach_advice, what_fits
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.planner import Planner

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=24,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=2**20,
    pad_token_id=None,
)
TOKENS, OWN = 65536, Setup(dtype="float32")


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Traces of all tests here, and of no run before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def failing(tmp_path, monkeypatch, cache):
    """A Trainer whose loss runs out of memory; its error."""
    monkeypatch.setattr(Trainer, "training_step", Trainer.training_step)

    def train(error: Exception, **arguments) -> Exception:
        def compute_loss(*args, **kwargs):
            raise error

        monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
        ids = torch.zeros(TOKENS, dtype=torch.int64)
        settings = {"use_cpu": True, "max_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=1, **settings | arguments)
        rows = [{"input_ids": ids, "labels": ids}] * 2
        trainer = Trainer(LlamaForCausalLM(CONFIG), args, train_dataset=rows, callbacks=[MiniSequenceCallback()])
        attach_advice(Trainer)  # once more changes nothing
        with pytest.raises(type(error)) as caught:
            trainer.train()
        return caught.value

    return train


def test_the_note_names_a_setting_and_the_length_that_fits(failing, planner, monkeypatch):
    capacity = planner.estimate(OWN, TOKENS // 2).device * 1.01
    monkeypatch.setattr(trainer_advice, "device_bytes", lambda: capacity)
    (note,) = failing(torch.OutOfMemoryError("tried to allocate 2 GiB")).__notes__
    needs = planner.estimate(OWN, TOKENS).device / 2**30
    assert f"ds_minis plans {needs:.1f} GiB on each device for this step of 65,536 tokens" in note
    assert 'it fits with "offload": "cpu" in the mini-sequence configuration' in note
    own = int(re.search(r"with the present settings, ([\d,]+) tokens fit", note)[1].replace(",", ""))
    most = int(re.search(r"as do up to ([\d,]+) tokens", note)[1].replace(",", ""))
    assert own == planner.longest(OWN, capacity) and TOKENS // 4 < own < TOKENS <= most
    assert most == planner.longest(OWN.replace(settings={"offload": "cpu"}), capacity)


def test_other_errors_and_other_models_get_no_note(failing, monkeypatch):
    monkeypatch.setattr(trainer_advice, "device_bytes", lambda: 2**30)
    assert not hasattr(failing(RuntimeError("of another kind")), "__notes__")
    monkeypatch.setattr(trainer_advice, "what_fits", lambda *args: 1 / 0)
    assert not hasattr(failing(torch.OutOfMemoryError("not hidden by an error of the plan")), "__notes__")
    monkeypatch.setattr(trainer_advice, "device_bytes", lambda: None)
    assert not hasattr(failing(torch.OutOfMemoryError("no GPU")), "__notes__")


def test_where_nothing_makes_it_fit(planner, cache):
    capacity = planner.estimate(OWN, TOKENS // 2).device * 1.01
    longer = planner.longest(OWN.replace(settings={"head_groups": "auto", "offload": "cpu"}), capacity) * 4
    assert "no setting makes it fit; up to" in what_fits(CONFIG, OWN, longer, capacity)
    assert "no other setting takes more" in what_fits(CONFIG, OWN, TOKENS, 2**20)
    assert "something else has memory there" in what_fits(CONFIG, OWN, TOKENS, 2**40)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"optim": "adafactor", "gradient_accumulation_steps": 2}, {"optimizer": "adafactor", "accumulation": 2}),
        ({"optim": "paged_adamw_8bit", "bf16": True}, {"optimizer": "paged_adamw_8bit", "master_weights": True}),
    ],
)
def test_the_setup_is_the_trainers(arguments, expected, tmp_path):
    model = LlamaForCausalLM(CONFIG)
    convert_to_mini_sequence(model, {"head_groups": "auto"})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments)
    setup = trainer_advice.setup_of(Trainer(model, args), 3, {"head_groups": "auto"})
    dtype = "bfloat16" if args.bf16 else "float32"
    assert setup == Setup(dtype=dtype, batch=3, settings={"head_groups": "auto"}, **expected)


def test_the_setup_of_zero_with_adapters(tmp_path):
    model = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=4, target_modules="all-linear"))
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu"},
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 1e8,
    }
    config = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "mini_sequence": {"offload": "cpu"}}
    state = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=4,
        deepspeed_plugin=SimpleNamespace(deepspeed_config=config),
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=True)
    trainer = SimpleNamespace(args=args, model=model, accelerator=SimpleNamespace(state=state))
    setup = trainer_advice.setup_of(trainer, 1, {})
    own = {"train": "lora", "lora_rank": 4, "offload_optimizer": True, "reuse_distance": 0, "live_parameters": 10**8}
    assert setup == Setup(engine="zero3", gpus=4, **own)


def test_weights_that_are_16_bits_have_no_masters():
    halves = LlamaForCausalLM(CONFIG).bfloat16()
    for model, masters in ((halves, False), (LlamaForCausalLM(CONFIG), True)):
        setup = trainer_advice.setup_from(model, {"engine": "ddp", "gpus": 2}, "bfloat16", "adamw_torch")
        assert (setup.dtype, setup.master_weights) == ("bfloat16", masters)
