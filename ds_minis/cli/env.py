"""`ds-minis env`: versions, devices, engines and what is known to go wrong with them; what one pastes into an issue."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from typing import Any

from ds_minis import __version__
from ds_minis.cli.show import Part, Table, show

EXAMPLES = """examples:
  ds-minis env               # paste this into an issue
  ds-minis env --json

exit status: 0 nothing known is wrong, 1 a problem is listed, with its fix"""
PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "bitsandbytes", "flash-attn"),
    *("kernels", "liger-kernel", "triton", "numpy", "rich", "matplotlib"),
)
_DEEPSPEED_TIMEOUT = 10  # minutes, its default; the HF Trainer's is 30


def add_env(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser(
        "env",
        help="versions, devices, and known problems with their fix",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(list(as_parts(found)))
    return 1 if found["problems"] else 0


def as_parts(found: dict[str, Any]) -> Iterator[Part]:
    """What was found, for people."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield Table(
                (), list(value.items()), [f"{name}:", *(f"  {key:16} {text}" for key, text in value.items())], name
            )
        elif not isinstance(value, list):
            yield f"{name}: {value}"
    yield from (f"hint: {hint}" for hint in found["hints"])
    yield from (f"problem: {problem}" for problem in found["problems"])
    if not found["problems"]:
        yield "problems: none that is known"


def environment() -> dict[str, Any]:
    """All that is printed, as plain JSON types."""
    from ds_minis.environment import autoload_enabled, torch_autoload_enabled

    versions = {name: version(name) or "not installed" for name in PACKAGES}
    attached = any(entry.name == "ds_minis" for entry in importlib.metadata.entry_points(group="torch.backends"))
    on = autoload_enabled() and torch_autoload_enabled()
    state = (
        "on"
        if attached and on
        else "not installed, only on the path"
        if not attached
        else "off by an environment variable"
    )
    return {
        "ds_minis": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "packages": versions,
        "devices": devices(),
        "engines": engines(),
        "attaches itself": state,
        "hints": list(hints()),
        "problems": list(problems()),
    }


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def devices() -> dict[str, str]:
    """Each device with its memory; the host's."""
    try:
        import torch
    except Exception as error:
        return {"torch": f"cannot be imported ({type(error).__name__}: {error})"}
    found = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if not found:
        found["cuda"] = (
            f"none (torch {'was built for CUDA ' + torch.version.cuda if torch.version.cuda else 'is a CPU build'})"
        )
    from ds_minis.memory.host_memory import available_host_bytes

    available = available_host_bytes()
    found["host memory"] = "unknown" if available is None else f"{available / 2**30:.1f} GiB available"
    return found


def engines() -> dict[str, str]:
    """What can be run: DDP and FSDP2 are torch's."""
    found = {"ddp, fsdp2": "with torch" if version("torch") else "need torch"}
    found["zero0 to zero3"] = (
        "with DeepSpeed" if version("deepspeed") else 'not there: pip install "ds_minis[deepspeed]"'
    )
    if version("deepspeed"):
        found["ds_report"] = "lists the op mini_sequence, which is Python: nothing is compiled"
    found["lora"] = "with PEFT" if version("peft") else "not there: pip install peft"
    return found


def problems() -> Iterator[str]:
    """Combinations that are known to go wrong, each with its fix."""
    from ds_minis.versions import older_than_tested, too_old

    for line in too_old():
        yield f"too old: {line}; pip install --upgrade {line.partition(' ')[0]}"
    for line in older_than_tested():
        yield f"older than what CI tests: {line}; see docs/versions.md"
    yield from kernels_problem()
    if version("flash-attn") and not version("torch"):
        yield "flash-attn is installed without torch: pip install torch"


def hints() -> Iterator[str]:
    """What is right, and yet surprises."""
    from ds_minis.environment import deepspeed_timeout

    if version("deepspeed") and not deepspeed_timeout():
        yield (
            f"DeepSpeed's process groups give up after {_DEEPSPEED_TIMEOUT} minutes, the Trainer's after 30: a step of a "
            "very long sequence, or a slow first rank, ends the job; set DEEPSPEED_TIMEOUT=60"
        )


def kernels_problem(installed: str | None = None) -> Iterator[str]:
    """transformers loads kernels of the hub with a few versions of the `kernels` package only, and warns of any other."""
    installed = version("kernels") if installed is None else installed
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("transformers") or ()
        wanted = [r for r in map(Requirement, lines) if r.name == "kernels" and r.marker and "kernels" in str(r.marker)]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return
    if installed and wanted and not wanted[0].specifier.contains(installed, prereleases=True):
        window = str(wanted[0].specifier)
        yield f'kernels {installed} is outside of what transformers uses ({window}): pip install "kernels{window}"'
