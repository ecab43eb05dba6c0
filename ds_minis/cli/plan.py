"""`ds-minis plan MODEL`: the longest sequence that fits, with which settings; or what a length needs. No GPU, no weights."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from ds_minis.cli.plan_output import as_data, as_parts
from ds_minis.cli.show import show, working
from ds_minis.cli.wrong_argument import PICTURES, WRONG, WrongArgument, settings_of_pairs

DESCRIPTION = """Prints the longest sequence that fits on a GPU for plain training, for checkpointing and for ds_minis in each
setting worth having, with the memory of each part; or, with --seq, whether a length fits. A step of a few layers of the model
is traced on tensors without values: neither a GPU nor weights are needed."""
EXAMPLES = """examples:
  ds-minis plan meta-llama/Meta-Llama-3-8B --gpu-memory 80 --gpus 8 --engine zero3 --lora
  ds-minis plan Qwen/Qwen3-8B --gpu-memory 80 --seq 262144            # which settings, and how many GPUs
  ds-minis plan ./my-model --gpu-memory 24 --qlora --set head_groups=auto
  ds-minis plan MODEL --from accelerate.yaml --write recommended/    # read a configuration, write the one advised
  ds-minis plan MODEL --gpu-memory 80 --plot memory.png

exit status: 0 fits, 1 uncertain (fits only without the listed slack), 2 does not fit, 64 a wrong argument,
3 the command failed"""
FITS, UNCERTAIN, TOO_LARGE = 0, 1, 2
MOST_GB = 16_384  # of a card or a host; more is a unit that was mistaken


def add_plan(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser(
        "plan",
        help="how long a sequence fits, and with which settings?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.wrong = WRONG  # 2 is "does not fit"
    parser.add_argument("model", help="a hub id, a folder with a config.json, or a configuration as a JSON file")
    parser.add_argument("--gpu-memory", type=_positive, default=80.0, metavar="GB", help="of one card (default 80)")
    parser.add_argument("--gpus", type=_count, help="number of processes, one GPU each (default 1)")
    parser.add_argument(
        "--engine", help="single, ddp, fsdp2, zero0, zero1, zero2 or zero3 (default single; zero3 for more)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="train all parameters (default)")
    how.add_argument("--lora", action="store_true", help="adapters on all linear layers")
    how.add_argument("--qlora", action="store_true", help="adapters on 4-bit weights")
    parser.add_argument("--lora-rank", type=_count, default=16, metavar="R")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations: bfloat16, float16 or float32")
    parser.add_argument("--master-weights", action="store_true", help="weights in float32, autocast to --dtype")
    parser.add_argument("--optimizer", help="adamw (default), adamw_8bit, paged_adamw_8bit, adafactor or sgd")
    parser.add_argument("--batch", type=_count, help="sequences on each GPU at once (default 1)")
    parser.add_argument("--accumulation", type=_count, help="steps of gradient accumulation (default 1)")
    parser.add_argument("--offload-optimizer", action="store_true", help="optimizer states in host memory (ZeRO)")
    parser.add_argument("--offload-param", action="store_true", help="weights in host memory (ZeRO-3, FSDP2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a mini-sequence setting that all rows have"
    )
    parser.add_argument("--seq", type=_tokens, metavar="L", help="a length that must fit, such as 131072 or 128K")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="an accelerate YAML or a DeepSpeed JSON to start from"
    )
    parser.add_argument("--write", metavar="DIR", help="write the configuration that is advised into this folder")
    parser.add_argument(
        "--host-memory", type=_positive, metavar="GB", help="of one machine (default: 128 for each GPU)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw memory by part against length (needs matplotlib)")
    parser.add_argument("--no-cache", action="store_true", help="trace again, and keep nothing")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that a repository brings")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    try:
        settings = settings_of_pairs(args.set)
        with working("planning: a step of a few layers is traced"):
            result = plan(args, settings)
    except WrongArgument as error:
        print(f"ds-minis plan: {error}", file=sys.stderr)
        return WRONG
    if args.json:
        print(json.dumps(as_data(result), indent=2))
    else:
        show(as_parts(result))
    return {"fits": FITS, "uncertain": UNCERTAIN}.get(result.verdict, TOO_LARGE)


def plan(args: argparse.Namespace, settings: dict[str, Any]):
    """All that is printed, for arguments of the command line.

    Raises:
        WrongArgument: no such model, setting or engine; the message says what is allowed.
    """
    if args.plot and not args.plot.endswith(PICTURES):
        raise WrongArgument(f"--plot: a name that ends in {', '.join(PICTURES)} is allowed, got {args.plot!r}")
    file, stated = source_file(args.source)
    setup = base_setup(args, settings, stated)
    from ds_minis.layer.attention.head_groups import WrongGroups
    from ds_minis.planner.plan.compare import compare
    from ds_minis.planner.step.profile import cache_folder
    from ds_minis.planner.step.trace import CannotTrace

    config = configuration(args.model, args.trust_remote_code)
    try:
        result = compare(
            config,
            setup,
            model=args.model,
            gpu_memory=args.gpu_memory,
            tokens=args.seq,
            host_memory=args.host_memory,
            cache=None if args.no_cache else cache_folder(),
        )
    except CannotTrace as error:
        raise WrongArgument(f"{args.model}: {error}") from None
    except WrongGroups as error:
        raise WrongArgument(f"--set: {error}") from None
    if file:
        result.notes += file.assumptions(setup.gpus, args.gpus is not None)
    if args.plot:
        from ds_minis.planner.plan.picture import NoPicture, draw

        try:
            result.notes.append(f"drawn: {draw(result, args.plot)}")
        except NoPicture as error:
            raise WrongArgument(str(error)) from None
    if args.write:
        from ds_minis.planner.inputs.files import write_configuration

        written = write_configuration(result, args.write, file)
        result.notes.append(f"written: {', '.join(map(str, written)) or 'nothing, as nothing of ds_minis fits'}")
    return result


def source_file(path: str | None):
    """The configuration file that a plan begins with, read once, and what it states; None and nothing without one."""
    if not path:
        return None, {}
    from ds_minis.planner.inputs.files import ConfigurationFile

    try:
        file = ConfigurationFile.read(path)
        return file, file.fields
    except ValueError as error:
        raise WrongArgument(f"--from: {error}") from None


def base_setup(args: argparse.Namespace, settings: dict[str, Any], stated: Mapping[str, Any]):
    """The setup that arguments and what a configuration file states describe; arguments go before the file."""
    from ds_minis.planner.inputs.setup import OFFLOADING, Setup

    found = dict(stated)
    settings = {**found.pop("settings", {}), **settings}
    given = {
        "gpus": args.gpus,
        "engine": args.engine and args.engine.lower(),
        "optimizer": args.optimizer,
        "accumulation": args.accumulation,
        "batch": args.batch,
        "offload_optimizer": args.offload_optimizer or None,
        "offload_param": args.offload_param or None,
    }
    found |= {key: value for key, value in given.items() if value is not None}
    found.setdefault("engine", "zero3" if found.get("gpus", 1) > 1 else "single")
    if "gpus" not in found and found["engine"] != "single":
        shared = settings.get("sequence_parallel", 1)
        found["gpus"] = shared["size"] if isinstance(shared, dict) else shared
    for name, engines in OFFLOADING.items():
        if found["engine"] not in engines:
            if getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                raise WrongArgument(
                    f"{flag}: the engines {', '.join(engines)} have it, got {found['engine']!r} (--engine)"
                )
            found.pop(name, None)  # of a file for another engine
    train = "qlora" if args.qlora else "lora" if args.lora else "full"
    try:
        return Setup(
            **found,
            train=train,
            lora_rank=args.lora_rank,
            dtype=args.dtype,
            master_weights=args.master_weights,
            settings=settings,
        )
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        flag = "--set sequence_parallel" if name == "sequence_parallel" else f"--{name.replace('_', '-')}"
        raise WrongArgument(f"{flag}{colon}{rest}") from None


def configuration(model: str, trust_remote_code: bool) -> Any:
    """The transformers configuration; a file or folder first, then the shipped dimensions, then the hub."""
    from pathlib import Path

    from ds_minis.planner.inputs.models import shipped_config

    if not Path(model).exists():
        config = shipped_config(model)
        if config is not None:
            return config
    import transformers

    transformers.logging.set_verbosity_error()
    from ds_minis.cli.check import load_config

    return load_config(model, trust_remote_code)


def _positive(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)\s*(|g|gb|gib|mb|mib|tb|tib)", text.strip().lower())
    with contextlib.suppress(ValueError):
        value = float(match[1]) * {"m": 1 / 1024, "t": 1024}.get(match[2][:1], 1) if match else 0.0
        if 0 < value <= MOST_GB:
            return value
    raise argparse.ArgumentTypeError(
        f"a number of gigabytes above 0, at most {MOST_GB:,}, is allowed, such as 80 or 81559MiB, got {text!r}"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is allowed, got {text!r}")
    return int(text)


def _tokens(text: str) -> int:
    match = re.fullmatch(r"([0-9][0-9,_]*(?:\.[0-9]+)?)([km]?)", text.strip().lower())
    if match:
        number = float(re.sub("[,_]", "", match[1])) * {"": 1, "k": 2**10, "m": 2**20}[match[2]]
        if number >= 1 and number.is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f"a number of tokens is allowed, such as 131072, 128K or 1.5M, got {text!r}")
