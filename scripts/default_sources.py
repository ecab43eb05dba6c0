"""The two sources of the default data as clean text: the Jargon File and Python's help topics (see make_default_data.py)."""

import gzip
import re
import textwrap
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS

JARGON_WIDTH, PYDOC_WIDTH = 76, 70  # columns at which the sources wrap their paragraphs
MAX_ANSWER_CHARS = 25_000  # a longer answer would not fit the model's positions
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

PLAIN_CHARACTERS = str.maketrans("\u00a0─│┌┐└┘├┤┬┴┼", " -|+++++++++")


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
