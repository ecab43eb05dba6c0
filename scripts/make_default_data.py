"""Regenerate `examples/sft/default/`: chat samples, a tokenizer and a model configuration that need no network.

    python scripts/make_default_data.py --jargon /usr/share/doc/jargon-text/jargon.txt.gz

The text is the Jargon File 4.4.7 (public domain; Debian package `jargon-text`) and `pydoc_data.topics` of the Python
that runs this script (PSF licence), so the Python version decides part of the output. The rest is fixed by `--seed`:
the same inputs give the same bytes. Entries become TRL conversations, and entries that refer to one another are joined
as turns of one conversation, which is where the long samples come from.
"""

import argparse
import json
import random
import statistics
import sys
from itertools import groupby
from pathlib import Path

from default_sources import (
    Document,
    Entry,
    clean_entries,
    find_entries,
    link_key,
    parse_essays,
    read_jargon,
    read_pydoc,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "examples" / "sft" / "default"

SINGLE_SHARE = 0.3  # of the slang terms, those that get a conversation each
LONG_CHARS = (4_000, 16_000)  # the other conversations stop growing at a length drawn from this range
MAX_POSITIONS = 8192
VOCAB_SIZE = 4096
BOS, PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]

# The generation block holds what the assistant writes and the token that ends it, nothing else: TRL's
# `assistant_only_loss` takes its mask from here.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TERM_QUESTIONS = [
    'What does "{}" mean?',
    'Explain the hacker slang "{}".',
    'How do hackers use "{}"?',
    'I came across "{}" in an old newsgroup. What is it?',
    'Define "{}" as the Jargon File does.',
    'What is meant by "{}"?',
]
LINKED_QUESTIONS = [
    'You mentioned "{}". What is that?',
    'And "{}"?',
    'What about "{}", which came up above?',
    'Please explain "{}" as well.',
]
UNLINKED_QUESTIONS = [
    'Something else: what does "{}" mean?',
    'Next one: "{}".',
    'Another term I do not know is "{}".',
]
ESSAY_QUESTIONS = ['What does the Jargon File say about "{}"?', 'Tell me about "{}" in hacker culture.']
PYDOC_QUESTIONS = [
    'What does the Python documentation say about "{}"?',
    "Explain this topic of the Python language: {}.",
    'Show me the Python help text on "{}".',
]
SECTION_QUESTIONS = ['What about "{}"?', 'Go on with "{}".', 'Next, please: "{}".', 'And what does it say about "{}"?']

Conversation = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...], user and assistant in turn


