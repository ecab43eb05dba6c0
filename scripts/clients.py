"""Trains with other people's programs, as they are, with and without mini-sequences, and writes docs/clients.md.

    python scripts/clients.py                                    # all of them: installs several GB, takes half an hour
    python scripts/clients.py --only "trl sft" "LLaMA-Factory sft"
    python scripts/clients.py --page                             # writes the page again from docs/clients.json

Each gets an environment from the package index, on top of the packages of the Python that runs this (its torch is used),
trains a tiny model for three steps with and without `DS_MINIS_CONFIG` (or the section in accelerate's YAML), and must log
the same losses and save the same weights. Those that cannot be installed or run are rows that say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from client_recipes import CLIENTS, STEPS, Client, NoSource
from environments import ROOT, CannotInstall, make, version

OBSERVER = Path(__file__).parent / "client_observer"
RESULTS, PAGE = ROOT / "docs" / "clients.json", ROOT / "docs" / "clients.md"
CHUNKS = {"chunk_size": 16, "loss_chunk_size": 16}
LOSSES, WEIGHTS = 1e-5, 1e-4  # largest relative difference allowed; of weights, of the largest change of any
NAMES = ("torch", "transformers", "accelerate", "peft", "trl")


class CannotRun(Exception):
    """A client could not be run, or there was nothing to compare, in one line."""


@dataclass(frozen=True)
class Run:
    """What one training left behind."""

    losses: list[float]
    weights: dict
    report: str


# --- Trainings ------------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """A Llama of two layers with random weights, and the example's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    default = ROOT / "examples" / "sft" / "default" / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(default / name, folder)


def train(client: Client, environment: Path, folder: Path, out: Path, settings: dict | None, timeout: float) -> Run:
    """Three steps; `settings` are those of mini-sequences, None for none.

    Raises:
        CannotRun: the program failed, or left no losses or weights.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    yaml = {"compute_environment": "LOCAL_MACHINE"} | client.yaml
    if client.launch_yaml and settings is not None:
        yaml["mini_sequence"] = settings
    (out / "accelerate.yaml").write_text(json.dumps(yaml))
    places = {"BIN": str(environment / "bin"), "OUT": str(out), "YAML": str(out / "accelerate.yaml")}
    command = [
        next((word.replace(key, place, 1) for key, place in places.items() if _begins(word, key)), word)
        for word in client.prepare(folder)
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DS_MINIS", "ACCELERATE_", "RANK", "PYTHONPATH"))}
    env |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CLIENT_CPU_ENGINES": str(ROOT / "examples" / "sft" / "cpu.py") if client.ran else "",
    }
    env |= {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(OBSERVER)}
    env |= {
        "CLIENT_REPORT": str(out / "report.txt"),
        "HF_HOME": str(folder / "hub"),
        "WANDB_MODE": "disabled",
    } | client.env
    if settings is not None and not client.launch_yaml:
        env["DS_MINIS_CONFIG"] = json.dumps(settings)
    with (out / "log.txt").open("w") as log:
        try:
            done = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise CannotRun(f"did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in (out / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line and not line.startswith(" ")]
        raise CannotRun(f"ended with {done.returncode}: {(told or lines or ['nothing was printed'])[-1][:300]}")
    if client.ran and f"CLIENT ENGINE {client.ran}" not in (out / "log.txt").read_text(errors="replace"):
        raise CannotRun(f"did not run in {client.ran} processes")
    return _result(out)


def _begins(word: str, key: str) -> bool:
    return word == key or word.startswith(f"{key}/") or word.endswith(f"={key}")


def _result(out: Path) -> Run:
    from safetensors.torch import load_file

    states = sorted(out.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    saved = [p for name in ("adapter_model", "model") for p in sorted(out.glob(f"**/{name}.safetensors"))]
    if not states or not saved:
        raise CannotRun("left no trainer_state.json or no weights")
    log = json.loads(states[-1].read_text())["log_history"]
    report = out / "report.txt"
    text = report.read_text() if report.exists() else ""
    return Run([entry["loss"] for entry in log if "loss" in entry], load_file(saved[0]), text)


def compared(client: Client, on: Run, off: Run, start: dict) -> dict:
    """How far the two trainings are apart.

    Raises:
        CannotRun: there is nothing to compare: no losses, or nothing was converted, or nothing was trained.
    """
    if len(on.losses) != STEPS or len(off.losses) != STEPS:
        raise CannotRun(f"logged {len(on.losses)} and {len(off.losses)} losses in {STEPS} steps")
    if "tiled" not in on.report or "tiled" in off.report:
        raise CannotRun("converted nothing with mini-sequences on, or something with them off")
    if on.weights.keys() != off.weights.keys():
        raise CannotRun("saved other weights with mini-sequences than without")
    losses = max(abs(a - b) / abs(b) for a, b in zip(on.losses, off.losses, strict=True))
    steps = [(off.weights[name].float() - start[name].float()).abs().max() for name in off.weights if name in start]
    steps += [value.float().abs().max() for name, value in off.weights.items() if "lora_B" in name]  # they start at 0
    largest = max(map(float, steps), default=0.0)
    if largest == 0:
        raise CannotRun("trained nothing")
    apart = max(float((on.weights[name].float() - off.weights[name].float()).abs().max()) for name in off.weights)
    exact = losses <= LOSSES and apart / largest <= WEIGHTS
    return {"losses": off.losses, "loss_difference": losses, "weight_difference": apart / largest, "exact": exact}


def trained_report(text: str) -> list[str]:
    """The lines below the head of the report of the model that was trained; others (a reference model) have no last step."""
    reports = [part.splitlines()[1:] for part in ("\n" + text).split("\nds_minis (") if part]
    return next((r for r in reversed(reports) if any("the last step" in line for line in r)), reports[-1])


def tried(client: Client, environments: Path, folder: Path, timeout: float) -> dict:
    """The row of a client."""
    row = {"name": client.name, "package": client.package, "engine": client.engine, "without": list(client.without)}
    row["stubs"] = list(client.stubs)
    row["set"] = "`mini_sequence:` in accelerate's YAML" if client.launch_yaml else "`DS_MINIS_CONFIG`"
    row |= {"date": datetime.date.today().isoformat(), "machine": f"CPU, {platform.machine()}, {os.cpu_count()} cores"}
    try:
        if client.why_not:
            raise CannotRun(client.why_not)
        from safetensors.torch import load_file

        place = environments / client.package.replace("==", "-")
        python = make(place, client.package, client.pins, client.without, client.stubs)
        row["versions"] = {name: version(python, name) for name in NAMES}
        out = folder / client.name.replace(" ", "-").replace(",", "")
        off = train(client, place, folder, out / "off", None, timeout)
        on = train(client, place, folder, out / "on", CHUNKS, timeout)
        row |= compared(client, on, off, load_file(folder / "model" / "model.safetensors"))
        row["report"] = trained_report(on.report)
    except (CannotInstall, CannotRun, NoSource) as error:
        row["not_run"] = str(error)
    return row


# --- The page -------------------------------------------------------------------------------------------------------------

HEAD = f"""\
# Other people's programs

