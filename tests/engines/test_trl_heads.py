"""A trained LM head under TRL's loss, which reads its weight without calling it: under ZeRO-3 what it is under DDP.

ZeRO-3 reduces the gradients of a leaf module when that module's own backward has run. The heads of converted models were such
leaves: a tied one left the whole embedding untrained.
"""

import itertools

import pytest
from client_runs import ON, TRAINER_FLAGS, Clients, Run, accelerate_launch, client, torchrun
from models import assert_same_tensors
from safetensors.torch import load_file

pytestmark = pytest.mark.engine
DDP = {"engine": "DistributedDataParallel", "processes": 2, "stage": None}
ZERO3 = {"engine": "DeepSpeedEngine", "processes": 2, "stage": 3}
KINDS = list(itertools.product(("sft", "dpo"), ("untied", "tied", "saved")))
FLAGS = [
    *TRAINER_FLAGS[: TRAINER_FLAGS.index("--eval_strategy")], "--per_device_train_batch_size", "2", "--save_strategy", "no",
    "--learning_rate", "0.5", "--bf16", "False", "--max_length", "64", "--gradient_checkpointing", "False",
]  # fmt: skip


@pytest.fixture(scope="module")
def clients(tmp_path_factory) -> Clients:
    return Clients(tmp_path_factory.mktemp("heads"))


def model_of(c: Clients, head: str) -> str:
    return str(c.tied_model if head == "tied" else c.model)


def train(c: Clients, trainer: str, head: str, source: str) -> Run:
    """Plain DDP, or ZeRO-3 with mini-sequences by the named source of settings."""
    name = f"{trainer}-{head}-{source}"
    script = [client("trl_heads"), "--model_name_or_path", model_of(c, head), "--trainer", trainer, *FLAGS]
    script += ["--save_head", str(head == "saved")]
    if source == "ddp":
        return c.run(name, accelerate_launch(c.yaml("off"), *script, "--use_cpu", "True"))
    ds_json = c.ds_json(name, 3, **(ON if source in ("json", "flag") else {}))
    if source == "flag":  # TrainingArguments(deepspeed=...), which no launcher knows of
        return c.run(name, torchrun(*script, "--deepspeed", ds_json))
    config = c.yaml(name, ds_json=ds_json, **(ON if source == "yaml" else {}))
    env = {"DS_MINIS_CONFIG": '{"chunk_size": 10, "loss_chunk_size": 9}'} if source == "variable" else {}
    return c.run(name, accelerate_launch(config, *script, "--ddp_backend", "gloo"), **env)


def ended_well(run: Run, ran: dict) -> Run:
    assert run.returncode == 0 and run.facts, run.printed[-5000:]
    assert {key: run.facts[key] for key in ran} == ran
    return run


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.facts["log"] if "loss" in entry]


def assert_trained_like_ddp(clients: Clients, trainer: str, head: str, source: str) -> None:
    plain = ended_well(train(clients, trainer, head, "ddp"), DDP)
    ours = ended_well(train(clients, trainer, head, source), ZERO3)
    models = 2 if trainer == "dpo" and head != "saved" else 1  # full DPO has a reference model
    assert not plain.reports and len(ours.reports) == models and ours.facts["mlps"] == ["MiniSequence[LlamaMLP]"] * 2
    assert len(losses(ours)) == 4 and losses(ours) == pytest.approx(losses(plain), rel=1e-4)
    assert_same_tensors(ours.params, plain.params, rtol=1e-4)
    trained = "embed_tokens.weight" if head == "tied" else "lm_head.modules_to_save.default.weight"
    (name,) = [n for n in ours.params if n.endswith((trained, "lm_head.weight"))][:1]
    start = load_file(f"{model_of(clients, head)}/model.safetensors")
    before = start["model.embed_tokens.weight" if head == "tied" else "lm_head.weight"]
    assert (ours.params[name] - before).abs().max() > 1e-3


@pytest.mark.parametrize(("trainer", "head"), KINDS)
def test_head_trains_under_zero3_as_under_ddp(clients, trainer, head):
    assert_trained_like_ddp(clients, trainer, head, "json")


@pytest.mark.parametrize("source", ["yaml", "variable", "flag"])
def test_head_trains_by_every_source_of_settings(clients, source):
    assert_trained_like_ddp(clients, "sft", "tied", source)
