"""TRL's trainers and losses of people's own, unmodified: same losses, metrics and weights as with the unconverted model."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import VOCAB_SIZE, add_lora, assert_same_tensors, build
from trainers import trainer_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ds_minis import convert_to_mini_sequence, mini_sequence_report

trl = pytest.importorskip("trl")
TOKENIZER = Path(__file__).parents[2] / "examples" / "sft" / "default" / "model"
SETTINGS = {"chunk_size": 10_000, "loss_chunk_size": 9}
WORDS = [f"word{i % 7} and {i % 5} more of it" for i in range(12)]
PROMPTS = {"prompt": WORDS}
PAIRS = PROMPTS | {"chosen": [f" yes, {word}" for word in WORDS], "rejected": [" no, not at all"] * len(WORDS)}
DATA = {
    "sft": {"text": [" ".join([word] * (1 + i % 3)) for i, word in enumerate(WORDS)]},
    "dpo": PAIRS,
    "kto": PROMPTS | {"completion": PAIRS["chosen"], "label": [True, False, True] * 4},
    "reward": PAIRS,
    "grpo": PROMPTS,
    "rloo": PROMPTS,
}
# Times and counts of a run; what is left must agree.
LEFT_OUT = ("runtime", "per_second", "flos", "step_time", "completions/")


def lengths(completions, **_):
    return [float(len(completion) % 7) for completion in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model on disk, from which trainers load their reference models."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=4096, num_key_value_heads=2, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "causal")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("causal", "reward"):
        tokenizer.save_pretrained(folder / name)
    return folder


def made(name: str, models: Path, output: Path, **settings):
    """A trainer of that name with a tiny model, and the model."""
    prefix = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}[name]
    if name == "reward":
        model = LlamaForSequenceClassification.from_pretrained(models / "reward")
    else:
        model = LlamaForCausalLM.from_pretrained(models / "causal")
    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    extra, own = {}, {"max_length": 64}
    if name in ("grpo", "rloo"):
        extra["reward_funcs"] = lengths
        own = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1 if name == "rloo" else 0.0}
    args = getattr(trl, f"{prefix}Config")(
        str(output), max_steps=3, learning_rate=1e-3, logging_steps=1, use_cpu=True, bf16=False, report_to=[],
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, seed=1,
        **own, **{"per_device_train_batch_size": 2} | settings,
    )  # fmt: skip
    data = Dataset.from_dict(DATA[name])
    trainer_class = getattr(trl, f"{prefix}Trainer")
    return trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer, **extra), model


def logged(trainer) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in LEFT_OUT)}
        for entry in trainer.state.log_history
    ]


TRAINERS = {
    "sft": {},
    "sft, dft": {"loss_type": "dft"},
    "sft, label smoothing": {"label_smoothing_factor": 0.1},
    "dpo": {},
    "dpo, one pair": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "kto": {},
    "reward": {},
    "grpo": {},
    "rloo": {},
}
# How their losses weigh tokens, as it was found out: three products of the head.
WEIGHED = {"sft": ("alike",), "dpo": (), "dpo, one pair": ("opposed",)}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl(tmp_path, folder, monkeypatch, name):
    """With settings alone: the policy and, where there is one, the reference model are converted when they are prepared."""
    results = []
    for converted in (True, False):
        if converted:
            monkeypatch.setenv("DS_MINIS_CONFIG", json.dumps(SETTINGS))
        else:
            monkeypatch.delenv("DS_MINIS_CONFIG")
        trainer, model = made(name.partition(",")[0], folder, tmp_path / str(converted), **TRAINERS[name])
        trainer.train()
        results.append((logged(trainer), {n: p.detach() for n, p in model.named_parameters()}))
        if converted and name != "reward":  # which has no LM head
            assert mini_sequence_report(model).loss.startswith("tiled, ")
            assert mini_sequence_report(model).last_loss.startswith("by chunks")
            assert "all logits" not in mini_sequence_report(model).last_loss
            if name in WEIGHED:
                (head,) = model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.heads()
                assert head.chunking.memory.one_factor == {"fused_lm_head": WEIGHED[name]}
    assert len(results[0][0]) == len(results[1][0]) >= 3
    for entry, expected in zip(results[0][0], results[1][0], strict=True):
        assert entry == pytest.approx(expected, rel=2e-4, abs=1e-5)
    for key, value in results[1][1].items():
        torch.testing.assert_close(results[0][1][key], value, rtol=0, atol=3e-5)


class Weighted:
    """A loss of the user's own for the Trainer."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, VOCAB_SIZE)
        losses = F.cross_entropy(logits.float(), labels[:, 1:].reshape(-1), reduction="none")
        return (losses * torch.linspace(0.5, 1.5, len(losses))).sum() / num_items_in_batch


def test_the_trainer_with_a_loss_function_of_ones_own(tmp_path):
    results = []
    plain = build("gemma2")
    for converted in (True, False):
        model = copy.deepcopy(plain)
        if converted:
            convert_to_mini_sequence(model, SETTINGS)
        trainer = trainer_of(model, tmp_path, max_steps=3, logging_steps=1, optim="sgd", gradient_accumulation_steps=2)
        trainer.compute_loss_func = Weighted()
        trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        params = {n: p.detach() for n, p in model.named_parameters()}
        if converted:
            found = params
            assert mini_sequence_report(model).last_loss == "by chunks (cross_entropy)"
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert_same_tensors(found, params)


def ids(seed: int) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (4, 19), generator=torch.Generator().manual_seed(seed))


def sequence_log_probs(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1] / 0.9
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].sum(-1)


def dpo_step(model, tokens):
    """Chosen and rejected in one batch; the model without its adapters is the reference."""
    chosen, rejected = sequence_log_probs(model, tokens).chunk(2)
    with torch.no_grad(), model.disable_adapter():
        reference = sequence_log_probs(model, tokens).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected - (reference[0] - reference[1]))).mean()


def distillation_step(model, tokens, teacher):
    student = (model(input_ids=tokens).logits / 2).log_softmax(-1)
    with torch.no_grad():
        target = teacher(input_ids=tokens).logits
    return F.kl_div(student, (target / 2).softmax(-1), reduction="batchmean") * 4


@pytest.mark.parametrize("loop", ["dpo", "distillation"])
def test_a_loop_of_ones_own(loop):
    results = []
    for converted in (True, False):
        model, teacher = build("llama"), build("llama", seed=1).requires_grad_(False).eval()
        if converted:
            convert_to_mini_sequence(model, SETTINGS)
            convert_to_mini_sequence(teacher, SETTINGS)
        if loop == "dpo":
            model = add_lora(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for step in range(3):
            tokens = ids(step)
            loss = (
                dpo_step(model.train(), tokens) if loop == "dpo" else distillation_step(model.train(), tokens, teacher)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, {n: p.detach() for n, p in model.named_parameters()}))
        assert not converted or "all logits" not in mini_sequence_report(model).last_loss
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same_tensors(results[0][1], results[1][1])
