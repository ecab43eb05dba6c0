"""Trains every architecture of transformers for one step on a tiny random model, plain and converted, and compares.

python scripts/census.py --jobs 2 --json census.json --write    # all; writes docs/supported_models.md
python scripts/census.py --sample                               # 26 that cover every cause of trouble
python scripts/census.py llama image-text:gemma3                # some, by name
python scripts/census.py --settings '{"head_groups": "auto", "offload": "cpu"}'

Each runs in a process of its own. Exits with 1 if anything that runs is not exact.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import selectors
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from census_page import write_page
from census_recipes import RECIPES, Recipe
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from ds_minis import ConversionReport
from ds_minis.check.exactness import PlainModelFails, compare_with_plain
from ds_minis.check.tiny import tiny_config

Examine = Callable[[str, Mapping[str, Any] | None], dict[str, Any]]
PAGE = Path(__file__).parent.parent / "docs" / "supported_models.md"
MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
NAMES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
SAMPLE = [
    "causal:qwen3",  # what most models are like
    "causal:gemma2",  # soft caps, norms behind the feed-forward module
    "causal:cohere",  # a scale on the logits, tied weights
    "causal:bamba",  # z-loss beside the cross entropy; state-space layers
    "causal:bert",  # a transform before the head, with a bias
    "causal:prophetnet",  # an unshifted loss of its own
    "causal:musicgen",  # several heads
    "causal:opt",  # fc1 and fc2 in the layer itself, dropout between them
    "causal:bloom",  # a residual as a second argument, dropout inside
    "causal:mpt",
    "causal:xmod",  # ids per sample
    "causal:rwkv",  # a feed-forward module that shifts tokens
    "causal:recurrent_gemma",  # a module that keeps state
    "causal:falcon_mamba",
    "causal:qwen3_next",  # linear attention
    "causal:jamba",
    "causal:doge",  # routing that mixes tokens
    "causal:gpt_oss",  # a feed-forward module that gives a tuple
    "causal:llama4_text",
    "causal:zaya",
    "causal:mixtral",  # auxiliary loss
    "causal:deepseek_v4",  # input_ids as a second argument
    "causal:gemma4_text",  # experts beside the feed-forward module
    "image-text:evolla",  # an adapter that looks token-wise on text
    "image-text:qwen2_5_vl",
    "encoder-decoder:nllb-moe",  # experts with a capacity
]


def all_architectures() -> list[str]:
    return [f"{kind}:{name}" for kind, names in NAMES.items() for name in names]


def choose(
    parser: argparse.ArgumentParser, known: list[str], names: list[str], sample: bool = False, whole: bool = False
) -> list[str]:
    """The known architectures that a command line asks for: by name, with or without a kind, or by kind; or the sample.

    Args:
        whole: whether all of them are needed, for a page.
    """
    by_name = [a for a in known if {a, *a.split(":", 1)} & set(names)]
    chosen = [a for a in SAMPLE if a in known] if sample else by_name if names else known
    if not chosen:
        parser.error(f"no architecture is called {' or '.join(names)}; allowed: such as {', '.join(known[:3])}")
    if whole and chosen != known:
        parser.error("--write needs the results of all architectures: leave names and --sample out")
    return chosen


def configuration(architecture: str) -> tuple[type, Any, Recipe]:
    """Class and tiny configuration of an architecture, and how its inputs are made."""
    kind, name = architecture.split(":", 1)
    recipe = RECIPES.get(architecture) or RECIPES.get(name) or Recipe()
    config = CONFIG_MAPPING[name](**copy.deepcopy(recipe.fields))
    model_class = MAPPINGS[kind][type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    if kind == "causal" and not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    recipe.before(config)
    config = tiny_config(config, dropout=0.0)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    recipe.after(config)
    return model_class, config, recipe


def examine(architecture: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What one architecture gives, as plain JSON types."""
    try:
        model_class, config, recipe = configuration(architecture)
    except Exception as error:
        return {"plain_fails": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()[-1500:]}
    try:
        result = compare_with_plain(model_class, config, make_batch=recipe.batch, settings=settings)
    except PlainModelFails as error:
        trace = "".join(traceback.format_exception(error.__cause__ or error))[-3000:]
        return {"class": model_class.__name__, "plain_fails": str(error), "trace": trace}
    report = result.report
    return {
        "class": model_class.__name__,
        "exact": result.exact,
        "loss_error": result.loss_error,
        "grad_error": result.grad_error,
        "grad_name": result.grad_name,
        "checkpointing_error": result.checkpointing_error,
        "router_error": result.router_error,
        "logits_held": result.logits_held,
        "layers": dict(Counter(report.layers.values())) if report else {},
        "layers_left": [[*what, n] for what, n in Counter(_layers_left(report)).items()] if report else [],
        "tiled": dict(Counter(report.tiled.values())) if report else {},
        "untiled": [[*what, count] for what, count in Counter(_parts(report)).items()] if report else [],
        "loss": report.loss if report else "",
        "idle": dict(Counter({**report.layers, **report.tiled}[name] for name in result.idle)) if report else {},
        "notes": list(result.notes),
    }


