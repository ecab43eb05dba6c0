"""A tiny language: its text, its tokenizer of words, a model of 0.1 M parameters, and sequences that repeat themselves.

What a long-context experiment needs at its smallest, so that it runs on two CPU cores in minutes. The prompts are those of
`ds-minis needle`; a word is a token, and a number is one for each two digits.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_minis.context.needle.task import CITIES, PROMPTS

# Phrases of the question are one token each, so that all of a test fits into 64.
PHRASES = (
    "The special magic",
    "</book>.\n Based on the content of the book, Question: What is the special magic",
    "number? Answer:",
    "number is:",
)
WORDS = """
a above after again against all along and another around at away back before behind below between big bird boat boy
bread bridge by came cloud cold corn day door down early evening far farm field fire fish flat for garden girl gold
green grey ground hand heavy high hill home horse house in into journey kind lake late light little long loud low man
market meadow milk moon morning mother mountain never night noon north now of off old on once open or out over path
people quiet rain red river road roof room round sand sea seed ship shore silver sky slow small snow song south star
stone summer sun table the then there through tree under until up valley village walk wall warm water west when white
wind window winter with wood work year young
"""
FULL_STOP = "."


def write_text(path: Path, num_words: int, seed: int) -> Path:
    """Writes sentences of 4 to 12 words, drawn at random."""
    draw, words, text, written = random.Random(seed), WORDS.split(), [], 0
    while written < num_words:
        sentence = draw.choices(words, k=draw.randint(4, 12))
        written += len(sentence) + 1
        text.append(" ".join(sentence) + FULL_STOP)
    path.write_text(" ".join(text) + "\n", encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, phrases of the question and pairs of digits."""
    prompts = PROMPTS["nanotron"]
    known = [*PHRASES, *CITIES, *(f"{n:02d}" for n in range(100)), FULL_STOP, *WORDS.split()]
    pattern = "|".join([*map(re.escape, PHRASES), r"\d\d", r"</?\w+>", r"\w+", r"[^\w\s]"])
    known += re.findall(pattern, prompts.prefix)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<s>", "<unk>", *known]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<s>")


def make_model(vocab_size: int, length: int, theta: float, seed: int) -> LlamaForCausalLM:
    """Llama with two layers, at random."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=length, bos_token_id=0, eos_token_id=0,
            pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )  # fmt: skip


def repeating_batch(
    batch: int, length: int, vocab_size: int, numbers: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, `(batch, length)`: random tokens, half of them `numbers`, again and again.

    What can be learned is to look back and copy. It is what a model needs to find a needle, and is learned so in
    seconds, where needles alone take minutes.
    """
    period = int(torch.randint(8, 33, (), generator=generator))
    once = torch.randint(1, vocab_size, (batch, period), generator=generator)
    drawn = numbers[torch.randint(len(numbers), (batch, period), generator=generator)]
    once = torch.where(torch.rand(batch, period, generator=generator) < 0.5, drawn, once)
    ids = once.repeat(1, length // period + 1)[:, :length].contiguous()
    ids[:, 0] = 0
    labels = ids.clone()
    labels[:, : period + 1] = -100
    return ids, labels