<!-- made by scripts/clients.py from docs/clients.json -->

Each was installed from the package index (a single script: as its repository has it, at the commit in
`scripts/client_recipes.py`) and started as its own documentation says, on a tiny Llama in float32, for {STEPS}
steps, with and without mini-sequences. Nothing of it was changed: the column "set" is all that was added
(`{json.dumps(CHUNKS)}`). Losses: the largest relative difference of a logged loss. Weights: the largest difference
after the last step, relative to the largest change that training made. On a CPU, `examples/sft/cpu.py` has accelerate run
FSDP and DeepSpeed, with and without. `python scripts/clients.py` makes this page.
"""


def page(rows: list[dict]) -> str:
    lines = [HEAD, "| program | versions | set | ran in | losses | weights | loss | run on |", "|" + "---|" * 8]
    for row in rows:
        own = row["package"].replace("==", " ")
        found = [f"{name} {version}" for name, version in row.get("versions", {}).items() if version]
        versions = ", ".join([own, *[words for words in found if words != own]])
        if "not_run" in row:
            cells = [row["name"], versions, "-", "-", f"not run: {row['not_run']}".replace("|", "/"), "-", "-", "-"]
        else:
            word = "" if row["exact"] else "**differs:** "
            loss = next((line.split("loss: ")[1] for line in row["report"] if "  loss: " in line), "")
            loss = "not tiled, see below" if loss.startswith("not tiled") else loss.partition(",")[0]
            differences = [f"{word}{row['loss_difference']:.0e}", f"{row['weight_difference']:.0e}"]
            place = f"{row['date']}, {row['machine']}"
            cells = [row["name"], versions, row["set"], row["engine"], *differences, loss, place]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for package, row in {row["package"]: row for row in rows if row["without"] and "not_run" not in row}.items():
        stubs = f"; an empty module stands for {', '.join(row['stubs'])}, which it imports" if row["stubs"] else ""
        lines.append(f"{package} was installed without its dependencies {', '.join(row['without'])}{stubs}.\n")
    lines += ["## What was tiled\n", "As `mini_sequence_report` says it at the end of each program.\n"]
    for row in rows:
        if "report" in row:
            lines += [f"{row['name']}:\n", "```", *(line[2:] for line in row["report"]), "```\n"]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", default=names, metavar="CLIENT", help=f"of: {'; '.join(names)}")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "ds_minis_clients")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one training")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    unknown = set(args.only) - set(names)
    if unknown:
        parser.error(f"no such client: {', '.join(sorted(unknown))}; allowed: {'; '.join(names)}")
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if not args.page:
        folder = args.environments.resolve() / "work"
        shutil.rmtree(folder / "model", ignore_errors=True)
        make_model(folder / "model")
        for client in (client for client in CLIENTS if client.name in args.only):
            row = rows[client.name] = tried(client, args.environments.resolve(), folder, args.timeout)
            result = (
                row.get("not_run") or f"losses {row['loss_difference']:.1e}, weights {row['weight_difference']:.1e}"
            )
            print(f"{client.name}: {result}", flush=True)
            ordered = [rows[name] for name in names if name in rows]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page([rows[name] for name in names if name in rows]), encoding="utf-8")
    if any(not row.get("exact", True) for row in rows.values()):
        sys.exit("some trained something else with mini-sequences; see docs/clients.md")


if __name__ == "__main__":
    main()
