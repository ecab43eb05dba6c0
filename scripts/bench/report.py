"""Makes benchmarks/README.md and the plots beside it from the JSON files in benchmarks/; nothing in it is typed by hand.

python scripts/bench/report.py            # rewrites the page, and the plots where matplotlib is installed
python scripts/bench/report.py --check    # fails where the page is not what the files give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plots import draw, pictures

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks"
KIB, MIB, GIB = 2**10, 2**20, 2**30
HEADER = """\
# Benchmarks

<!-- made by scripts/bench/report.py from the JSON files beside it -->
"""
Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _unavailable(reasons: dict[str, str], word: str) -> Iterator[str]:
    if reasons:
        yield "\n".join(f"- `{name}` {word}: {reason}" for name, reason in reasons.items()) + "\n"


def transient_memory(content: dict[str, Any]) -> Iterator[str]:
    arguments, models = content["arguments"], content["results"]
    yield (
        f"W, the transient working set of a step beyond parameters, gradients and per-layer checkpoints, in KiB per token at "
        f"{arguments['seq']:,} tokens, {arguments['layers']} layers, bfloat16.\n"
    )
    titles = {key: entry["title"] for model in models.values() for key, entry in model["variants"].items()}
    kept = {key: title for key, title in titles.items() if not _offloads(models, key)}
    rows = []
    for key, title in kept.items():
        entries = [model["variants"].get(key) for model in models.values()]
        rows.append([title, *["-" if e is None else _growing(e) for e in entries]])
    yield table(["", *models], rows)
    flops = [[title, *[_times(m["variants"].get(key)) for m in models.values()]] for key, title in titles.items()]
    yield (
        f"Matrix products of the decoder's step, of plain checkpointing's, and in brackets with the attention's at "
        f"{arguments['flops_seq']:,} tokens; counted on real steps with all widths divided by 16:\n"
    )
    yield table(["", *models], flops)
    offloaded = [
        [title, *[_device_and_host(model["variants"].get(key)) for model in models.values()]]
        for key, title in titles.items()
        if key not in kept
    ]
    if offloaded:
        yield (
            "With offloaded checkpoints: KiB per token on the device, checkpoints included, and on the host for each layer:\n"
        )
        yield table(["", *models], offloaded)
    yield (
        f"LM head and loss at a vocabulary of {arguments['loss_vocab']:,}: KiB per token above the hidden states and, in "
        "brackets, bytes per token and element of the hidden size without buffers as large as the head's weight:\n"
    )
    losses = {key: entry["title"] for model in models.values() for key, entry in model["loss"].items()}
    rows = []
    for key, title in losses.items():
        entries = [model["loss"].get(key) for model in models.values()]
        cells = [
            "-" if e is None else f"{e['bytes_per_token'] / KIB:.1f} ({e['per_hidden_element']:.2f})" for e in entries
        ]
        rows.append([title, *cells])
    yield table(["", *models], rows)
    yield from _unavailable({k: v for model in models.values() for k, v in model["unavailable"].items()}, "was not run")


def _offloads(models: dict, key: str) -> bool:
    return any(model["variants"].get(key, {}).get("host_bytes") for model in models.values())


def _growing(entry: dict[str, Any]) -> str:
    growth = entry.get("W_growth_per_layer", 0)
    return f"{entry['W_KiB_per_token']:.1f}" + (f" (+{growth:.1f} for each further layer)" if growth >= 0.05 else "")


def _times(entry: dict[str, Any] | None) -> str:
    if entry is None or "matmul_flops_of_plain" not in entry:
        return "-"
    return f"{entry['matmul_flops_of_plain']:.3f}x ({entry['all_flops_of_plain']:.3f}x)"


def _device_and_host(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['W_KiB_per_token']:.1f}, {entry.get('host_KiB_per_token_and_layer', float('nan')):.1f}"


def step_time(content: dict[str, Any]) -> Iterator[str]:
    for result in content["results"]:
        loss = "the model's own loss" if result["loss"] == "model" else "the decoder alone"
        yield f"{result['tokens']:,} tokens, {loss}:\n"
        rows = []
        for entry in result["variants"].values():
            low, high = entry["ratio_quartiles"]
            peak = entry.get("first_step_peak_bytes")
            row = [entry["title"], f"{entry['seconds']:.3f} s", f"{entry['ratio']:.3f}x", f"{low:.3f}-{high:.3f}"]
            rows.append([*row, str(entry["rounds"]), "-" if peak is None else f"{peak / GIB:.1f} GiB"])
        yield table(["", "median", "of plain, same round", "quartiles", "rounds", "peak"], rows)
        yield from _unavailable(result["refused"], "was not timed")
        yield from _unavailable(result["unavailable"], "was not run")


def max_context(content: dict[str, Any]) -> Iterator[str]:
    arguments, word = content["arguments"], "simulated" if content["simulated"] else "measured"
    yield f"The longest sequence, {word}: {arguments['shape']}, one GPU.\n"
    if content["simulated"]:
        yield (
            f"Simulated: bytes of tensors without values against {arguments['card_gib']} GiB less {arguments['reserve_gib']} "
            "GiB for the CUDA context, libraries and fragments. No step was run.\n"
        )
    rows, reasons = [], {}
    for entry in content["results"]:
        if "unavailable" in entry:
            reasons[f"{entry['variant']}"] = entry["unavailable"]
            continue
        host = f"{entry['host_bytes'] / GIB:.0f} GiB" if entry.get("host_bytes") else "-"
        notes = [entry["ended"]] if entry["ended"] else []
        if entry.get("most_optimizer_steps", 1) > 1:
            notes.append(f"optimizer runs {entry['most_optimizer_steps']} times a step: not the same training")
        seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else "-"
        rows.append([entry["setting"], entry["title"], f"{entry['tokens']:,}", host, seconds, "; ".join(notes)])
    yield table(["", "", f"tokens ({word})", "host memory", "step", ""], rows)
    yield from _unavailable(reasons, "was not run")


def loss_head(content: dict[str, Any]) -> Iterator[str]:
    sizes = content["arguments"]
    yield (
        f"LM head and cross entropy, forward and backward: {sizes['tokens']:,} tokens, hidden size {sizes['hidden_size']:,}, "
        f"vocabulary {sizes['vocab_size']:,}, {sizes['dtype']}. Bytes above hidden states, weight and labels, both gradients "
        "included; errors are relative, against float64.\n"
    )
    results = content["results"]
    plain, rows = results["plain"].get("seconds"), []
    for name, entry in results.items():
        if "seconds" in entry:
            times = "-" if plain is None else f"{entry['seconds'] / plain:.2f}x"
            errors = [entry[key] for key in ("loss_error", "hidden_grad_error", "weight_grad_error")]
            errors = ["-" if error is None else f"{error:.1e}" for error in errors]
            rows.append(
                [name, f"{entry['seconds'] * 1e3:.1f} ms", times, f"{entry['peak_bytes'] / MIB:.0f} MiB", *errors]
            )
    head = ["", "median", "of plain", "peak", "error of the loss", "of the hidden states' gradient", "of the weight's"]
    yield table(head, rows)
    reasons = {name: entry.get("skipped") or entry.get("failed") for name, entry in results.items()}
    yield from _unavailable({name: reason for name, reason in reasons.items() if reason}, "was not run")


def sequence_parallel(content: dict[str, Any]) -> Iterator[str]:
    arguments, results = content["arguments"], content["results"]
    yield (
        f"One sequence of {arguments['tokens']:,} tokens on 1, 2 and 4 gloo processes, float32, chunks of "
        f"{arguments['chunk']:,} tokens. Live bytes of the busiest rank, above weights and their gradients, and what a rank "
        "receives for a layer in a step.\n"
    )
    rows = [
        [
            row["mode"],
            str(row["ranks"]),
            str(row["layers"]),
            f"{row['peak'] / MIB:.1f} MiB",
            f"{row['of_one']:.2f}",
            f"{row['received'] / MIB:.1f} MiB",
        ]
        for row in results["counted"]
    ]
    yield table(["mode", "ranks", "layers", "live bytes", "of one process", "received"], rows)
    yield "By the formulas that these counts agree with, bfloat16, 16,384 tokens on each rank, a whole step:\n"
    simulated = [
        [row["model"], str(row["ranks"]), row["mode"], f"{row['received'] / GIB:.0f} GiB"]
        for row in results["by_formula"]
    ]
    yield table(["model", "ranks", "mode", "received"], simulated)


def sequence_parallel_planned(content: dict[str, Any]) -> Iterator[str]:
    yield (
        "By the planner (docs/planner.md): full fine-tuning in bfloat16 with AdamW under ZeRO-3, "
        f"{content['arguments']['tokens']:,} tokens on each rank. Transient: layer inputs, and what the computation needs "
        'beside weights, gradients, optimizer states and engine buffers. "whole": a rank that has the whole sequence.\n'
    )
    rows = [
        [
            row["model"],
            f"{content['arguments']['tokens'] * row['ranks']:,}",
            str(row["ranks"]),
            row["mode"] or "whole",
            f"{row['transient'] / GIB:.1f} GiB",
            f"{sum(row['parts'].values()) / GIB:.1f} GiB",
        ]
        for row in content["results"]
    ]
    yield table(["model", "tokens", "ranks", "mode", "transient", "in all"], rows)


def right_gradients(content: dict[str, Any]) -> Iterator[str]:
    yield (
        "Loss of the HF Trainer's step with one sequence on two processes, and its gradient by the weights, over "
        "those of the same step in one process: 1 is right. Tiny models, SGD, float32.\n"
    )
    rows = []
    for row in content["results"]:
        failed = row.get("fails")
        found = [failed, "-"] if failed else [f"{row['loss']:.5f}", f"{row['gradient']:.5f}"]
        rows.append([row["case"], row["way"], row["stage"], *found])
    yield table(["", "by", "engine", "loss / true", "gradient / true"], rows)


def kept_by_length(content: dict[str, Any]) -> Iterator[str]:
    arguments, rows = content["arguments"], content["results"]["rows"]
    names = list(rows[0]["peak_bytes"])
    yield (
        f"A step of a Llama of {arguments['layers']} layers of {arguments['hidden']}, {arguments['train']}, float32, on a "
        f"card of {arguments['card_mib']} MiB beside the parameters (counted). CPU seconds, and MiB at the peak:\n"
    )
    lines = []
    for row in rows:
        cells = [
            f"{row['seconds'][name]:.3f} s, {row['peak_bytes'][name] / MIB:.0f} MiB"
            if name in row["seconds"]
            else f"out of memory ({row['peak_bytes'][name] / MIB:.0f} MiB)"
            for name in names
        ]
        lines.append([f"{row['tokens']:,}", *cells, row["kept"]])
    yield table(["tokens", *names, "kept by ds_minis"], lines)
    yield "![Time of a step against its length](../docs/images/kept_by_length.png)\n"


def mixed_lengths(content: dict[str, Any]) -> Iterator[str]:
    arguments, results = content["arguments"], content["results"]
    lengths = sorted(results["lengths"])
    yield (
        f"{len(lengths)} steps of {lengths[0]:,} to {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}: a Llama "
        f'of {arguments["layers"]} layers of {arguments["hidden"]}, float32. ds_minis: `keep: "input"`, and '
        "`memory_budget`s. Products counted, CPU seconds beside checkpointing's in the same round.\n"
    )
    rows = [
        [
            row["train"],
            row["variant"],
            f"{row['products']:.3f}x",
            f"{row['seconds']:.2f} s",
            f"{row['ratio']:.3f}x",
            row["kept, median"] or "-",
            row["kept, longest"] or "-",
        ]
        for row in results["rows"]
    ]
    yield table(["", "", "products", "median", "of checkpointing", "kept, median length", "kept, longest"], rows)


TITLES: dict[str, tuple[str, Callable[[dict], Iterator[str]]]] = {
    "transient_memory": ("Transient memory", transient_memory),
    "step_time": ("Time of a step", step_time),
    "max_context": ("Longest sequence", max_context),
    "loss_head": ("LM head and loss", loss_head),
    "right_gradients": ("Who is right", right_gradients),
    "sequence_parallel": ("Sequence parallelism", sequence_parallel),
    "sequence_parallel_planned": ("Sequence parallelism at the size of real models", sequence_parallel_planned),
    "kept_by_length": ("Free memory kept, by length", kept_by_length),
    "mixed_lengths": ("A mix of lengths", mixed_lengths),
}


def origin(name: str, content: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    place = f"{content['device']}; {versions}; {content['date']}, commit {content['commit']}"
    return f"`{content['command']}`: {place}; [{name}]({name}).\n"


def page(files: dict[str, dict[str, Any]]) -> str:
    """The page for the content of JSON files, by name. Files of other benchmarks are listed, not shown."""
    parts, others, drawn = [HEADER], [], pictures(files)
    for kind, (title, sections) in TITLES.items():
        for name in sorted(files):
            content = files[name]
            if content.get("benchmark") == kind:
                parts.append(
                    f"## {title}{', simulated' if content['simulated'] else ''}: {name.removesuffix('.json')}\n"
                )
                if name.removesuffix(".json") in drawn:
                    picture = drawn[name.removesuffix(".json")]
                    parts.append(f"![{' '.join(picture.title.split())}]({name.removesuffix('.json')}.png)\n")
                parts += sections(content)
                parts.append(origin(name, content))
    others = [name for name in sorted(files) if files[name].get("benchmark") not in TITLES]
    if others:
        parts.append("Other results: " + ", ".join(f"[{name}]({name})" for name in others) + "\n")
    return "\n".join(parts)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    files, target = read(args.folder), args.folder / "README.md"
    text = page(files)
    if args.check:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            sys.exit(f"{target} is not what the JSON files give; run python scripts/bench/report.py")
        return
    target.write_text(text, encoding="utf-8")
    print(f"written: {target}")
    try:
        for path in draw(files, args.folder):
            print(f"written: {path}")
    except ImportError as error:
        print(f"no plots: {error}; `pip install matplotlib` for them", file=sys.stderr)


if __name__ == "__main__":
    main()
