"""`ds-minis needle MODEL`: needle in a haystack, over lengths and depths. `ds-minis needle-plot`: pictures of its results."""

from __future__ import annotations

import argparse
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ds_minis.cli.wrong_argument import PICTURES
from ds_minis.context.needle.task import PROMPTS, VARIANTS, NeedleTask, WrongTask
from ds_minis.environment import local_rank, world_size

DESCRIPTION = """Hides a number in a text and asks the model for it, at each length and depth: teacher-forced, without a
cache, the LM head run at the answer's tokens alone, which is right exactly where greedy decoding writes the answer. Started
by torchrun, the processes share each sequence. Writes JSON after each cell, and goes on with it when it is run again. Exit
status: 0 done, 2 a wrong argument, 3 it failed."""

PLOT_DESCRIPTION = """Draws results of `ds-minis needle`: one file gives a heat-map, several give panels side by side; with a
name that ends in .gif, an animation of which each file (or each comma-separated group of files: panels) is a frame."""


def add_needle(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser("needle", help="does this model find a needle in a haystack?", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=run)
    return parser


def add_needle_plot(commands) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `ds-minis`."""
    parser = commands.add_parser("needle-plot", help="pictures of needle results", description=PLOT_DESCRIPTION)
    parser.add_argument(
        "results", nargs="+", help="results files; for a .gif, comma-separated ones are panels of a frame"
    )
    parser.add_argument("--output", type=Path, required=True, help="a .png, .jpg, .pdf, .svg or .gif")
    parser.add_argument("--titles", nargs="*", default=[], metavar="TITLE", help="of the panels")
    parser.add_argument("--frame-titles", nargs="*", default=[], metavar="TITLE", help="of a .gif's frames")
    parser.add_argument("--title", default="", help="above all panels")
    parser.set_defaults(run=run_plot)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ds-minis needle`. Those of nanotron's and EasyContext's scripts are accepted, with - and with _."""

    def add(*names: str, **options: Any) -> None:
        also = [name.replace("-", "_").replace("__", "--", 1) for name in names if "-" in name[2:]]
        parser.add_argument(*names, *also, **options)

    parser.add_argument("model", nargs="?", help="a hub id, or the folder of a model or of an adapter")
    add("--ckpt-path", "--model", dest="model_flag", metavar="MODEL", help="the same, as nanotron's script has it")
    add("--lengths", type=_numbers(int), metavar="N,N,...", help="tokens of the tests, instead of the next three")
    add("--min-context-length", type=int, default=4000, help="(default: 4000) tokens, prompt and answer included")
    add("--max-context-length", type=int, default=64000, help="(default: 64000)")
    add("--context-interval", type=int, default=4000, help="(default: 4000)")
    add("--depths", type=_numbers(float), metavar="D,D,...", help="0 (begin) to 1 (end), instead of the next one")
    add("--depth-interval", type=Decimal, default=Decimal("0.2"), help="(default: 0.2: depths 0, 0.2, ... 1)")
    add("--num-samples", type=int, default=2, help="(default: 2) tests in each cell")
    add("--rnd-number-digits", type=int, default=7, help="(default: 7)")
    add("--variant", choices=VARIANTS, default="niah_single", help="; ".join(f"{k}: {v}" for k, v in VARIANTS.items()))
    add(
        "--prompts",
        choices=PROMPTS,
        default="nanotron",
        help="the wording (default: nanotron, which is EasyContext's too)",
    )
    add("--num-distractors", "--num-distractor", type=int, help="needles with other keys")
    add("--num-values", type=int, help="values of the key, for niah_multivalue")
    add("--num-cities-retrieval", type=int, default=1, help="(default: 1) keys that are asked for at once")
    add("--haystack", "--haystack-dir", type=Path, nargs="+", default=[], help="text files, or folders of .txt files")
    add("--seed", type=int, default=0, help="of numbers and places (default: 0)")
    add("--batch-size", type=int, default=1, help="(default: 1) tests in a forward pass")
    add("--rope-theta", type=float, help="RoPE's base, if not the configuration's")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights")
    add("--attn-implementation", help="attention function, as in from_pretrained")
    add("--sequence-parallel", "--sp", type=int, help="processes that share a sequence (default: all)")
    add("--output", type=Path, help="results file (default: needle_MODEL_VARIANT.json)")
    add("--overwrite", action="store_true", help="forget what is in the results file")
    add("--plot", type=Path, help="heat-map (default: beside the results, as .png, where matplotlib is installed)")


def run(args: argparse.Namespace) -> int:
    from ds_minis.context.needle.run import OtherRun

    try:
        cells, task = cells_of(args), task_of(args)
        model = model_of(args)
        check_numbers(args)
        check_files(args)
        return _run(args, model, cells, task)
    except (WrongTask, OtherRun) as error:
        print(f"ds-minis needle: {error}", file=sys.stderr)
        return 2


def model_of(args: argparse.Namespace) -> str:
    """The model that was named, in one of the two ways."""
    if bool(args.model) == bool(args.model_flag):
        raise WrongTask(
            "a model is needed: a hub id, a folder, or an adapter's folder (MODEL or --ckpt-path, not both)"
        )
    return args.model or args.model_flag


def cells_of(args: argparse.Namespace) -> list[tuple[int, float]]:
    """Lengths and depths, the short lengths first.

    Raises:
        WrongTask: there are none, or a depth is not from 0 to 1.
    """
    lengths = args.lengths
    if lengths is None:
        if args.context_interval < 1 or args.min_context_length > args.max_context_length:
            raise WrongTask(
                f"--min-context-length {args.min_context_length} to --max-context-length {args.max_context_length} in "
                f"steps of {args.context_interval} are no lengths"
            )
        lengths = list(range(args.min_context_length, args.max_context_length + 1, args.context_interval))
    depths = args.depths
    if depths is None:
        step = args.depth_interval
        if not 0 < step <= 1:
            raise WrongTask(f"--depth-interval: more than 0 and at most 1 is allowed, got {step}")
        # In decimals, and the end as it is, even if no whole number of steps leads there.
        depths = [float(i * step) for i in range(int(1 / step) + 1) if i * step < 1] + [1.0]
    for flag, numbers in (("--lengths", lengths), ("--depths", depths)):
        if not numbers:
            raise WrongTask(f"{flag}: one number or more is needed")
    wrong = [d for d in depths if not 0 <= d <= 1] + [n for n in lengths if n < 1]
    if wrong:
        raise WrongTask(f"--depths: 0 to 1, and --lengths: 1 or more are allowed, got {wrong[0]}")
    return [(length, depth) for length in sorted(set(lengths)) for depth in sorted(set(depths))]


def check_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that no run can have, before a model is loaded.

    Raises:
        WrongTask: with the flag and what is allowed.
    """
    for flag, value in (("--batch-size", args.batch_size), ("--sequence-parallel", args.sequence_parallel)):
        if value is not None and value < 1:
            raise WrongTask(f"{flag}: 1 or more is allowed, got {value}")
    if args.rope_theta is not None and not 1 < args.rope_theta < float("inf"):
        raise WrongTask(f"--rope-theta: more than 1 is allowed, got {args.rope_theta}")


def check_files(args: argparse.Namespace) -> None:
    """Refuses places where no results or picture can be written, before a model is loaded.

    Raises:
        WrongTask: with the flag and what is allowed.
    """
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None and (path.is_dir() or any(parent.is_file() for parent in path.parents)):
            raise WrongTask(f"{flag}: a file in a folder is allowed, got {path}")
    if args.plot is not None and args.plot.suffix.lower() not in PICTURES:
        raise WrongTask(f"--plot: a name that ends in {', '.join(PICTURES)} is allowed, got {args.plot}")


def task_of(args: argparse.Namespace) -> NeedleTask:
    names = ("variant", "prompts", "num_samples", "num_distractors", "num_values", "num_cities_retrieval", "seed")
    return NeedleTask(**{name: getattr(args, name) for name in names}, rnd_number_digits=args.rnd_number_digits)


def _run(args: argparse.Namespace, name: str, cells: list[tuple[int, float]], task: NeedleTask) -> int:
    import torch
    import transformers

    from ds_minis.context.needle import model as needle_model
    from ds_minis.context.needle import run as needle_run

    transformers.logging.disable_progress_bar()
    device = _start_processes()
    size = args.sequence_parallel or world_size() or 1
    ranks = needle_run.Ranks.current(size)
    size = ranks.size
    longest = max(length for length, _ in cells)
    try:
        model, tokenizer = needle_model.load(
            name, length=longest, rope_theta=args.rope_theta, dtype=args.dtype, attention=args.attn_implementation,
            device=device, sequence_parallel=size,
        )  # fmt: skip
    except OSError as error:
        raise WrongTask(f"{name!r}: no model could be loaded: {str(error).splitlines()[0]}") from None
    maker = needle_model.make_needle_maker(task, tokenizer, args.haystack, longest)
    about = needle_model.describe(model, name, args.haystack)
    about["weights"] = needle_run.fingerprint(name)
    output = args.output or Path(f"needle_{Path(name).name}_{task.variant}.json")
    if args.overwrite and ranks.is_main:
        output.unlink(missing_ok=True)
    if ranks.is_main:
        _tell(
            f"{name}: {len(cells)} cells, {task.num_samples} tests each, up to {longest:,} tokens; results in {output}"
        )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions and longest > positions:
            _tell(f"the model's configuration has {positions:,} positions: longer tests go beyond them")
    results = needle_run.run_needle(
        model, maker, cells, about=about, output=output, ranks=ranks, batch_size=args.batch_size,
        decode=tokenizer.decode, progress=_progress,
    )  # fmt: skip
    if ranks.is_main:
        _finish(results, output, args.plot)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


def _start_processes() -> Any:
    """Joins the processes that a launcher started; the device of this one."""
    import torch

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if (world_size() or 1) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    return device


def _progress(cell: dict[str, Any], number: int, total: int) -> None:
    bar = "#" * (20 * number // total)
    _tell(
        f"[{bar:<20}] {number}/{total}  {cell['length']:,} tokens, depth {100 * cell['depth']:.4g}%: "
        f"{cell['right']} of {cell['total']} right ({cell['seconds']} s)"
    )


def _tell(line: str) -> None:
    print(line, flush=True)


def _finish(results: dict[str, Any], output: Path, plot: Path | None) -> None:
    from ds_minis.context.needle.plot import accuracy_in_words, plot_heat_map

    whole = sum(cell["right"] == cell["total"] for cell in results["cells"])
    _tell(f"{accuracy_in_words(results)}; all right in {whole} of {len(results['cells'])} cells")
    try:
        _tell(f"heat-map: {plot_heat_map(results, plot or output.with_suffix('.png'))}")
    except ModuleNotFoundError as error:
        if plot:
            raise
        _tell(f"no heat-map: {error}")


def run_plot(args: argparse.Namespace) -> int:
    from ds_minis.context.needle import plot as needle_plot
    from ds_minis.context.needle.run import OtherRun, read

    try:
        if args.output.suffix.lower() not in (*PICTURES, ".gif") or args.output.is_dir():
            names = ", ".join((*PICTURES, ".gif"))
            raise WrongTask(f"--output: a file whose name ends in {names} is allowed, got {args.output}")
        groups = [[read(Path(name)) for name in group.split(",")] for group in args.results]
        if args.output.suffix.lower() == ".gif":
            needle_plot.plot_animation(groups, args.output, args.titles, args.frame_titles)
        else:
            panels = [results for group in groups for results in group]
            if args.titles and len(args.titles) != len(panels):
                raise WrongTask(f"--titles: {len(panels)} titles are needed, got {len(args.titles)}")
            needle_plot.plot_panels(panels, args.output, args.titles, args.title)
    except (OtherRun, WrongTask, FileNotFoundError) as error:
        print(f"ds-minis needle-plot: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


def _numbers(kind):
    """Reads "4000,8000" or "0,0.5,1"."""

    def read(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",") if part.strip()]
        except (ValueError, InvalidOperation):
            raise argparse.ArgumentTypeError(f"numbers with commas between them are allowed, got {text!r}") from None

    return read
