"""Checks the environment of a run script: a misspelt setting would be ignored without a word.

python settings.py ROOT ENGINE    exits with 2, and one line for each wrong setting; ENGINE as the run scripts call it
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NAMES = """
MODEL DATASET SPLITS OUTPUT_DIR NUM_PROCESSES NUM_MACHINES MACHINE_RANK MAIN_PROCESS_IP MAIN_PROCESS_PORT FULL ZERO_STAGE
FSDP_VERSION ACCELERATE_CONFIG DEEPSPEED_CONFIG QUANT_DTYPE LORA_R LORA_ALPHA LORA_DROPOUT
LORA_TARGET_MODULES LORA_MODULES_TO_SAVE MAX_LENGTH PACKING LEARNING_RATE NUM_TRAIN_EPOCHS MAX_STEPS PER_DEVICE_BATCH_SIZE
GRADIENT_ACCUMULATION_STEPS SEQUENCE_PARALLEL CHAT_TEMPLATE USE_FLASH_ATTN LOGGING_STEPS EVAL_STRATEGY SAVE_STRATEGY SEED
RESUME PYTHON
""".split()
REMOVED = {
    "MINI_SEQUENCE_LOSS": "leave it out: ds_minis answers TRL's calls for a loss from the model's own LM head, by chunks",
}
_MISSPELT = 0.86  # how much alike a variable and a setting are, at least
_SHORT = 7  # letters up to which a setting's plural (MODELS), or PYTHON3, may be somebody else's variable


@dataclass(frozen=True)
class Rule:
    """What a setting may be."""

    allowed: str
    is_right: Callable[[str], bool]
    names: tuple[str, ...] = ()


def whole(least: int, most: float = math.inf, *, or_: str = "") -> Rule:
    """A whole number in these bounds, or one word more."""
    words = f"a whole number from {least}" + (f" to {most}" if most < math.inf else "") + (f", or {or_}" if or_ else "")
    return Rule(words, lambda text: text == or_ != "" or least <= _value(text, int) <= most)


def number(words: str, is_right: Callable[[float], bool]) -> Rule:
    return Rule(words, lambda text: is_right(_value(text, float)))


def one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda text: text in names, names)


def _value(text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        return math.nan


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


_FILE = Rule("a file that exists", lambda text: Path(text).is_file())
_JSON = Rule("a file with JSON in it, without comments", lambda text: _is_json(Path(text)))
_BOOL = Rule("True or False", _is_bool)
RULES = {
    "NUM_PROCESSES": whole(1),
    "NUM_MACHINES": whole(1),
    "MACHINE_RANK": whole(0),
    "MAIN_PROCESS_PORT": whole(0, 65535),
    "FULL": one_of("0", "1"),
    "FSDP_VERSION": one_of("1", "2"),
    "ACCELERATE_CONFIG": _FILE,
    "DEEPSPEED_CONFIG": _JSON,
    "QUANT_DTYPE": one_of("float32", "bfloat16", "float16"),
    "LORA_R": whole(1),
    "LORA_ALPHA": whole(1),
    "LORA_DROPOUT": number("a number from 0, below 1", lambda value: 0 <= value < 1),
    "MAX_LENGTH": whole(1),
    "PACKING": _BOOL,
    "LEARNING_RATE": number("a number above 0", lambda value: 0 < value < math.inf),
    "NUM_TRAIN_EPOCHS": number("a number above 0", lambda value: 0 < value < math.inf),
    "MAX_STEPS": whole(1, or_="-1"),
    "PER_DEVICE_BATCH_SIZE": whole(1),
    "GRADIENT_ACCUMULATION_STEPS": whole(1),
    "CHAT_TEMPLATE": one_of("none", "chatml", "zephyr"),
    "USE_FLASH_ATTN": _BOOL,
    "LOGGING_STEPS": number("a number above 0", lambda value: 0 < value < math.inf),
    "EVAL_STRATEGY": one_of("no", "steps", "epoch"),
    "SAVE_STRATEGY": one_of("no", "steps", "epoch", "best"),
    "SEED": whole(0, 2**32 - 1),
}
# Settings that only some of the scripts read, by what ENGINE begins with.
OF_ENGINES = {
    "ZERO_STAGE": ("deepspeed",),
    "DEEPSPEED_CONFIG": ("deepspeed", "qlora-zero3"),
    "FSDP_VERSION": ("fsdp",),
    "QUANT_DTYPE": ("qlora",),
}
_SCRIPTS = {"deepspeed": "run_peft_deepspeed.sh", "fsdp": "run_peft_fsdp.sh", "qlora": "the QLoRA scripts"}


def wrong_settings(environ: dict[str, str], root: Path, engine: str) -> list[str]:
    """What is wrong with the settings among these variables, a line each. An empty one is the default."""
    lines = []
    for name, value in environ.items():
        if name in REMOVED:
            lines.append(f"{name}={value}: this setting has been removed; {REMOVED[name]}")
        near = _nearest(name)
        if near:
            lines.append(f"{name}={value}: no setting has this name; did you mean {near}? (README.md lists them)")
    given = {name: environ[name] for name in NAMES if environ.get(name)}
    stages = sorted(path.stem.removeprefix("zero") for path in (root / "deepspeed_configs").glob("zero*.json"))
    rules = RULES if "DEEPSPEED_CONFIG" in given else RULES | {"ZERO_STAGE": one_of(*stages)}
    for name, rule in rules.items():
        if name in given and not rule.is_right(given[name]):
            near = difflib.get_close_matches(given[name], rule.names, n=1)
            more = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{name}={given[name]}: {rule.allowed} is allowed{more}")
    return lines or _unread(given, engine)


def _unread(given: dict[str, str], engine: str) -> list[str]:
    """Settings that would change nothing beside the others."""
    lines = []
    for name, engines in OF_ENGINES.items():
        if name in given and not engine.startswith(engines):
            lines.append(
                f"{name}={given[name]}: this script does not read it, but {_SCRIPTS[engines[0]]}: leave it out"
            )
    if given.get("FULL") == "1":
        adapters = [name for name in given if name.startswith("LORA_")]
        lines += [f"{name}={given[name]}: FULL=1 trains no adapters: leave one of the two out" for name in adapters]
    machines, rank = int(given.get("NUM_MACHINES", "1")), int(given.get("MACHINE_RANK", "0"))
    if rank >= machines:
        lines.append(f"MACHINE_RANK={rank}: 0 to {machines - 1} is allowed with NUM_MACHINES={machines}")
    if machines == 1 and "MAIN_PROCESS_IP" in given:
        lines.append(f"MAIN_PROCESS_IP={given['MAIN_PROCESS_IP']}: it is read with NUM_MACHINES above 1 alone")
    if machines > 1:
        needed = {"MAIN_PROCESS_IP": "the address of the first machine", "NUM_PROCESSES": "the total over all machines"}
        lines += [
            f"NUM_MACHINES={machines}: {n}, {what}, is needed too" for n, what in needed.items() if n not in given
        ]
    if int(given.get("NUM_PROCESSES", machines)) % machines:
        lines.append(f"NUM_PROCESSES={given['NUM_PROCESSES']}: a multiple of NUM_MACHINES={machines} is allowed")
    return lines


def _nearest(name: str) -> str:
    """The setting that a variable is a misspelling of; empty if it is one itself, or somebody else's."""
    if name in NAMES or len(name) < 4:
        return ""
    swapped = [known for known in NAMES if sorted(known) == sorted(name.upper())]  # MODLE, or model
    alike = difflib.get_close_matches(name, NAMES, n=1, cutoff=_MISSPELT) if len(name) > 4 else []
    near = next(iter(swapped or alike), "")
    return "" if near and name in (f"{near}S", f"{near}3") and len(name) <= _SHORT else near


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from ds_minis.environment import wrong_variables

    wrong = wrong_settings(dict(os.environ), Path(sys.argv[1]), sys.argv[2]) + wrong_variables()
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(2 if wrong else 0)
