"""Programs of users who changed nothing but a configuration: with and without mini-sequences the same training.

Each program of `clients/` runs as a user would start it, in real processes. None mentions this project, but for those
that test one line of code (`*_plugin.py`, `*_callback.py`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from client_runs import (
    BY_RUN,
    BY_VARIABLE,
    CHUNKS,
    CLIENTS,
    LAUNCH_FLAGS,
    ON,
    TESTS,
    TRAINER_FLAGS,
    Clients,
    Run,
    accelerate_launch,
    client,
    torchrun,
)
from models import assert_same_tensors
from safetensors.torch import load_file

from ds_minis import MiniSequenceConfig

pytestmark = pytest.mark.engine
VARIABLE = "environment variable DS_MINIS_CONFIG"


@pytest.fixture(scope="module")
def clients(tmp_path_factory) -> Clients:
    return Clients(tmp_path_factory.mktemp("clients"))


def accelerator_loop(c: Clients, name: str) -> Run:
    arguments = ["--model_name_or_path", str(c.model), "--output", "OUT/facts.pt"]
    script, ddp = [client("accelerator_loop"), *arguments], [*arguments, "--cpu"]
    plugin = [client("accelerator_plugin"), *ddp]
    match name:
        case "ddp":
            return c.run(name, accelerate_launch(c.yaml("off"), *script, "--cpu"))
        case "ddp-yaml":
            return c.run(name, accelerate_launch(c.yaml("on", **ON), *script, "--cpu"))
        case "ddp-run":
            launch = accelerate_launch(c.yaml("off"), "-m", "ds_minis.run", *script, "--cpu")
            return c.run(name, launch, **BY_VARIABLE, **BY_RUN)
        case "ddp-handler" | "ddp-plugin":
            return c.run(name, accelerate_launch(c.yaml("off"), *plugin, name.removeprefix("ddp-")))
        case "zero2" | "zero2-json":
            ds_json = c.ds_json(name, 2, **(ON if name == "zero2-json" else {}))
            return c.run(name, accelerate_launch(c.yaml(name, ds_json=ds_json), *script))
    raise KeyError(name)


def deepspeed_loop(c: Clients, name: str) -> Run:
    stage, _, source = name.removeprefix("loop-zero").partition("-")
    batch = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    ds_json = c.ds_json(name, int(stage), **batch, **(ON if source else {}))
    script = [client("deepspeed_loop"), "--model_name_or_path", str(c.model), "--output", "OUT/facts.pt"]
    script += ["--deepspeed", "--deepspeed_config", ds_json]
    if source == "run":
        return c.run(name, torchrun("-m", "ds_minis.run", *script), **BY_RUN)
    return c.run(name, torchrun(*script))


def trainer(c: Clients, name: str) -> Run:
    arguments = ["--model_name_or_path", str(c.model), *TRAINER_FLAGS]
    arguments += ["--learning_rate", "1.0", "--save_strategy", "no"]
    script, ddp = [client("trainer"), *arguments], [*arguments, "--use_cpu", "True"]
    match name:
        case "trainer":
            return c.run(name, ["python", *script, "--use_cpu", "True"])
        case "trainer-variable":
            return c.run(name, ["python", *script, "--use_cpu", "True"], **BY_VARIABLE)
        case "trainer-ddp" | "trainer-ddp-yaml":
            config = c.yaml("on", **ON) if name.endswith("yaml") else c.yaml("off")
            return c.run(name, accelerate_launch(config, client("trainer"), *ddp, "--token_accuracy"))
        case "trainer-ddp-callback":
            return c.run(name, accelerate_launch(c.yaml("off"), client("trainer_callback"), *ddp))
        case "trainer-zero3" | "trainer-zero3-json":
            ds_json = c.ds_json(name, 3, **(ON if name.endswith("json") else {}))
            return c.run(name, torchrun(*script, "--token_accuracy", "--deepspeed", ds_json))
    raise KeyError(name)


def sft(c: Clients, name: str) -> Run:
    """PEFT's style of script, and TRL's command."""
    flags = ["--model_name_or_path", str(c.model), "--dataset_name", str(c.data), *TRAINER_FLAGS]
    flags += ["--learning_rate", "2.0", "--max_length", "96", "--bf16", "False"]
    if name.startswith("trl"):
        observer = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(CLIENTS / "observer")])}
        tells_of_ddp = {"TORCH_CPP_LOG_LEVEL": "INFO", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
        config = c.yaml("on", **ON) if name.endswith("yaml") else c.yaml("off")
        # Without dropout, which TRL sets for its adapters: in a tiled layer it draws other random numbers.
        lora = ["--use_peft", "--lora_dropout", "0.0"]
        launch = ["trl", "sft", "--accelerate_config", config, *LAUNCH_FLAGS, *flags, "--use_cpu", "True", *lora]
        return c.run(name, [*launch, "--save_steps", "4"], **observer, **tells_of_ddp)
    config = c.yaml(name, ds_json=c.ds_json(name, 2), **(ON if name.endswith("yaml") else {}))
    script = client("sft_callback" if name.endswith("callback") else "sft")
    lora = ["--use_peft_lora", "True", "--ddp_backend", "gloo", "--save_strategy", "no"]
    return c.run(name, accelerate_launch(config, script, *flags, *lora))


DDP = {"engine": "DistributedDataParallel", "type": "MULTI_CPU", "processes": 2, "stage": None}


@dataclass(frozen=True)
class Case:
    """A launch with mini-sequences: how it is made, what must have run, and which source its report must name."""

    launch: Callable[[Clients, str], Run]
    plain: str
    name: str
    ran: dict
    source: str


def zero(stage: int) -> dict:
    return {"engine": "DeepSpeedEngine", "type": "DEEPSPEED", "processes": 2, "stage": stage}


def bare(stage: int) -> dict:
    return zero(stage) | {"type": "none of accelerate's"}


LOOPS = [
    Case(accelerator_loop, "ddp", "ddp-yaml", DDP, "accelerate config {folder}/on.yaml"),
    Case(accelerator_loop, "ddp", "ddp-run", DDP, VARIABLE),
    Case(accelerator_loop, "ddp", "ddp-handler", DDP, "MiniSequencePlugin"),
    Case(accelerator_loop, "ddp", "ddp-plugin", DDP, "MiniSequencePlugin"),
    Case(accelerator_loop, "zero2", "zero2-json", zero(2), "DeepSpeed config {folder}/zero2-json.json"),
    Case(deepspeed_loop, "loop-zero3", "loop-zero3-json", bare(3), "DeepSpeed config {folder}/loop-zero3-json.json"),
    Case(deepspeed_loop, "loop-zero1", "loop-zero1-run", bare(1), "DeepSpeed config {folder}/loop-zero1-run.json"),
]
SINGLE = {"engine": "LlamaForCausalLM", "type": "NO", "processes": 1, "stage": None}
TRL = {"type": "MULTI_CPU", "processes": 2}  # its engine is told by torch, see below
TRAINERS = [
    Case(trainer, "trainer", "trainer-variable", SINGLE, VARIABLE),
    Case(trainer, "trainer-ddp", "trainer-ddp-yaml", DDP, "accelerate config {folder}/on.yaml"),
    Case(trainer, "trainer-ddp", "trainer-ddp-callback", DDP, "MiniSequenceCallback"),
    Case(trainer, "trainer-zero3", "trainer-zero3-json", zero(3), "DeepSpeed config {folder}/trainer-zero3-json.json"),
    Case(sft, "sft", "sft-yaml", zero(2), "accelerate config {folder}/sft-yaml.yaml"),
    Case(sft, "sft", "sft-callback", zero(2), "MiniSequenceCallback"),
    Case(sft, "trl", "trl-yaml", TRL, "accelerate config {folder}/on.yaml"),
]


def each(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def ended_well(run: Run) -> Run:
    assert run.returncode == 0 and run.facts, run.printed[-5000:]
    return run


def pair(clients: Clients, case: Case) -> tuple[Run, Run]:
    """The launch with mini-sequences, and the one without."""
    return ended_well(case.launch(clients, case.name)), ended_well(case.launch(clients, case.plain))


def test_no_client_mentions_this_project():
    programs = (path for path in CLIENTS.rglob("*.py") if not path.name.startswith("test_"))
    scripts = {path.stem: path.read_text() for path in programs}
    mentioning = {name for name, text in scripts.items() if "ds_minis" in text or "mini_sequence" in text}
    assert mentioning == {"accelerator_plugin", "trainer_callback", "sft_callback"}
    assert {"accelerator_loop", "deepspeed_loop", "trainer", "sft", "common", "sitecustomize"} < scripts.keys()


def test_a_report_is_read_behind_a_progress_bar_of_another_rank(tmp_path):
    bar, report = "\rLoading weights: 100%|██████████| 21/21 [00:00<00:00, 8492.95it/s]", f"ds_minis (here): {CHUNKS}"
    printed = f"{bar}{report}\n  tiled: 1 x LlamaRMSNorm\n\n{report}\nno report of ds_minis\n"
    assert Run(tmp_path, printed, 0).reports == [report, report]


@each(LOOPS + TRAINERS)
def test_the_engine_that_was_asked_for_ran_with_and_without(clients, case):
    on, off = pair(clients, case)
    for run, mlp in ((on, "MiniSequence[LlamaMLP]"), (off, "LlamaMLP")):
        assert {key: run.facts[key] for key in case.ran} == case.ran
        assert run.facts["mlps"] == [mlp] * 2
        if "engine" not in case.ran:
            assert run.printed.count("DDP Initialized with") == 2 and "world_size: 2" in run.printed
    assert on.reports == [f"ds_minis ({case.source.format(folder=clients.folder)}): {CHUNKS}"]
    assert "  tiled as a whole: 2 x LlamaDecoderLayer\n" in on.printed and "  tiled: 1 x LlamaRMSNorm\n" in on.printed
    assert off.reports == [] and "tiled" not in off.printed


@each(LOOPS)
def test_losses_of_every_step_and_rank_are_the_same(clients, case):
    on, off = pair(clients, case)
    lengths = on.facts["lengths"]
    assert lengths == off.facts["lengths"] and len(lengths) == 12
    assert all(one != other for one, other in zip(lengths[::2], lengths[1::2], strict=True))
    assert min(lengths) > CHUNKS["chunk_size"]
    assert on.facts["losses"] == pytest.approx(off.facts["losses"], rel=1e-5)
    assert on.facts["losses"][-1] < on.facts["losses"][0] - 0.5


@each(TRAINERS)
def test_logs_of_training_and_evaluation_are_the_same(clients, case):
    on, off = pair(clients, case)
    kinds = []
    for entry, expected in zip(on.log, off.log, strict=True):
        exact = {"step", "eval_tokens", "eval_token_accuracy", "eval_mean_token_accuracy", "num_tokens"}
        for key in {"loss", "grad_norm", "eval_loss", "eval_entropy", *exact} & entry.keys():
            rel = 0 if key in exact else 1e-4 if key == "grad_norm" else 1e-5
            assert entry[key] == pytest.approx(expected[key], rel=rel, abs=0), (key, entry["step"])
            kinds.append(key)
    assert kinds.count("loss") == 4 and kinds.count("eval_loss") == 2
    losses = [entry["loss"] for entry in on.log if "loss" in entry]
    assert len(set(losses)) == 4


@each([case for case in TRAINERS if case.name in ("trainer-ddp-yaml", "trainer-zero3-json")])
def test_token_accuracy_over_all_ranks_is_the_same(clients, case):
    def evaluations(run: Run) -> list[tuple[int, float]]:
        return [(entry["eval_tokens"], entry["eval_token_accuracy"]) for entry in run.log if "eval_loss" in entry]

    found, expected = map(evaluations, pair(clients, case))
    assert found == expected and len(found) == 2
    assert all(tokens == 286 and accuracy > 0.05 for tokens, accuracy in found)


@each(LOOPS + TRAINERS)
def test_final_weights_are_the_same(clients, case):
    on, off = pair(clients, case)
    assert_same_tensors(on.params, off.params)
    start = load_file(clients.model / "model.safetensors")
    for name, param in on.params.items():
        if "lora_A" not in name:  # drawn at random; the second factor starts at zero
            assert (param - start.get(name, torch.zeros(()))).abs().max() > 1e-4, name


OTHER = {"chunk_size": 7}


def assert_both_doors_are_shown(run: Run, first: str, second: str) -> None:
    assert run.returncode != 0 and "two places ask for different mini-sequence settings" in run.printed
    one, other = MiniSequenceConfig(**CHUNKS).to_dict(), MiniSequenceConfig(**OTHER).to_dict()
    for source, settings in ((first, one), (second, other)):
        differs = {key: value for key, value in settings.items() if one[key] != other[key]}
        assert f"  {source}: {differs}" in run.printed, run.printed[-3000:]
    assert "loss " not in run.printed and not run.facts


def test_accelerate_yaml_and_deepspeed_json_that_disagree_train_nothing(clients):
    assert "\nloss " in accelerator_loop(clients, "zero2").printed
    ds_json = clients.ds_json("other", 2, mini_sequence=OTHER)
    config = clients.yaml("disagrees", ds_json=ds_json, **ON)
    arguments = ["--model_name_or_path", str(clients.model), "--output", "OUT/facts.pt"]
    run = clients.run("yaml-and-json", accelerate_launch(config, client("accelerator_loop"), *arguments))
    assert_both_doors_are_shown(run, f"accelerate config {config}", f"DeepSpeed config {ds_json}")


def test_accelerate_yaml_and_variable_that_disagree_train_nothing(clients):
    config = clients.yaml("on", **ON)
    arguments = ["--model_name_or_path", str(clients.model), "--output", "OUT/facts.pt", "--cpu"]
    launch = accelerate_launch(config, client("accelerator_loop"), *arguments)
    run = clients.run("yaml-and-variable", launch, DS_MINIS_CONFIG='{"chunk_size": 7}')
    assert_both_doors_are_shown(run, f"accelerate config {config}", VARIABLE)
