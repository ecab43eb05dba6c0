"""Trains every architecture of transformers for one step with its sequences on two processes, and compares with one.

python scripts/census_parallel.py --jobs 1 --json found.json --write    # all; the last column of docs/supported_models.md
python scripts/census_parallel.py llama gemma2                          # some, by name

As `census.py`, with `"sequence_parallel": {"size": 2, "mode": "gather"}`: loss and gradients are those of the plain model
in one process, or the model is refused, with the reason. Exits with 1 if anything that runs is neither.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from census import PAGE, all_architectures, choose, configuration, warm_up
from census_page import SEQUENCE_PARALLEL, with_more_columns

from ds_minis import convert_to_mini_sequence
from ds_minis.check.exactness import FLOOR, LIMIT, SETTINGS, text_batch
from ds_minis.check.tiny import tiny_model, without_dropout
from ds_minis.parallel.attention.masks import Refused

RANKS = 2


def examine(architecture: str) -> dict[str, Any]:
    """What one architecture gives on this rank: the largest error, or why it is refused or does not run plain."""
    try:
        model_class, config, recipe = configuration(architecture)
        for part in (config, config.get_text_config()):
            part.output_router_logits = False
        plain, model = (without_dropout(tiny_model(model_class, config)) for _ in range(2))
        batch = (recipe.batch or text_batch)(plain)
        expected = plain(**batch).loss
        expected.backward()
    except Exception as error:
        return {"plain_fails": f"{type(error).__name__}: {error}"[:200]}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_mini_sequence(model, SETTINGS | {"sequence_parallel": {"size": RANKS, "mode": "gather"}})
        loss = model(**batch).loss
        loss.backward()
    except (Refused, ValueError) as error:
        return {"refused": " ".join(str(error).split())}
    errors = {"loss": ((loss - expected).abs() / expected.abs().clamp(min=1e-6)).item()}
    largest = max((p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None), default=1.0)
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad = torch.zeros_like(other) if param.grad is None else param.grad.contiguous()
        dist.all_reduce(grad)
        true = torch.zeros_like(other) if other.grad is None else other.grad
        scale = max(true.abs().max().item(), FLOOR * largest)
        errors[name] = ((grad / RANKS - true).abs().max() / scale).item()
    worst = max(errors, key=errors.get)
    return {"error": errors[worst], "where": worst, "exact": errors[worst] <= LIMIT}


def run(architecture: str, timeout: int) -> dict[str, Any]:
    """`examine` in two forked processes; what the first says, unless the second says another thing."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                signal.alarm(timeout)
                try:
                    store = dist.FileStore(str(folder / "store"), RANKS)
                    wait = timedelta(seconds=timeout)
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=wait)
                    result = examine(architecture)
                except BaseException as error:
                    result = {
                        "crash": f"{type(error).__name__}: {error}"[:300],
                        "trace": traceback.format_exc()[-2000:],
                    }
                (folder / f"{rank}.json").write_text(json.dumps(result))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        files = [folder / f"{rank}.json" for rank in range(RANKS)]
        results = [json.loads(f.read_text()) if f.exists() else {"crash": "no result"} for f in files]
    for result in results:
        if "refused" in result:
            return result  # by one rank alone, which ends the other
    kinds = [next(iter(result)) for result in results]
    return results[0] if kinds[0] == kinds[1] else {"crash": f"the ranks differ: {results}"}


def verdict(result: dict[str, Any]) -> str:
    if "plain_fails" in result:
        return f"does not run in plain transformers: {result['plain_fails']}"
    if "refused" in result:
        return f"refused: {result['refused']}"
    if "crash" in result:
        return f"FAILS: {result['crash']}"
    return (
        f"exact: {result['error']:.0e}" if result["exact"] else f"NOT EXACT ({result['where']}): {result['error']:.0e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, such as llama or image-text:gemma3 (default: all)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one architecture (default: 120)")
    parser.add_argument("--json", type=Path, help="keeps the results there, and skips those that it has")
    parser.add_argument(
        "--write", action="store_true", help=f"write the column of {PAGE.name} (with all architectures)"
    )
    args = parser.parse_args()
    known = all_architectures()
    chosen = choose(parser, known, args.names)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    warm_up()
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for architecture in chosen:
        if architecture in results:
            continue
        start = time.monotonic()
        results[architecture] = run(architecture, args.timeout)
        print(architecture, verdict(results[architecture]), f"{time.monotonic() - start:.1f}s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.write:
        if set(results) != set(known):
            parser.error("--write needs the results of all architectures: leave names out")
        SEQUENCE_PARALLEL.write_text(json.dumps({a: verdict(r) for a, r in results.items()}, indent=1) + "\n")
        PAGE.write_text(with_more_columns(PAGE.read_text()))
    wrong = [a for a, r in results.items() if not {"plain_fails", "refused"} & r.keys() and not r.get("exact")]
    exact = sum(bool(r.get("exact")) for r in results.values())
    refused = sum("refused" in r for r in results.values())
    print(f"{exact} exact, {refused} refused, {len(wrong)} neither ({len(results)} in all)")
    for architecture in wrong:
        print(f"neither: {architecture}: {verdict(results[architecture])}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
