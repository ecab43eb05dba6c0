"""Every run script of the SFT example with its engine in two processes: training, resuming, weights that load anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from client_runs import COLD
from safetensors.torch import load_file
from support import warm
from test_sft_example import EXAMPLE, ROOT, trained

pytestmark = pytest.mark.engine
PEFT = {
    "multigpu-lora": ("run_peft_multigpu.sh", {}, "MULTI_CPU, DistributedDataParallel"),
    "fsdp-lora": ("run_peft_fsdp.sh", {}, "FSDP, FSDPPeftModelForCausalLM"),
    "fsdp1-lora": ("run_peft_fsdp.sh", {"FSDP_VERSION": "1"}, "FSDP, FullyShardedDataParallel"),
    "qlora-fsdp": ("run_peft_qlora_fsdp.sh", {}, "FSDP, FSDPPeftModelForCausalLM"),
    "qlora-zero3": ("run_peft_qlora_deepspeed_stage3.sh", {}, "DEEPSPEED, DeepSpeedEngine"),
}
FULL = {
    "multigpu": ("run_peft_multigpu.sh", {}, "MULTI_CPU, DistributedDataParallel"),
    "fsdp": ("run_peft_fsdp.sh", {}, "FSDP, FSDPLlamaForCausalLM"),
    "fsdp1": ("run_peft_fsdp.sh", {"FSDP_VERSION": "1"}, "FSDP, FullyShardedDataParallel"),
    "zero2": ("run_peft_deepspeed.sh", {}, "DEEPSPEED, DeepSpeedEngine"),
    "zero3": ("run_peft_deepspeed.sh", {"ZERO_STAGE": "3"}, "DEEPSPEED, DeepSpeedEngine"),
}
SAVE = ("--save_steps", "2")
EVALUATE = {"zero3": ("--eval_strategy", "steps", "--eval_steps", "2", "--eval_on_start", "False")}
SETTINGS = {"FULL": "1", "SAVE_STRATEGY": "steps", "MAX_STEPS": "4"}


@pytest.mark.parametrize("name", PEFT)
def test_script_without_arguments_trains_adapters_with_its_engine(name, tmp_path):
    script, env, engine = PEFT[name]
    if name.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    summary, losses, folder, printed = trained(tmp_path, script=script, MAX_STEPS="4", **env)
    assert folder.name == f"sft-{name}"
    assert summary["engine"] == engine and summary["num_processes"] == 2 and f"engine       {engine}, 2" in printed
    assert summary["tiled_modules"] == 13
    assert summary["modules_in_4_bits"] == (28 if name.startswith("qlora") else 0)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    assert all(tensor.abs().max() > 1e-5 for key, tensor in load_file(folder / "adapter_model.safetensors").items())


def trained_in_full(cwd: Path, name: str, **env: str) -> tuple[dict, list[float], Path, str]:
    """A run of four steps with checkpoints, by the engine of that name."""
    script, settings, engine = FULL[name]
    flags = (*SAVE, *EVALUATE.get(name, ()))
    run = trained(cwd, *flags, script=script, **SETTINGS, **settings, **env)
    assert run[0]["engine"] == engine and run[0]["num_processes"] == 2 and run[0]["tiled_modules"] == 13
    return run


@pytest.fixture(scope="module")
def full_runs(tmp_path_factory):
    """Runs by engine; each is made when it is first asked for."""
    made = {}

    def run(name: str):
        if name not in made:
            made[name] = trained_in_full(tmp_path_factory.mktemp(name), name)
        return made[name]

    return run


@pytest.mark.parametrize("name", FULL)
def test_full_fine_tuning_resumes_as_if_it_had_not_stopped(full_runs, name, tmp_path):
    _, losses, folder, printed = full_runs(name)
    assert "steps aside" not in printed
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    copy = tmp_path / "outputs" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-4"))
    (copy / "model.safetensors").unlink()
    summary, resumed, _, _ = trained_in_full(tmp_path, name, RESUME="last")
    assert resumed == losses and summary["resumed_from_step"] == 2
    if name in EVALUATE:
        assert json.loads((copy / "all_results.json").read_text())["eval_loss"] > 0
    whole, again = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_all_engines_arrive_at_the_same_weights(full_runs):
    """Up to what Adam makes of rounding where gradients are next to nothing: single weights may differ, their sum may not."""
    runs = {name: full_runs(name) for name in FULL}
    start = load_file(runs["multigpu"][2] / "base_model" / "model.safetensors")
    expected = load_file(runs["multigpu"][2] / "model.safetensors")
    for _, losses, folder, _ in runs.values():
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(runs["multigpu"][1]), rtol=1e-5, atol=0)
        weights = load_file(folder / "model.safetensors")
        for key in expected:
            change = (expected[key] - start[key]).norm()
            assert change > 0 and (weights[key] - expected[key]).norm() < 1e-3 * change, (folder, key)


LOAD = """
import sys
sys.modules["ds_minis"] = None
import torch
from transformers import AutoModelForCausalLM
weights = []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    weights.append(model.state_dict())
torch.save(weights, sys.argv[1])
"""


def loaded(output: Path, *folders: Path) -> list[dict[str, torch.Tensor]]:
    """The weights that plain transformers loads, in a process that cannot import ds_minis."""
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # as if ds_minis were not installed
    subprocess.run([sys.executable, "-c", LOAD, str(output), *map(str, folders)], check=True, env=env)
    return torch.load(output)


def test_consolidated_weights_load_in_plain_transformers(full_runs, tmp_path):
    folders = [full_runs(name)[2] for name in ("multigpu", "fsdp", "fsdp1", "zero3")]
    for folder, weights in zip(folders, loaded(tmp_path / "weights.pt", *folders), strict=True):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == weights.keys() and all(torch.equal(saved[k], weights[k]) for k in saved)


def test_zero3_shards_are_put_together_by_deepspeeds_script(full_runs, tmp_path):
    folder = full_runs("zero3")[2]
    shards = folder / "checkpoint-4"
    command = [warm.python(), shards / "zero_to_fp32.py", shards, tmp_path / "merged", "--safe_serialization"]
    subprocess.run(command, check=True, env=os.environ | warm.environment(), stdout=subprocess.DEVNULL)
    shutil.copy(folder / "config.json", tmp_path / "merged")
    (merged,) = loaded(tmp_path / "weights.pt", tmp_path / "merged")
    whole = load_file(folder / "model.safetensors")
    assert merged.keys() == whole.keys() and all(torch.equal(merged[k], whole[k]) for k in whole)


def test_fsdp2_shards_resume_and_are_put_together_by_accelerate(full_runs, tmp_path):
    _, losses, whole, _ = full_runs("fsdp")
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())
    config["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(config))
    settings = {"ACCELERATE_CONFIG": str(tmp_path / "sharded.yaml")}
    _, sharded, folder, _ = trained_in_full(tmp_path, "fsdp", **settings)
    shutil.rmtree(folder / "checkpoint-4")
    resumed = trained_in_full(tmp_path, "fsdp", **settings, RESUME="last")[1]
    assert sharded == losses and resumed == losses
    shards = folder / "checkpoint-4" / "pytorch_model_fsdp_0"
    merge = ["accelerate", "merge-weights", shards, tmp_path / "merged"]
    subprocess.run(merge, check=True, env=os.environ | warm.environment())
    shutil.copy(whole / "config.json", tmp_path / "merged")
    (merged,) = loaded(tmp_path / "weights.pt", tmp_path / "merged")
    weights = load_file(whole / "model.safetensors")
    assert merged.keys() == weights.keys() and all(torch.equal(merged[k], weights[k]) for k in weights)


def test_deepspeeds_own_launcher(full_runs, tmp_path):
    flags = f"""--model_name_or_path {EXAMPLE}/default/model --dataset_name {EXAMPLE}/default/data --output_dir {tmp_path}/out
        --max_length 128 --max_steps 4 --learning_rate 3e-3 --per_device_train_batch_size 2 --logging_steps 1
        --gradient_accumulation_steps 2 --lr_scheduler_type cosine --weight_decay 1e-4 --seed 100
        --gradient_checkpointing True --save_strategy no --report_to none""".split()
    command = ["deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", "29617", str(EXAMPLE / "train.py")]
    config = ROOT / "deepspeed_configs" / "zero2.json"
    done = subprocess.run(
        [*command, "--deepspeed_config", str(config), *flags],
        env=os.environ | COLD, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["engine"] == "DEEPSPEED, DeepSpeedEngine" and summary["num_processes"] == 2
    assert summary["tiled_modules"] == 13
    assert summary["last_loss"] == pytest.approx(full_runs("zero2")[1][-1], rel=1e-5)
