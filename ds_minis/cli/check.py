"""`ds-minis check MODEL`: what of a model would be tiled, and whether a tiny random instance of it is exact. No weights."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import io
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_minis.check.errors import in_short
from ds_minis.cli.show import Part, Table, show, working
from ds_minis.cli.wrong_argument import WrongArgument, settings_of_pairs
from ds_minis.config import AUTO

DESCRIPTION = """Says what would be tiled in a model at its full size, what not and why, and trains a tiny random instance
of it for one step, plain and converted, to see whether loss and gradients are the same. Loads the configuration only,
never weights. Exit status: 0 exact, 1 not exact, 2 a wrong argument, 3 the check failed (one line)."""
EXAMPLES = """examples:
  ds-minis check Qwen/Qwen3-8B
  ds-minis check ./my-model --set scope=tokens --json"""

_ALLOWED = "allowed: a hub id, a folder with a config.json or an adapter, or a configuration as a JSON file"


def add_check(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser(
        "check",
        help="is this model exact, and what is tiled?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=_ALLOWED.removeprefix("allowed: "))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a mini-sequence setting, such as scope=tokens"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that a repository brings")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    try:
        settings = settings_of_pairs(args.set)
        with working("checking: a tiny instance is trained for a step"):
            result = check(args.model, trust_remote_code=args.trust_remote_code, settings=settings)
    except WrongArgument as error:
        print(f"ds-minis check: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(as_parts(result))
    return 0 if result["exact"] else 1


def check(model: str, *, trust_remote_code: bool = False, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `ds-minis check` found, as plain JSON types.

    Args:
        settings: of mini-sequences; the tiny instance has chunks of its own where they say nothing of sizes.

    Raises:
        WrongArgument: no such configuration, or none of a language model; the message says what is allowed.
    """
    start = time.monotonic()
    import transformers

    from ds_minis.check.exactness import PlainModelFails, compare_with_plain
    from ds_minis.check.tiny import tiny_config

    transformers.logging.set_verbosity_error()
    # transformers 5.23 renamed it; PEFT uses the name that older versions know too.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    adapter, settings = load_adapter(model), dict(settings or {})
    config = load_config(adapter.base_model_name_or_path if adapter else model, trust_remote_code)
    model_class, config = model_class_for(config, trust_remote_code)
    result = {"model": model, "class": getattr(model_class, "__name__", "?"), "exact": False, "notes": []}
    if adapter:
        model_class = with_adapter(model_class, adapter)
        result |= {"adapter": str(adapter.peft_type.value), "base_model": adapter.base_model_name_or_path}
    if settings:
        result["settings"] = settings
    try:
        outcome = compare_with_plain(model_class, tiny_config(config, dropout=0.0), settings=_for_tiny(settings))
    except PlainModelFails as error:
        outcome = None
        result["notes"].append(f"a tiny random instance cannot be trained even without ds_minis: {error}")
    except Exception as error:
        outcome = None
        result["notes"].append(f"the converted tiny instance fails: {type(error).__name__}: {error}")
    report, failure = full_size_report(model_class, config, settings)
    result["structure_of"] = "the model at its full size"
    if failure:
        report = outcome and outcome.report
        result["structure_of"] = f"the tiny instance, as the full size cannot be laid out without weights ({failure})"
    if report is not None:
        result["layers"] = dict(Counter(report.layers.values()))
        result["tiled"] = dict(Counter(report.tiled.values()))
        untiled = Counter(report.untiled.values())
        result["untiled"] = [{"class": c, "reason": r, "count": n} for (c, r), n in untiled.items()]
        result["loss"] = report.loss
    if outcome is not None:
        result |= {name: getattr(outcome, name) for name in _FIGURES}
        result["notes"] += outcome.notes
    return {**result, "seconds": round(time.monotonic() - start, 1)}


_FIGURES = (
    *("exact", "loss_error", "grad_error", "grad_name"),
    *("checkpointing_error", "router_error", "logits_held"),
)