def _parts(report: ConversionReport) -> Iterator[tuple[str, str, str]]:
    """Class, reason and name in its layer of what was left alone."""
    for fqn, (class_name, reason) in report.untiled.items():
        yield class_name, reason, next(part for part in reversed(fqn.split(".")) if not part.isdigit())


def _layers_left(report: ConversionReport) -> Iterator[tuple[str, str]]:
    """Class and reason of decoder layers that are not tiled as a whole."""
    for fqn, what in report.untiled.items():
        if re.search(r"(^|[._])(layers?|blocks?|h)\.\d+$", fqn) and "encodes images" not in what[1]:
            yield what


def warm_up() -> None:
    """Has what every architecture needs imported here once, and not in each child."""
    examine("causal:llama")


def run_all(
    architectures: list[str],
    jobs: int,
    timeout: int,
    verbose: bool = True,
    settings: Mapping[str, Any] | None = None,
    ask: Examine | None = None,
    say: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """`ask` (by default `examine`) for each, `jobs` at a time; prints what `say` (`verdict`) makes of each result.

    Each runs in a forked child: one that crashes or hangs takes no other with it.
    """
    ask, say = ask or examine, say or verdict
    results: dict[str, dict] = {}
    waiting, selector = list(architectures), selectors.DefaultSelector()
    while waiting or selector.get_map():
        while waiting and len(selector.get_map()) < jobs:
            name = waiting.pop(0)
            pipe, pid = _fork(name, timeout, settings, ask)
            selector.register(pipe, selectors.EVENT_READ, (name, pid, time.monotonic(), bytearray()))
        for key, _ in selector.select():
            name, pid, start, data = key.data
            if part := os.read(key.fd, 65536):
                data += part
                continue
            selector.unregister(key.fd)
            os.close(key.fd)
            _, status = os.waitpid(pid, 0)
            result = json.loads(bytes(data)) if data else {"crash": _how_it_ended(status, timeout)}
            results[name] = {**result, "seconds": round(time.monotonic() - start, 1)}
            if verbose:
                print(name, say(results[name]), f"{results[name]['seconds']}s", flush=True)
    return {name: results[name] for name in architectures}


def verdict(result: dict[str, Any]) -> str:
    if "plain_fails" in result:
        return f"does not run in plain transformers: {result['plain_fails']}"
    if "crash" in result:
        return f"FAILS: {result['crash']}"
    figures = (
        f"{result['grad_error']:.1e}, checkpointing {result['checkpointing_error']}, routers {result['router_error']}"
    )
    held = ", FULL LOGITS" if result["logits_held"] else ""
    return ("exact: " if result["exact"] else f"NOT EXACT ({result['grad_name']}): ") + figures + held


def failed(result: dict[str, Any]) -> bool:
    return "plain_fails" not in result and not result.get("exact", False)


def _fork(architecture: str, timeout: int, settings: Mapping[str, Any] | None, ask: Examine) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return read, pid
    os.close(read)
    signal.alarm(timeout)
    try:
        result = ask(architecture, settings)
    except BaseException as error:
        result = {"crash": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-3000:]}
    with os.fdopen(write, "w") as stream:
        json.dump(result, stream)
    os._exit(0)


def _how_it_ended(status: int, timeout: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (
        f"no result after {timeout} seconds" if number == signal.SIGALRM else f"the process ended with status {status}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, such as llama or image-text:gemma3 (default: all)")
    parser.add_argument("--sample", action="store_true", help=f"only a fixed sample of {len(SAMPLE)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one architecture (default: 180)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--settings", type=json.loads, help="settings of the conversion, as JSON, beside small chunks")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} from the results (of all)")
    args = parser.parse_args(argv)
    chosen = choose(parser, all_architectures(), args.names, args.sample, whole=args.write)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    warm_up()
    results = run_all(chosen, args.jobs, args.timeout, settings=args.settings)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.write:
        write_page(PAGE, results)
    wrong = [name for name, result in results.items() if failed(result)]
    runs = sum("plain_fails" not in result for result in results.values())
    print(f"{runs - len(wrong)} of {runs} that run are exact ({len(results)} in all), {time.monotonic() - start:.0f} s")
    for name in wrong:
        print(f"not exact: {name}: {verdict(results[name])}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
