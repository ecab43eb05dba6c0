"""What the needle's tests share: a real tokenizer, a haystack of its own, a tiny model with as many words."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ds_minis.context.needle.model import make_needle_maker
from ds_minis.context.needle.task import NeedleTask

TOKENIZER = Path(__file__).parents[2] / "examples" / "sft" / "default" / "model"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def maker(longest: int = 400, **task):
    return make_needle_maker(NeedleTask(**task), tokenizer(), longest=longest)


def model(seed: int = 0):
    """At random, with weights so large that what it says differs from place to place."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=4096, max_position_embeddings=512, initializer_range=0.5, **SIZES)
    return AutoModelForCausalLM.from_config(config).eval()