def turns(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def num_chars(conversation: Conversation) -> int:
    return sum(len(message["content"]) for message in conversation)


def chat_about_documents(documents: list[Document], questions: list[str], rng: random.Random) -> list[Conversation]:
    """Make one conversation of each document, a turn a section, or several where it is long."""
    conversations = []
    for document in documents:
        conversation: Conversation = []
        limit = rng.uniform(*LONG_CHARS)
        for heading, text in document.sections:
            if conversation and num_chars(conversation) + len(text) > limit:
                conversations.append(conversation)
                conversation, limit = [], rng.uniform(*LONG_CHARS)
            if conversation:
                question = rng.choice(SECTION_QUESTIONS).format(heading)
            else:
                name = heading if heading == document.title else f"{document.title}: {heading}"
                question = rng.choice(questions).format(name)
            conversation += turns(question, text)
        conversations.append(conversation)
    return conversations


def chat_about_terms(entries: list[Entry], rng: random.Random) -> list[Conversation]:
    """Make conversations of the lexicon, the long ones first; each entry is used once.

    A long conversation follows the references of its entries, the latest first, and changes the subject when none of
    them is left.
    """
    unused = {link_key(entry.term): entry for entry in rng.sample(entries, len(entries))}
    num_single = SINGLE_SHARE * len(unused)
    conversations = []
    while unused:
        limit = rng.uniform(*LONG_CHARS) if len(unused) > num_single else 0
        conversation: Conversation = []
        mentioned: list[str] = []
        while unused and (not conversation or num_chars(conversation) < limit):
            mentioned = [key for key in mentioned if key in unused]
            key = mentioned[0] if mentioned else next(iter(unused))
            questions = LINKED_QUESTIONS if mentioned else UNLINKED_QUESTIONS if conversation else TERM_QUESTIONS
            entry = unused.pop(key)
            conversation += turns(rng.choice(questions).format(entry.term), entry.text)
            mentioned = entry.links + mentioned
        conversations.append(conversation)
    return conversations


def split_conversations(
    conversations: list[Conversation], train_bytes: int, test_bytes: int, rng: random.Random
) -> dict[str, list[str]]:
    """Deal the conversations in random order to the test split, then to the train split, until each is full."""
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    splits: dict[str, list[str]] = {"test": [], "train": []}
    room = {"test": test_bytes, "train": train_bytes}
    for line in rng.sample(lines, len(lines)):
        size = len(line.encode())
        name = next((name for name in splits if size <= room[name]), None)
        if name:
            splits[name].append(line)
            room[name] -= size
    return splits


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=TURN_END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 knows too; version 5 would write `TokenizersBackend`."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def count_tokens(tokenizer, conversations: list[Conversation]) -> list[int]:
    """Return the length of each conversation, having checked that it fits and that its loss mask covers the answers."""
    lengths = []
    for messages in conversations:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        spans = [
            tokenizer.decode([i for i, _ in run])
            for on, run in groupby(zip(ids, mask, strict=True), lambda p: p[1])
            if on
        ]
        expected = [message["content"] + TURN_END for message in messages if message["role"] == "assistant"]
        assert spans == expected, f"loss mask of the conversation that starts with {messages[0]['content']!r}"
        assert len(ids) <= MAX_POSITIONS, f"{len(ids)} tokens from {messages[0]['content']!r} on"
        lengths.append(len(ids))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jargon", type=Path, required=True, help="jargon.txt or jargon.txt.gz, version 4.4.7")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--train-bytes", type=int, default=1_150_000, help="size of train.jsonl at most")
    parser.add_argument("--test-bytes", type=int, default=75_000, help="size of test.jsonl at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:
        lines = read_jargon(args.jargon)
    except ValueError as error:
        parser.error(str(error))
    rng = random.Random(args.seed)
    found = find_entries(lines)
    known = {link_key(term) for term, _ in found}
    entries = clean_entries(found, known)
    essays = parse_essays(lines, known)
    conversations = chat_about_terms(entries, rng)
    conversations += chat_about_documents(essays, ESSAY_QUESTIONS, rng)
    conversations += chat_about_documents(read_pydoc(), PYDOC_QUESTIONS, rng)
    splits = split_conversations(conversations, args.train_bytes, args.test_bytes, rng)

    data, model = args.output / "data", args.output / "model"
    data.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        (data / f"{name}.jsonl").write_text("".join(split), encoding="utf-8", newline="\n")

    messages = {name: [json.loads(line)["messages"] for line in split] for name, split in splits.items()}
    tokenizer = train_tokenizer([message["content"] for chat in messages["train"] for message in chat])
    save_tokenizer(tokenizer, model)
    make_config(tokenizer).save_pretrained(model)

    print(f"Python {sys.version.split()[0]}; {len(entries)} slang terms; {len(conversations)} conversations")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, chats in messages.items():
        lengths = count_tokens(tokenizer, chats)
        print(
            f"{name}: {len(chats)} samples, {sum(map(len, chats)) // 2} turns, "
            f"{sum(map(num_chars, chats)):,} characters, {sum(lengths):,} tokens "
            f"(min {min(lengths)}, median {statistics.median(lengths):.0f}, max {max(lengths)})"
        )


if __name__ == "__main__":
    main()
