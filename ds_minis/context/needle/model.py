"""Whether a model answers: teacher-forced, without a cache, its LM head run at the answer's positions alone.

A model answers a test if the most likely token at each position of the answer, given the right tokens before it, is the
answer's next one. Greedy decoding then writes the answer, and otherwise it does not: its first wrong token is the first that
is wrong here. So one forward pass decides, and no cache is held (137 GB of keys and values at 1M tokens of Llama-3-8B).

Shapes: B tests, S tokens, A tokens of the longest answer, V words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_minis.context.needle.task import NeedleMaker, NeedleTask, NeedleTest, WrongTask
from ds_minis.context.rope import change_rope, exact_rope, rope_theta_of
from ds_minis.convert import NothingToTile, convert_to_mini_sequence
from ds_minis.loss.forward.forward_hooks import attached_chunking
from ds_minis.parallel.model.rows import only_rows

HAYSTACK = Path(__file__).parent / "data" / "haystack.txt"


@dataclass(frozen=True)
class Outcome:
    """What a model wrote in the place of an answer."""

    is_right: bool
    predicted_ids: list[int]


@torch.no_grad()
def predict(model: nn.Module, tests: Sequence[NeedleTest], *, divided: bool = False) -> list[Outcome]:
    """Runs tests of one length through a model.

    Args:
        divided: the model has `sequence_parallel`, and its ranks are all given these tests.

    Raises:
        ValueError: tests of several lengths.
    """
    if len({test.length for test in tests}) != 1:
        raise ValueError(f"tests of one length are allowed, got {sorted({test.length for test in tests})}")
    # The last token of an answer is never read.
    ids = torch.tensor([(test.prompt_ids + test.answer_ids)[:-1] for test in tests], device=_device(model))
    longest = max(len(test.answer_ids) for test in tests)
    rows = torch.arange(ids.shape[1] - longest, ids.shape[1], device=ids.device)
    # A pass without gradients runs whole on each rank, as generation must. No weight wants one here: nothing is kept.
    parallel = attached_chunking(model).parallel if divided else None
    few = rows_of_head(model, rows) if parallel is None else only_rows(parallel, rows)
    with _frozen(model), torch.set_grad_enabled(divided), few:
        logits_BAV = model(input_ids=ids, use_cache=False).logits
    predicted = logits_BAV.argmax(-1).tolist()
    outcomes = []
    for test, row in zip(tests, predicted, strict=True):
        written = row[longest - len(test.answer_ids) :]
        outcomes.append(Outcome(written == test.answer_ids, written))
    return outcomes


@contextlib.contextmanager
def rows_of_head(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Context in which the model's LM head is given these places of the sequence only, and the logits are theirs."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head: a causal language model is allowed")

    def select(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, rows.to(args[0].device)], *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Context in which no weight wants a gradient and the model is in evaluation."""
    trained, training = [param for param in model.parameters() if param.requires_grad], model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


def make_needle_maker(task: NeedleTask, tokenizer: Any, texts: Sequence[Path] = (), longest: int = 0) -> NeedleMaker:
    """Reads the haystack and encodes it.

    Args:
        texts: files, and folders of `.txt` files, in order; the shipped text if there are none.
        longest: tokens that will be asked for: no more of the text is encoded than about that.

    Raises:
        WrongTask: no text in them.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    text = read_haystack(texts or [HAYSTACK])
    if longest:  # 20 characters a token, in any language; without them a large corpus would take minutes
        text = text[: max(20 * longest, 10_000)]
    haystack = _without_length_warning(tokenizer, text)
    if not haystack:
        raise WrongTask("haystack: its text has no tokens")
    is_end = {token: tokenizer.decode([token]).rstrip().endswith((".", "!", "?", "。")) for token in set(haystack)}
    ends = [i + 1 for i, token in enumerate(haystack) if is_end[token]]
    word = encode("a")
    whole = tokenizer.encode("a", add_special_tokens=True)
    begin = next((i for i in range(len(whole)) if whole[i : i + len(word)] == word), 0)
    return NeedleMaker(task, encode, whole[:begin], haystack, ends)


def read_haystack(texts: Sequence[Path]) -> str:
    """The text of files, and of the `.txt` files in folders, in order of their names."""
    files = []
    for path in map(Path, texts):
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise WrongTask(f"haystack: {path}: a text file, or a folder with .txt files, is allowed")
        files += found
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise WrongTask(f"haystack: {', '.join(map(str, files))}: no text in UTF-8 ({error.reason})") from None
    if not text.strip():
        raise WrongTask(f"haystack: {', '.join(map(str, files))}: there is no text in it")
    return text


def _without_length_warning(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text that is longer than the tokenizer says a model takes."""
    before, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    finally:
        tokenizer.model_max_length = before


def load(
    name: str,
    *,
    length: int,
    rope_theta: float | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    device: torch.device | None = None,
    sequence_parallel: Any = 1,
) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, ready for `length` tokens: RoPE in float64, mini-sequences on.

    Args:
        name: a hub id, a folder, or a folder with an adapter.
        rope_theta: RoPE's base, if not the one in the configuration.
        sequence_parallel: see `MiniSequenceConfig`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = _adapter_of(name)
    base = adapter.base_model_name_or_path if adapter else name
    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, **options
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(name if _has_tokenizer(name) or not adapter else base)
    prepare(model, length=length, rope_theta=rope_theta, sequence_parallel=sequence_parallel)
    return model.to(device).eval(), tokenizer


def prepare(model: nn.Module, *, length: int, rope_theta: float | None = None, sequence_parallel: Any = 1) -> nn.Module:
    """Sets RoPE up and turns mini-sequences on, in place.

    Raises:
        ValueError: a base was given and the model has no RoPE that could have it, or its sequences cannot be divided.
    """
    if rope_theta is not None:
        change_rope(model, theta=rope_theta, length=length)
    else:
        with contextlib.suppress(ValueError):  # no RoPE, or one of another kind: as it is
            exact_rope(model)
    settings = {"tile_inference": True, "sequence_parallel": sequence_parallel}
    with contextlib.suppress(*() if sequence_parallel != 1 else (NothingToTile,)):
        convert_to_mini_sequence(model, settings)
    return model


def describe(model: nn.Module, name: str, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """What the results of a model are of, for their file."""
    try:
        theta = rope_theta_of(model.config)
    except ValueError:
        theta = None
    return {
        "model": name,
        "rope_theta": theta,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "haystack": [str(path) for path in texts] or ["ds_minis: the Jargon File"],
    }


def _adapter_of(name: str) -> Any:
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    import peft

    adapter = peft.PeftConfig.from_pretrained(name)
    if not adapter.base_model_name_or_path:
        raise WrongTask(f"{name}: its adapter_config.json names no base model (base_model_name_or_path)")
    return adapter


def _has_tokenizer(name: str) -> bool:
    return (Path(name) / "tokenizer_config.json").is_file()
