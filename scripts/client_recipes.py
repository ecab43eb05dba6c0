"""Other people's training programs: what to install for each, and how to start it on a tiny model for three steps.

Nothing here turns mini-sequences on; `clients.py` does, by configuration alone. Each recipe writes the files that its
program wants into a folder and gives the command; the program leaves `trainer_state.json` and weights in `OUT`.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "examples" / "sft" / "default" / "data" / "train.jsonl"
STEPS, ROWS, LENGTH = 3, 12, 96
TRAINER = {  # of transformers' TrainingArguments, which all of these programs are built on
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "sgd",
    "max_grad_norm": 1.0,
    "seed": 0,
}


@dataclass(frozen=True)
class Client:
    """A program of somebody else's.

    Attributes:
        name: as it is called in the table.
        package: what is installed, with its version pinned.
        prepare: called with a folder that holds `model/`; writes what the program needs and returns its command, in which
            OUT stands for the folder of a run and BIN for the programs of the environment.
        without: dependencies that are not installed: no part of training a language model, or no build for a CPU.
        stubs: of those, what the program imports all the same; an empty module is put in its place.
        pins: further packages, with versions.
        engine: what the program runs in, in words.
        launch_yaml: the program is started by accelerate: the settings come from a section of its YAML.
        yaml: what that YAML says of the engine.
        ran: what accelerate calls its engine, and the number of processes: on a CPU it takes others without a word. Empty:
            not looked at.
        env: further variables of its environment.
        why_not: why it is not run on any machine like this one; empty if it is.
    """

    name: str
    package: str
    prepare: Callable[[Path], list[str]]
    without: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    engine: str = "one process"
    launch_yaml: bool = False
    yaml: dict = field(default_factory=lambda: {"distributed_type": "MULTI_GPU"})
    ran: str = ""
    env: dict[str, str] = field(default_factory=dict)
    why_not: str = ""


def conversations() -> list[tuple[str, str]]:
    """Questions and answers from the example's data; the answers are cut to a few hundred characters."""
    rows = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()[:ROWS]]
    return [(row[0]["content"], row[1]["content"][:400]) for row in rows]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_json(path: Path, content: dict) -> Path:
    """JSON is YAML too."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(folder: Path) -> Path:
    """A LoRA of the model in the folder, drawn from a seed; made unless it is there."""
    place = folder / "adapter"
    if not place.exists():
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LORA, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(place)
    return place


class NoSource(Exception):
    """A file could not be downloaded."""


def source_file(folder: Path, repository: str, commit: str, path: str) -> Path:
    """A file of a repository on GitHub, at a commit; downloaded unless it is there. Those of one folder lie side by side.

    Raises:
        NoSource: it could not be had.
    """
    place = folder / "sources" / repository / path
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        address = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer, place.with_suffix(".part").open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise NoSource(f"{address} could not be had: {error}") from None
        place.with_suffix(".part").rename(place)
    return place


LAUNCH = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
ON_CPU = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


def accelerate_launch(script: Path, settings: dict) -> list[str]:
    return [
        "BIN/python",
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "YAML",
        *LAUNCH,
        str(script),
        *flags(settings),
    ]


def run_clm(folder: Path) -> list[str]:
    """transformers' example for language models, with its Trainer."""
    script = source_file(
        folder,
        "huggingface/transformers",
        "00d481d18f914b55e65faa31e82321629691eadb",
        "examples/pytorch/language-modeling/run_clm.py",
    )
    text = folder / "run_clm" / "train.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join(f"{q}\n{a}" for q, a in conversations()), encoding="utf-8")
    settings = {"model_name_or_path": folder / "model", "train_file": text, "validation_file": text}
    settings |= {"block_size": LENGTH, "do_train": True, "output_dir": "OUT"} | TRAINER | ON_CPU
    return accelerate_launch(script, settings)


