"""`ds-minis config validate FILE`: are the mini-sequence settings of an accelerate YAML or a DeepSpeed JSON right?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ds_minis.cli.show import Table, show
from ds_minis.config import MiniSequenceConfig
from ds_minis.config_sources import SECTION, Request, read_section, reconcile

EXAMPLES = """examples:
  ds-minis config validate accelerate_configs/fsdp.yaml
  ds-minis config validate deepspeed_configs/zero3.json --json

exit status: 0 right (the settings are printed), 1 wrong (one line says what, where, and what is allowed)"""
_ENGINE_KEYS = (
    "distributed_type",
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "bf16",
    "fp16",
)


def add_config(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    config = commands.add_parser("config", help="check a configuration file", description=__doc__)
    parts = config.add_subparsers(title="commands", metavar="command", dest="part", required=True)
    parser = parts.add_parser(
        "validate",
        help="are the settings in this file right?",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="an accelerate YAML, a DeepSpeed JSON, or settings alone as YAML or JSON")
    parser.add_argument("--json", action="store_true", help="print the settings as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    try:
        request, notes = validate(args.file)
    except ValueError as error:
        if args.json:
            print(json.dumps({"valid": False, "error": str(error)}))
        else:
            print(f"wrong: {error}")
        return 1
    settings = request.config.to_dict(defaults=False) if request else None
    if args.json:
        print(json.dumps({"valid": True, "settings": settings, "notes": notes}))
        return 0
    if settings is None:
        print(f'right, but {args.file} asks for nothing: it has no "{SECTION}" ("{SECTION}: true" is all defaults)')
    else:
        rows = [[key, json.dumps(value)] for key, value in settings.items()]
        words = ", ".join(f"{key}: {value}" for key, value in rows) or "all defaults"
        plain = f"right: {words} ({request.source})"
        show([Table((), rows, [plain], f"right ({request.source})") if rows else plain])
    for note in notes:
        print(f"note: {note}")
    return 0


def validate(file: str | Path) -> tuple[Request | None, list[str]]:
    """What a file asks for, together with the DeepSpeed JSON that it names; and what is odd about it.

    Raises:
        ValueError: it cannot be read, a setting is wrong, or two places disagree.
    """
    from ds_minis.planner.inputs.files import deepspeed_file, load_mapping

    path = Path(file)
    content = load_mapping(path)
    if content and not any(key in content for key in (SECTION, *_ENGINE_KEYS)):
        fields = MiniSequenceConfig().to_dict()
        if any(key in fields for key in content):
            return Request(MiniSequenceConfig.from_value(content, source=str(path)), str(path)), []
    requests = [read_section(content, str(path))]
    named = deepspeed_file(content, path)
    if named is not None:
        requests.append(read_section(load_mapping(named), str(named)))
    return reconcile(*requests), list(_notes(content))


def _notes(content: dict[str, Any]):
    kind = content.get("distributed_type")
    if kind == "MULTI_CPU":
        yield "with distributed_type MULTI_CPU accelerate starts one process: set MULTI_GPU, which runs on CPUs too"
    fsdp = content.get("fsdp_config") or {}
    if kind == "FSDP" and fsdp.get("fsdp_version", 1) != 2:
        yield "this is FSDP1: set fsdp_version: 2 in fsdp_config for LoRA, and for adapters that are trained in parts"
    if fsdp.get("fsdp_activation_checkpointing"):
        yield (
            "fsdp_activation_checkpointing draws other random numbers in backward: set the Trainer's gradient_checkpointing "
            "in its place"
        )
    if isinstance(content.get("parallelism_config"), dict) and content["parallelism_config"].get(
        "parallelism_config_sp_size", 1
    ) not in (1, None):
        yield (
            "accelerate's sequence parallelism (Ulysses) makes gradients too large under ZeRO-0 to 2: set "
            f'"sequence_parallel" under "{SECTION}" in its place'
        )
