"""Starts the programs of `clients/` as their users would, each once, and reads what came out."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from models import CONFIGS
from safetensors.torch import load_file
from support import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

TESTS = Path(__file__).parent
CLIENTS, DEFAULT = TESTS / "clients", TESTS.parent / "examples" / "sft" / "default"
CHUNKS = {"chunk_size": 10, "loss_chunk_size": 9}
ON = {"mini_sequence": CHUNKS}
BY_VARIABLE = {"DS_MINIS_CONFIG": json.dumps(CHUNKS)}
BY_RUN = {"DS_MINIS_AUTOLOAD": "0"}  # then `-m ds_minis.run` attaches what `import torch` does not
TRAINER_FLAGS = (
    "--output_dir OUT --report_to none --disable_tqdm True --optim sgd --lr_scheduler_type constant --max_steps 4 "
    "--logging_steps 1 --eval_strategy steps --eval_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 2"
).split()


# One run for each launcher, engine and source of settings, which imports everything anew, as a user's does.
COLD_RUNS = """
ddp-yaml ddp-run ddp-plugin zero2-json loop-zero3-json loop-zero1-run trainer-variable trainer-ddp-callback
sft-yaml sft-callback trl-yaml
""".split()
COLD = {  # a user's shell: every process imports everything anew
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


@dataclass
class Run:
    """One launch that ended: its folder, what all its ranks printed, and the facts that a client saved."""

    folder: Path
    printed: str
    returncode: int
    facts: dict = field(default_factory=dict)

    @property
    def reports(self) -> list[str]:
        """The first line of every conversion report that was printed; another rank's progress bar may stand before it."""
        return re.findall(r"ds_minis \(.*", self.printed)

    @property
    def log(self) -> list[dict]:
        """The log of a trainer."""
        saved = self.folder / "checkpoint-4" / "trainer_state.json"
        return self.facts["log"] if "log" in self.facts else json.loads(saved.read_text())["log_history"]

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The weights at the end of the training."""
        saved = [self.folder / f"{name}.safetensors" for name in ("model", "adapter_model")]
        return self.facts.get("params") or load_file(next(path for path in saved if path.exists()))


class Clients:
    """A folder with a model, data, and the configuration files and results of all launches."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.data = folder, folder / "model", folder / "data"
        self._make_model(self.model)
        self._make_data()
        self._runs: dict[str, Run] = {}

    @functools.cached_property
    def tied_model(self) -> Path:
        """A model whose LM head is its embedding."""
        self._make_model(self.folder / "tied", "llama-tied-bias")
        return self.folder / "tied"

    def _make_model(self, folder: Path, family: str = "llama") -> None:
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id = 4096, 1, 3, 0
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEFAULT / "model").save_pretrained(folder)

    def _make_data(self) -> None:
        self.data.mkdir()
        for split, count in (("train", 24), ("test", 10)):
            lines = (DEFAULT / "data" / f"{split}.jsonl").read_text().splitlines()
            (self.data / f"{split}.jsonl").write_text("\n".join(lines[:count]))

    def ds_json(self, name: str, stage: int, **others) -> str:
        """A DeepSpeed JSON; its "auto" is for accelerate and the Trainer to fill in."""
        auto = ["gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"]
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {"zero_optimization": zero | {"stage3_gather_16bit_weights_on_model_save": True}}
        config |= dict.fromkeys(auto, "auto") | {"zero_allow_untested_optimizer": True} | others
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        return str(path)

    def yaml(self, name: str, *, ds_json: str | None = None, **section) -> str:
        """An accelerate configuration: DeepSpeed if it has a JSON, else DDP. The machine's part is left to flags."""
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
        if ds_json is not None:
            engine = {"deepspeed_config_file": ds_json, "zero3_init_flag": False}
            config |= {"distributed_type": "DEEPSPEED", "deepspeed_config": engine}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | section))
        return str(path)

    def run(self, name: str, command: list[str], **env: str) -> Run:
        """Runs a command, unless it was run before under this name; OUT in it stands for a folder of its own."""
        if name in self._runs:
            return self._runs[name]
        folder = self.folder / name
        folder.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DS_MINIS", "ACCELERATE_"))}
        environment |= (COLD if name in COLD_RUNS else warm.environment()) | {
            "CUDA_VISIBLE_DEVICES": "",
            "FACTS": str(folder / "facts.pt"),
            "PYTHONPATH": str(TESTS.parent),  # this checkout, whatever is installed
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [argument.replace("OUT", str(folder)) for argument in command],
            cwd=self.folder, env=environment | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=600,
        )  # fmt: skip
        facts = torch.load(folder / "facts.pt") if (folder / "facts.pt").exists() else {}
        self._runs[name] = Run(folder, done.stdout, done.returncode, facts)
        return self._runs[name]


LAUNCH_FLAGS = "--num_processes 2 --num_machines 1 --main_process_port 0".split()


def accelerate_launch(config: str, *command: str) -> list[str]:
    return ["accelerate", "launch", "--config_file", config, *LAUNCH_FLAGS, *command]


def torchrun(*command: str) -> list[str]:
    return ["torchrun", "--standalone", "--nproc_per_node", "2", *command]


def client(name: str) -> str:
    return str(CLIENTS / f"{name}.py")
