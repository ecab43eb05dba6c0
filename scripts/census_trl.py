"""Makes the call of TRL's trainers on every causal architecture, converted, and compares with the plain model's own logits.

python scripts/census_trl.py --jobs 2 --json found.json --write    # all; the last column of docs/supported_models.md
python scripts/census_trl.py llama gemma2                          # some, by name
python scripts/census_trl.py --sample                              # those of census.py's sample

TRL's trainers call `model(..., labels=..., fused_lm_head=True)`. Log-probabilities, entropies, the other statistics, the
loss and all gradients must be those of the logits that the plain model gives, or the call is left to TRL, with a line that
says so. Both passes of a trainer are made: with gradients, and without (a reference model). TRL's own answer is compared
too. Exits with 1 if an architecture is neither exact nor left to TRL with a line.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from census import NAMES, PAGE, choose, configuration, run_all, warm_up
from census_page import TRL_HEADS, with_more_columns
from torch import Tensor, nn

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.check.errors import in_short
from ds_minis.check.exactness import FLOOR, LIMIT, ROUNDING, SETTINGS, gives_router_outputs, nudged, text_batch
from ds_minis.check.tiny import tiny_model, without_dropout

STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEMPERATURE = 0.7
ANSWERED = "fused_lm_head"

Values = dict[str, Tensor]


def examine(architecture: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What one architecture gives, as plain JSON types."""
    try:
        model_class, config, recipe = configuration(architecture)
        plain, model, trls = (without_dropout(tiny_model(model_class, config)) for _ in range(3))
        batch = (recipe.batch or text_batch)(plain)
        options = _options(plain)
        expected = _passes(plain, batch, options, _from_logits)
    except NoLogits as reason:
        return {"class": model_class.__name__, "no_logits": str(reason)}
    except Exception as error:
        return {"plain_fails": in_short(error), "trace": traceback.format_exc()[-1500:]}
    trl = _attempt(trls, batch, options, expected, plain)
    with contextlib.redirect_stdout(io.StringIO()):
        convert_to_mini_sequence(model, {**SETTINGS, **(settings or {})})
    ours = _attempt(model, batch, options, expected, plain)
    report = mini_sequence_report(model)
    answered = ANSWERED in report.last_loss
    line = "" if answered else report.loss
    return {"class": model_class.__name__, **ours, "answered": answered, "line": line, "trl": trl}


class NoLogits(ValueError):
    """The plain model gives no logits of each token, so that the call has no meaning."""


def _options(model: nn.Module) -> dict[str, Any]:
    """Arguments that TRL's trainers give beside the batch."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    text_config = model.config.get_text_config()
    coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
    if gives_router_outputs(model) and hasattr(text_config, "output_router_logits") and coefficient:
        options["output_router_logits"] = True  # as SFTTrainer does
    return options


def _attempt(model: nn.Module, batch: dict, options: dict, expected: Values, plain: nn.Module) -> dict[str, Any]:
    """Makes the call on a model; its largest error, or why it fails."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=STATISTICS)
    try:
        got = _passes(model, batch, options, _asked)
    except Exception as error:
        return {"fails": in_short(error), "trace": traceback.format_exc()[-1500:]}
    errors = _errors(got, expected)
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    if LIMIT < errors[worst] <= 100 * LIMIT:  # may be rounding, see check/exactness.py
        moved = _errors(_passes(nudged(plain), batch, options, _from_logits), expected)
        errors = {n: error for n, error in errors.items() if not LIMIT < error <= ROUNDING * moved.get(n, 0.0)}
        worst = max(errors, key=errors.get)
    return {"error": errors[worst], "where": worst, "exact": errors[worst] <= LIMIT}


def _passes(model: nn.Module, batch: dict, options: dict, call) -> Values:
    """The values and gradients of a pass in training, and the values of one without gradients and with shifted labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels, values = batch["labels"], {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        out = call(model.train(), {**inputs, **options}, labels=labels)
        weights = torch.linspace(-1, 2, out["log_probs"].numel()).view_as(out["log_probs"])
        loss = out["loss"] + (weights * out["log_probs"]).mean() + 0.3 * out["entropy"].square().mean()
        loss.backward()
        values |= {name: value.detach() for name, value in out.items()}
        values |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            shifted = {"shift_labels": labels.roll(-1, -1), "num_items_in_batch": torch.tensor(50)}
            out = call(model.eval(), {**inputs, **options}, **shifted)
    return values | {f"{name} without gradients": value for name, value in out.items()}


def _asked(model: nn.Module, inputs: dict, **labels: Any) -> Values:
    output = model(**inputs, **labels, fused_lm_head=True)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _from_logits(
    model: nn.Module,
    inputs: dict,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch=None,
) -> Values:
    """What TRL's call is to give, from all logits of the plain model."""
    output = model(**inputs, return_dict=True)
    logits, shape = output.get("logits"), (labels if shift_labels is None else shift_labels).shape
    if logits is None or logits.shape[:-1] != shape:
        raise NoLogits(f"labels {tuple(shape)}, logits {None if logits is None else tuple(logits.shape)}")
    logits, target = (logits[:, :-1], labels[:, 1:]) if shift_labels is None else (logits, shift_labels)
    mask, z = target != -100, logits.float() / TEMPERATURE
    log_p = z.log_softmax(-1)
    p, finite = log_p.exp(), log_p.clamp(min=torch.finfo(log_p.dtype).min / 4)
    found = {
        "log_probs": log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0],
        "entropy": -(p * finite).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logits": z.mean(-1),
        "is_top1": logits.argmax(-1) == target,
    }
    found = {name: value.masked_fill(~mask, 0) for name, value in found.items()}
    found["loss"] = -found["log_probs"].sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
    found["label_mask"] = mask
    aux_loss = output.get("aux_loss")
    if inputs.get("output_router_logits") and aux_loss is not None:
        found["aux_loss"] = aux_loss
        coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)  # as TRL has it
        found["loss"] = found["loss"] + coefficient * aux_loss
    return found