def peft_sft(folder: Path) -> list[str]:
    """PEFT's example for supervised fine-tuning, with TRL's SFTTrainer and LoRA."""
    sft = "huggingface/peft", "493e7539c6201e497c19bcd22a366a7480c98264", "examples/sft/train.py"
    source_file(folder, "huggingface/peft", "93288afbc56115d6283c5b330b4adcf6c024e47b", "examples/sft/utils.py")
    script = source_file(folder, *sft)
    rows = [{"messages": chat(*talk)} for talk in conversations()]
    data = write_rows(folder / "peft-sft" / "train.jsonl", rows).parent
    write_rows(data / "test.jsonl", rows[:2])
    settings = {"model_name_or_path": folder / "model", "dataset_name": data, "output_dir": "OUT"} | TRAINER | ON_CPU
    settings |= {"use_peft_lora": True, "lora_r": 8, "lora_dropout": 0.0, "max_length": LENGTH}
    return accelerate_launch(script, settings)


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def trl(kind: str) -> Callable[[Path], list[str]]:
    """`trl sft`, `trl dpo`, ...: TRL's commands, in two processes under DDP."""

    def prepare(folder: Path) -> list[str]:
        talks = conversations()
        wrong = [answer[::-1] for _, answer in talks]
        match kind:
            case "sft":
                rows = [{"messages": chat(*talk)} for talk in talks]
            case "dpo" | "reward":
                rows = [{"chosen": chat(q, a), "rejected": chat(q, w)} for (q, a), w in zip(talks, wrong, strict=True)]
            case "kto":
                pairs = [
                    (q, a if i % 2 else w, bool(i % 2)) for i, ((q, a), w) in enumerate(zip(talks, wrong, strict=True))
                ]
                rows = [
                    {"prompt": [chat(q, a)[0]], "completion": [chat(q, a)[1]], "label": good} for q, a, good in pairs
                ]
        data = write_rows(folder / f"trl-{kind}" / "train.jsonl", rows).parent
        settings = {"model_name_or_path": folder / "model", "dataset_name": data, "output_dir": "OUT"} | TRAINER
        settings |= {"max_length": LENGTH, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        launch = [
            "--accelerate_config",
            "YAML",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
        ]
        return ["BIN/trl", kind, *launch, *flags(settings)]

    return prepare


def llamafactory(stage: str) -> Callable[[Path], list[str]]:
    """`llamafactory-cli train` with a YAML."""

    def prepare(folder: Path) -> list[str]:
        data = folder / f"llamafactory-{stage}"
        if stage == "pt":
            rows, columns = [{"text": f"{q}\n{a}"} for q, a in conversations()], {"prompt": "text"}
        else:
            rows = [{"instruction": q, "output": a} for q, a in conversations()]
            columns = {"prompt": "instruction", "response": "output"}
        write_rows(data / "tiny.jsonl", rows)
        write_json(data / "dataset_info.json", {"tiny": {"file_name": "tiny.jsonl", "columns": columns}})
        settings = TRAINER | {"model_name_or_path": str(folder / "model"), "stage": stage, "do_train": True}
        settings |= {"finetuning_type": "full", "dataset": "tiny", "dataset_dir": str(data), "template": "default"}
        settings |= {"cutoff_len": LENGTH, "overwrite_output_dir": True, "report_to": "none"}
        settings |= {
            "use_cpu": True,
            "bf16": False,
            "pure_bf16": False,
            "plot_loss": False,
            "preprocessing_num_workers": 1,
        }
        return ["BIN/llamafactory-cli", "train", str(write_json(data / "train.yaml", settings)), "output_dir=OUT"]

    return prepare


def swift(folder: Path) -> list[str]:
    """`swift sft`."""
    data = write_rows(folder / "swift" / "train.jsonl", [{"messages": chat(*talk)} for talk in conversations()])
    settings = TRAINER | {"model": folder / "model", "model_type": "llama", "template": "chatml", "dataset": data}
    settings |= {"tuner_type": "full", "torch_dtype": "float32", "max_length": LENGTH, "output_dir": "OUT"}
    settings |= {"use_cpu": True, "report_to": "none", "split_dataset_ratio": 0, "dataset_num_proc": 1}
    settings |= {"add_version": False, "gradient_checkpointing": False, "dataloader_num_workers": 0}
    return ["BIN/swift", "sft", *flags(settings)]


def axolotl(adapter: str) -> Callable[[Path], list[str]]:
    """`axolotl train` with a YAML."""

    def prepare(folder: Path) -> list[str]:
        data = folder / f"axolotl-{adapter or 'full'}"
        rows = write_rows(data / "train.jsonl", [{"messages": chat(*talk)} for talk in conversations()])
        same = dict(TRAINER)
        same["micro_batch_size"] = same.pop("per_device_train_batch_size")
        same["lr_scheduler"], same["optimizer"] = same.pop("lr_scheduler_type"), same.pop("optim")
        settings = same | {"base_model": str(folder / "model"), "sequence_len": LENGTH}
        settings |= {"datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template"}]}
        settings |= {"dataset_prepared_path": str(data / "prepared"), "chat_template": "chatml", "num_epochs": 1}
        settings |= {"bf16": False, "fp16": False, "tf32": False, "flash_attention": False, "sdp_attention": True}
        settings |= {"use_cpu": True, "dataset_processes": 1, "gradient_checkpointing": False, "val_set_size": 0}
        if adapter:  # one that is there already, as axolotl draws a new one from no seed
            settings |= {"adapter": adapter, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
            settings |= {"lora_target_modules": LORA, "lora_model_dir": str(make_adapter(folder))}
            settings |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)  # for GPUs
        config = write_json(data / "train.yaml", settings)
        return ["BIN/axolotl", "train", str(config), "--launcher", "python", "--output-dir", "OUT"]

    return prepare


