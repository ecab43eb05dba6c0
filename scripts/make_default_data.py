"""Regenerate `examples/sft/default/`: chat samples, a tokenizer and a model configuration that need no network.

    python scripts/make_default_data.py --jargon /usr/share/doc/jargon-text/jargon.txt.gz

The text is the Jargon File 4.4.7 (public domain; Debian package `jargon-text`) and `pydoc_data.topics` of the Python
that runs this script (PSF licence), so the Python version decides part of the output. The rest is fixed by `--seed`:
the same inputs give the same bytes. Entries become TRL conversations, and entries that refer to one another are joined
as turns of one conversation, which is where the long samples come from.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "examples" / "sft" / "default"

JARGON_WIDTH, PYDOC_WIDTH = 76, 70  # columns at which the sources wrap their paragraphs
SINGLE_SHARE = 0.3  # of the slang terms, those that get a conversation each
LONG_CHARS = (4_000, 16_000)  # the other conversations stop growing at a length drawn from this range
MAX_ANSWER_CHARS = 25_000  # a longer answer would not fit MAX_POSITIONS tokens
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

# An entry in which one of these occurs is dropped. Harmless entries go too, which costs nothing: there is more text
# than needed. `*` stands for any letters, `-` for a hyphen or a space.
UNWANTED_WORDS = """
aboriginal* abortion* acid addict african* alcohol* anal anti-idiotarian* arous* arse* aryan* ass assassin* asshole*
badass* barf* bastard* bigot* bitch* bloody bofh bollix* bondage booze* bowel* bullschildt clit* cocaine* condom* crap
crapp* cretin* *crippl* crude damn damned dick dickless digitus douche* drug* drunk* dumbass* erotic* ethnic* excret*
fag fart* fascis* female* feminis* foad fornicat* four-letter fsck* fubar *fuck* gang-bang *gasm gay* gender* genital*
girlie* gonad* hallucin* hell heroin hippie* hitler* homosexual* hooker* hot-chat intercourse islam* jewish jews
jihad* judaism junkie* kamikaze killing-of lesbian* lewd* lsd male males marijuana masochis* masturbat* mexican*
mongol* *moron* mutilat* naked nazi* nipple* nude obscen* orgy oriental* palestin* penguin-pee penis* perverts piss*
playboy porn* profan* psychedelic* pubic* puke* rape* raping rasterbation redneck* retard* rtfaq rtfb rtfm rtfs
rubber-hose sacrific* scatolog* scientolog* screw* scrotum seduc* *sex sexa* *sexis* *sexual* sexy *shit* slave*
smartass snafu strippers *suck* suicid* teledildonic* terroris* testic* tits toilet* turd* unnatural urin* virgin
vomit* wank* white-trash wife wtf zipperhead*
"""
UNWANTED = re.compile(
    r"\b(?:" + "|".join(UNWANTED_WORDS.split()).replace("*", r"\w*").replace("-", r"[-\s]+") + r")\b", re.IGNORECASE
)
E_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.\w+")

# The chapters of the Jargon File that become conversations. Left out: tables, lists of contributors and of books, the
# request for submissions, and the portrait of the typical hacker, which generalises about people.
ESSAY_HEADING = re.compile(r"(?:Chapter [124-9]|Appendix A)\. (.+)")

# Entries that reproduce programs and drawings by other authors.
QUOTED_WORKS = {"ASCII art", "Obfuscated C Contest"}

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

PLAIN_CHARACTERS = str.maketrans("\u00a0─│┌┐└┘├┤┬┴┼", " -|+++++++++")

Conversation = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...], user and assistant in turn


@dataclass
class Entry:
    """One headword of the Jargon File, with the keys of the entries its text refers to."""

    term: str
    text: str
    links: list[str] = field(default_factory=list)


@dataclass
class Document:
    """An essay or a help topic: a title and (heading, text) pairs, the first of which carries the title."""

    title: str
    sections: list[tuple[str, str]]


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def join_wrapped(lines: list[str], width: int, base_indent: int) -> str | None:
    """Return the lines of a wrapped paragraph as one line, or None if they are code, verse, a table or a drawing.

    A wrapped paragraph is known by its line ends: the first word of each line would not have fit on the line before.
    """
    start = re.match(r" *(?:(?:[•*]|\d+\.|\[\d+\]) +)?", lines[0]).end()
    indents = {indent_of(lines[0]), start}
    is_item = len(indents) == 2
    if indent_of(lines[0]) < base_indent or (len(lines) == 1 and indent_of(lines[0]) > base_indent and not is_item):
        return None
    if any(len(line) > width or "::=" in line or re.search(r"\S {3,}\S", line[start:]) for line in lines):
        return None
    text = lines[0]
    for line, following in pairwise(lines):
        is_full = len(line) + 1 + len(following.split()[0]) > width
        if not is_full or indent_of(following) not in indents:
            return None
        text += ("" if re.search(r"\w-$", line) else " ") + following.strip()
    return text


def unwrap(blocks: list[str], width: int, base_indent: int, clean=lambda text: text) -> str:
    """Join the wrapped paragraphs among `blocks` and leave every other block line for line.

    Args:
        blocks: the blocks of a text, each one or more lines, as blank lines separate them.
        width: column at which the source wraps.
        base_indent: indentation of the source's prose, which is removed. Verbatim blocks that lie to the left of it
            are moved to the right instead, all that follow one another together, so that drawings stay whole.
        clean: applied to each joined paragraph, not to verbatim blocks.
    """
    prose = [join_wrapped(block.split("\n"), width, base_indent) for block in blocks]
    texts = []
    for is_verbatim, run in groupby(zip(blocks, prose, strict=True), key=lambda pair: pair[1] is None):
        if not is_verbatim:
            texts += [clean(text) for _, text in run]
            continue
        verbatim = "\n\n".join(block for block, _ in run)
        if any(indent_of(line) < base_indent for line in verbatim.split("\n") if line):
            verbatim = textwrap.indent(textwrap.dedent(verbatim), " " * (base_indent + 4))
        texts.append(verbatim)
    return "\n".join(line[base_indent:].rstrip() for line in "\n\n".join(texts).split("\n")).strip()


def split_blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in re.split(r"\n(?:[ ]*\n)+", text) if block.strip()]


def is_unwanted(text: str) -> bool:
    return bool(UNWANTED.search(text) or E_MAIL.search(text))


def read_jargon(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"--jargon: no file at {path}. Install the Debian package jargon-text, or name a copy of its jargon.txt.gz."
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = file.read().translate(PLAIN_CHARACTERS).split("\n")
    if "(version 4.4.7)" not in lines[:10]:
        raise ValueError(f"--jargon: {path} is not the plain text of the Jargon File, version 4.4.7.")
    return lines


def link_key(name: str) -> str:
    """Fold a headword or a reference to one form: `Oracle, the` and `oracle` are the same entry."""
    return re.sub(r", the$", "", " ".join(name.lower().split()))


def strip_references(text: str, known: set[str]) -> str:
    """Turn `{hack}` into `hack` where the braces mark a reference to an entry; elsewhere they may be code."""

    def strip(match: re.Match) -> str:
        is_reference = link_key(match[1]) in known or re.fullmatch(r"\w[\w .'/+-]*", match[1])
        return match[1] if is_reference else match[0]

    return re.sub(r"\{([^{}]+)\}", strip, text)


def drop_captions(paragraphs: list[str]) -> list[str]:
    """Drop the paragraphs that point from one cartoon to the next, and the one-line captions above them."""
    kept = []
    for paragraph in paragraphs:
        if "cartoon in the Crunchly saga" not in paragraph:
            kept.append(paragraph)
        elif kept and "\n" not in kept[-1]:
            kept.pop()
    return kept


def find_entries(lines: list[str]) -> list[tuple[str, str]]:
    """Cut the lexicon into (headword, source text) pairs."""
    start, end = lines.index("Glossary"), lines.index("Appendix A. Hacker Folklore")
    found: list[tuple[str, list[str]]] = []
    in_entry = False
    for line in lines[start:end]:
        if headword := re.match(r"   :(\S.*?):(?= |$)", line):
            found.append((headword[1], ["   " + headword[1] + line[headword.end() - 1 :]]))
            in_entry = True
        elif re.fullmatch(r"  [0A-Z]", line):
            in_entry = False  # the index of the next letter follows
        elif in_entry:
            found[-1][1].append(line)
    return [(term, "\n".join(body)) for term, body in found]


def clean_entries(found: list[tuple[str, str]], known: set[str]) -> list[Entry]:
    """Drop the unwanted entries, clean the others and list which of the others each one refers to."""
    entries = []
    for term, source in found:
        if not is_unwanted(source) and term not in QUOTED_WORKS:
            text = unwrap(
                drop_captions(split_blocks(source)), JARGON_WIDTH, 3, lambda text: strip_references(text, known)
            )
            entries.append(Entry(term, text, [link_key(name) for name in re.findall(r"\{([^{}]+)\}", source)]))
    kept = {link_key(entry.term) for entry in entries}
    for entry in entries:
        entry.links = [key for key in dict.fromkeys(entry.links) if key in kept and key != link_key(entry.term)]
    return entries


def parse_essays(lines: list[str], known: set[str]) -> list[Document]:
    """Read the essays before and after the lexicon. A heading stands at column 0, or at 2 within a section."""
    headings = {line.strip() for line in lines if re.match(r"(?:  )?[A-Z]", line)}
    essays: list[Document] = []
    for start, end in pairwise([*(n for n, line in enumerate(lines) if re.match(r"(?:  )?[A-Z]", line)), len(lines)]):
        heading = lines[start].strip()
        body = "\n".join(lines[start + 1 : end])
        if re.match(r"(?:Part|Chapter|Appendix) |Glossary|Bibliography", heading):
            title = ESSAY_HEADING.match(heading)
            essay = Document(title[1] if title else "", [])
            heading = essay.title
            if title:
                essays.append(essay)
        if essays and essay is essays[-1] and not is_unwanted(body):
            contents = headings | {"Table of Contents"}
            blocks = [block for block in split_blocks(body) if block.strip() not in contents]
            text = unwrap(blocks, JARGON_WIDTH, 3, lambda text: strip_references(text, known))
            if text:
                essay.sections.append((heading, text))
    return [essay for essay in essays if essay.sections]


def plain_heading(heading: str) -> str:
    """Set code in backquotes, for the questions put headings in double quotes."""
    return heading.strip().replace('"', "`")


def read_pydoc() -> list[Document]:
    """Read the help topics, the longest first, without the sections that a longer topic has already given."""
    documents = []
    seen: set[str] = set()
    underlined = re.compile(r"^(.+)\n([*=\-~\"]{3,})$", re.MULTILINE)
    for topic in sorted(PYDOC_TOPICS, key=lambda topic: (-len(PYDOC_TOPICS[topic]), topic)):
        pieces = underlined.split(PYDOC_TOPICS[topic])  # [before, heading, underline, text, heading, ...]
        title = plain_heading(pieces[1])
        sections = []
        for heading, source in zip(pieces[1::3], pieces[3::3], strict=True):
            blocks = split_blocks(source)
            num_new = sum(len(block) for block in blocks if block not in seen)
            seen.update(blocks)
            if num_new > len(source) / 2 and len(source) <= MAX_ANSWER_CHARS:
                sections.append((plain_heading(heading), unwrap(blocks, PYDOC_WIDTH, 0)))
        if sections:
            documents.append(Document(title, sections))
    return documents


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
