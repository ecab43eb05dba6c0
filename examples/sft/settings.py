"""Checks the environment of a run script: a misspelt setting would be ignored without a word.

python settings.py ROOT    exits with 2, and one line for each wrong setting
"""

from __future__ import annotations

import difflib
import os
import sys
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


def wrong_settings(environ: dict[str, str], root: Path) -> list[str]:
    """What is wrong with the settings among these variables, a line each."""
    lines = []
    for name, value in environ.items():
        if name in REMOVED:
            lines.append(f"{name}={value}: this setting has been removed; {REMOVED[name]}")
        near = _nearest(name)
        if near:
            lines.append(f"{name}={value}: no setting has this name; did you mean {near}? (README.md lists them)")
    stage = environ.get("ZERO_STAGE")
    stages = sorted(path.stem.removeprefix("zero") for path in (root / "deepspeed_configs").glob("zero*.json"))
    if stage is not None and stage not in stages and "DEEPSPEED_CONFIG" not in environ:
        lines.append(f"ZERO_STAGE={stage}: one of {', '.join(stages)} is allowed (deepspeed_configs/zero*.json)")
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
    wrong = wrong_settings(dict(os.environ), Path(sys.argv[1]))
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(2 if wrong else 0)