_TRL = {"package": "trl==1.16.0", "pins": ("transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0")}
_DDP = {"engine": "2 processes, DDP", "launch_yaml": True}
_FACTORY = {
    "package": "llamafactory==0.9.5",
    "without": ("torchvision", "torchaudio", "gradio", "matplotlib"),
    "stubs": ("torchaudio",),  # of which there is no build for torch's CPU wheel
}
_SWIFT = {"package": "ms-swift==4.6.0", "without": ("openai", "oss2", "nltk", "rouge", "tensorboard")}
_AXOLOTL = {
    "package": "axolotl==0.19.0",
    "without": (
        *("xformers", "gradio", "modal", "s3fs", "gcsfs", "adlfs", "ocifs", "lm_eval", "trackio", "tensorboard"),
        *("openenv-core", "art"),
    ),
    "env": {"AXOLOTL_DO_NOT_TRACK": "1"},
}
_FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}
_ZERO2 = {"zero_stage": 2}
_ZERO3 = {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True}
_ENGINES = {
    "DDP": {"ran": "MULTI_CPU 2"},
    "FSDP2": {"ran": "FSDP 2", "yaml": {"distributed_type": "FSDP", "fsdp_config": _FSDP2}},
    "ZeRO-2": {"ran": "DEEPSPEED 2", "yaml": {"distributed_type": "DEEPSPEED", "deepspeed_config": _ZERO2}},
    "ZeRO-3": {"ran": "DEEPSPEED 2", "yaml": {"distributed_type": "DEEPSPEED", "deepspeed_config": _ZERO3}},
}
_RUN_CLM = {"package": "transformers==5.24.0", "pins": ("evaluate==0.4.6", "accelerate==1.15.0", "datasets==5.2.0")}
_PEFT = {"package": "peft==0.21.2", "pins": ("trl==1.16.0", "transformers==5.24.0", "accelerate==1.15.0")}


def _under(engine: str) -> dict:
    """The fields of a client that accelerate starts under an engine."""
    return {"engine": f"2 processes, {engine}", "launch_yaml": True} | _ENGINES[engine]


CLIENTS = (
    *(Client(f"trl {kind}", prepare=trl(kind), **_TRL, **_DDP) for kind in ("sft", "dpo", "kto", "reward")),
    *(Client(f"LLaMA-Factory {stage}", prepare=llamafactory(stage), **_FACTORY) for stage in ("sft", "pt")),
    Client("ms-swift sft, full", prepare=swift, **_SWIFT),
    *(Client(f"axolotl, {adapter or 'full'}", prepare=axolotl(adapter), **_AXOLOTL) for adapter in ("", "lora")),
    *(
        Client(f"run_clm.py of transformers, {engine}", prepare=run_clm, **_RUN_CLM, **_under(engine))
        for engine in ("DDP", "FSDP2", "ZeRO-3")
    ),
    *(
        Client(f"sft/train.py of PEFT, {engine}", prepare=peft_sft, **_PEFT, **_under(engine))
        for engine in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
    ),
    *(
        Client(name, package, prepare=lambda folder: [], why_not=reason)
        for name, package, reason in (
            (
                "fine-tune.py of LongLoRA",
                "transformers==4.34.1",
                "it needs transformers 4.34 and flash-attn, and ds_minis transformers 5.1",
            ),
            (
                "benchmark.py of mini-s",
                "transformers==5.24.0",
                "a training loop of its own on a GPU: no configuration reaches it, but a line of code "
                "(`convert_to_mini_sequence`)",
            ),
            ("unsloth", "unsloth==2026.10.9", "its source refuses to be imported without a GPU"),
        )
    ),
)