def load_adapter(folder: str) -> Any:
    """PEFT's configuration of an adapter's folder; None for anything else.

    Raises:
        WrongArgument: it cannot be read, or does not name its base.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return None
    try:
        import peft

        adapter = peft.PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise WrongArgument(f"no adapter could be read from {folder!r}: {in_short(error)}; {_ALLOWED}") from None
    if not adapter.base_model_name_or_path:
        raise WrongArgument(f"{str(path / 'adapter_config.json')!r} names no base model; check the base itself")
    adapter.inference_mode = False
    return adapter


def with_adapter(model_class: Callable[[Any], Any], adapter: Any) -> Callable[[Any], Any]:
    """Makes models with new adapters of that kind."""
    import peft

    def adapted(config):
        return peft.get_peft_model(model_class(config), copy.deepcopy(adapter))

    return adapted


def load_config(model: str, trust_remote_code: bool) -> Any:
    """The configuration that a hub id, a folder or a JSON file names."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not path.is_file():
            raise WrongArgument(f"no such file: {str(path)!r}; {_ALLOWED}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WrongArgument(f"{str(path)!r} is no JSON file: {error}; {_ALLOWED}") from None
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        known = list(CONFIG_MAPPING.keys())  # its length is that of what was registered by hand
        if kind not in known and not (trust_remote_code and "auto_map" in fields):
            near = difflib.get_close_matches(str(kind), known, n=3)
            raise WrongArgument(
                f"{str(path)!r} has the model_type {kind!r}, which transformers does not know; allowed: one of its "
                f"{len(known)} model types"
                + (f", such as {', '.join(near)}" if near else "")
                + " (a model with Python code of its own needs its repository and --trust-remote-code)"
            )
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise WrongArgument(f"no configuration could be loaded from {model!r}: {in_short(error)}; {_ALLOWED}") from None


def model_class_for(config: Any, trust_remote_code: bool) -> tuple[Callable[[Any], Any], Any]:
    """The class with an LM head for a configuration, and the part of the configuration that it takes."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):

        def remote_model(config):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

        remote_model.__name__ = config.auto_map["AutoModelForCausalLM"].rsplit(".", 1)[-1]
        return remote_model, config
    found = []
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        classes = mapping.get(type(config), ())
        found += classes if isinstance(classes, tuple | list) else [classes]
    if not found:
        raise WrongArgument(
            f"{type(config).__name__} is the configuration of no causal or image-text language model; allowed: those of "
            "transformers' MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"
        )
    named = [cls for cls in found if cls.__name__ in (config.architectures or ())]
    model_class = (named or found)[0]
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    return model_class, config


def full_size_report(model_class: Callable[[Any], Any], config: Any, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """The conversion's report of an instance on the meta device, which has shapes and no memory; or why there is none."""
    import torch

    from ds_minis.convert import NothingToTile, convert_to_mini_sequence, mini_sequence_report
    from ds_minis.layer.attention.head_groups import WrongGroups

    try:
        with torch.device("meta"):
            model = model_class(config)
        with contextlib.redirect_stdout(io.StringIO()):
            return mini_sequence_report(convert_to_mini_sequence(model, settings or None)), ""
    except NothingToTile as error:
        return None, str(error)
    except WrongGroups as error:
        raise WrongArgument(f"--set: {error}") from None
    except Exception as error:
        return None, in_short(error)


def _for_tiny(settings: dict[str, Any]) -> dict[str, Any]:
    """The tiny instance has fewer KV heads: groups of one each stand for any number of groups."""
    return {**settings, "head_groups": AUTO} if settings.get("head_groups", 1) != 1 else settings


def as_parts(result: dict[str, Any]) -> list[Part]:
    """The result for people."""
    lines: list[Part] = [f"{result['model']}: {result['class']}"]
    if "adapter" in result:
        lines[0] += f" with an adapter ({result['adapter']}; base {result['base_model']})"
    if "tiled" in result:
        lines += [_tiled(result), f"  loss: {result['loss']}"]
    if "grad_error" in result:
        lines.append(f"A tiny random instance, trained for one step, is {'exact' if result['exact'] else 'NOT exact'}:")
        lines.append(f"  loss: relative error {result['loss_error']:.1e}")
        lines.append(f"  gradients: largest relative error {result['grad_error']:.1e} ({result['grad_name']})")
        for what in ("checkpointing", "router"):
            if result[f"{what}_error"] is not None:
                name = {"checkpointing": "with gradient checkpointing", "router": "with router outputs"}[what]
                lines.append(f"  {name}: {result[f'{what}_error']:.1e}")
        lines.append(f"  full logits: {'held in memory' if result['logits_held'] else 'never held'}")
    lines += [f"note: {note}" for note in result["notes"]]
    return [*lines, f"({result['seconds']} s)"]


def _tiled(result: dict[str, Any]) -> Table:
    rows = [["tiled as a whole", count, name, ""] for name, count in result["layers"].items()]
    rows += [["tiled", count, name, ""] for name, count in result["tiled"].items()]
    rows += [["not tiled", u["count"], u["class"], u["reason"]] for u in result["untiled"]]
    title = f"What is tiled in {result['structure_of']}:"
    plain = [f"  {what}: {count} x {name}" + (f" ({why})" if why else "") for what, count, name, why in rows]
    return Table(("", "modules", "class", "reason"), [list(map(str, row)) for row in rows], [title, *plain], title)