def _errors(got: Values, expected: Values) -> dict[str, float]:
    """The largest error of each value, relative to its largest; of gradients as in check/exactness.py."""
    largest = max(v.abs().max().item() for name, v in expected.items() if name.startswith("gradient") and v.numel())
    errors = {}
    for name in {**expected, **got}:
        if not name.startswith("gradient") and (name not in got or name not in expected):
            errors[f"{name}, which is {'missing' if name in expected else 'one too many'}"] = float("inf")
            continue
        a, b = got.get(name), expected.get(name)
        a, b = (torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)
        if a.shape != b.shape:
            errors[f"the shape of {name}"] = float("inf")
        elif b.numel():
            floor = FLOOR * largest if name.startswith("gradient") else 1e-6
            errors[name] = float((a.float() - b.float()).abs().max()) / max(float(b.float().abs().max()), floor, 1e-30)
    return errors


def verdict(result: Mapping[str, Any]) -> str:
    """In words; the first is the kind: exact, left, none or wrong."""
    if "plain_fails" in result:
        return f"none: does not run in plain transformers: {result['plain_fails']}"
    if "no_logits" in result:
        return f"none: the model gives no logits of each token: {result['no_logits']}"
    if "crash" in result:
        return f"wrong: FAILS: {result['crash']}"
    if result["answered"] and "fails" not in result:
        return (
            f"exact: {result['error']:.0e}" if result["exact"] else f"wrong: {result['where']} by {result['error']:.1e}"
        )
    if result["line"] and ("fails" not in result or "fails" in result["trl"]):
        return f"left to TRL: {result['line']}"
    return f"wrong: {result.get('fails') or 'left to TRL without a line'}"


def of_trl(result: Mapping[str, Any]) -> str:
    """TRL's own answer, in words."""
    own = result.get("trl")
    if own is None:
        return ""
    if "fails" in own:
        return f"fails: {own['fails']}"
    exact = own["error"] <= 10 * LIMIT  # where it is not far off, it is not called wrong
    return f"exact: {own['error']:.0e}" if exact else f"wrong: {own['where']} by {own['error']:.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, such as llama (default: all)")
    parser.add_argument("--sample", action="store_true", help="those of the sample of census.py")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one architecture (default: 180)")
    parser.add_argument("--json", type=Path, help="keeps the results there, and skips those that it has")
    parser.add_argument(
        "--write", action="store_true", help=f"write {TRL_HEADS.name} and the column of {PAGE.name} (of all)"
    )
    args = parser.parse_args(argv)
    known = [f"causal:{name}" for name in NAMES["causal"]]
    chosen = choose(parser, known, args.names, args.sample, whole=args.write)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("ds_minis").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warm_up()
    import trl.trainer.utils  # noqa: F401  once, and not in each child

    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else {}
    missing = [name for name in chosen if name not in results]
    results |= run_all(missing, args.jobs, args.timeout, ask=examine, say=verdict)
    results = {name: results[name] for name in chosen}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    said = {name: {"ds_minis": verdict(result), "TRL": of_trl(result)} for name, result in results.items()}
    if args.write:
        TRL_HEADS.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_more_columns(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(summary(said))
    return int(any(answer["ds_minis"].startswith("wrong") for answer in said.values()))


def summary(said: Mapping[str, Mapping[str, str]]) -> str:
    """The counts, and what is wrong."""

    def count(who: str, kind: str) -> int:
        return sum(answer[who].startswith(kind) for answer in said.values())

    runs = len(said) - count("ds_minis", "none")
    lines = [
        f"{count('ds_minis', 'exact')} of {runs} that run are exact, {count('ds_minis', 'left')} are left to TRL with a "
        f"line, {count('ds_minis', 'wrong')} are wrong ({len(said)} in all). TRL's own: {count('TRL', 'exact')} exact, "
        f"{count('TRL', 'wrong')} wrong, {count('TRL', 'fails')} fail"
    ]
    lines += [f"{name}: {a['ds_minis']}" for name, a in said.items() if a["ds_minis"].startswith(("wrong", "left"))]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
