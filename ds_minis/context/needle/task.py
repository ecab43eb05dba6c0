"""What is asked in a needle-in-a-haystack test: the prompts of public tests, and one test as token ids.

A *needle* says that a key (a city) has a value (a random number). It is put into a *haystack* of text, and the prompt ends
with a question about it. Sources of the wording: `nanotron` is that of nanotron's `needle_in_a_haystack_test.py` and of
EasyContext's `eval_needle.py`, which are the same; `ruler` is that of RULER's NIAH tasks (arXiv 2404.06654).

This file needs no torch.
"""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

VARIANTS = {
    "niah_single": "one needle (and --num-distractors others, none by default)",
    "niah_multikey": "needles with other keys beside it (3 by default)",
    "niah_multivalue": "one key with several values, all asked for in the order of the text (4 by default)",
}
CITIES = ("Singapore", "Chicago", "Sydney", "Amsterdam", "Nairobi", "Lima", "Oslo", "Cairo")
OTHER_CITIES = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")


@dataclass(frozen=True)
class Prompts:
    """The wording of a test, with `{key}` and `{value}` to fill in; `..._of_several` where several values are asked for."""

    prefix: str
    needle: str
    question: str
    prefix_of_several: str
    question_of_several: str


PROMPTS = {
    "nanotron": Prompts(
        prefix="This is a very long story book: <book>",
        needle="\nThe special magic {key} number is: {value}.\n",
        question="</book>.\n Based on the content of the book, Question: What is the special magic {key} number? Answer: The "
        "special magic {key} number is:",
        prefix_of_several="This is a very long story book: <book>",
        question_of_several="</book>.\n Based on the content of the book, Question: What are the special magic {key} "
        "numbers? Answer: The special magic {key} numbers are:",
    ),
    "ruler": Prompts(
        prefix="A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        needle=" One of the special magic numbers for {key} is: {value}. ",
        question="\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for "
        "{key} mentioned in the provided text is",
        prefix_of_several="Some special magic numbers are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the numbers afterwards.\n",
        question_of_several="\nWhat are all the special magic numbers for {key} mentioned in the provided text? The special "
        "magic numbers for {key} mentioned in the provided text are",
    ),
}


class WrongTask(ValueError):
    """The settings of a test contradict each other, or are out of range."""


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """The settings of a test that are the same in all its cells.

    Attributes:
        variant: one of `VARIANTS`, RULER's names.
        prompts: one of `PROMPTS`.
        num_samples: tests in each cell of length and depth, each with other numbers and another part of the haystack.
        num_distractors: needles with other keys; None for what the variant means by itself.
        num_values: values of the key (`niah_multivalue`); None for what the variant means by itself.
        num_cities_retrieval: keys that are asked for at once (nanotron's flag; RULER calls more than one niah_multiquery).
        rnd_number_digits: digits of a value.
        seed: of numbers, places and parts of the haystack.

    Raises:
        WrongTask: with the setting, its value and what is allowed.
    """

    variant: str = "niah_single"
    prompts: str = "nanotron"
    num_samples: int = 2
    num_distractors: int | None = None
    num_values: int | None = None
    num_cities_retrieval: int = 1
    rnd_number_digits: int = 7
    seed: int = 0

    def __post_init__(self):
        _require_one_of("variant", self.variant, VARIANTS)
        _require_one_of("prompts", self.prompts, PROMPTS)
        own = {
            "num_distractors": 3 if self.variant == "niah_multikey" else 0,
            "num_values": 4 if self.variant == "niah_multivalue" else 1,
        }
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least, most in (
            ("num_samples", 1, 10**6),
            ("num_distractors", 1 if self.variant == "niah_multikey" else 0, 10**4),
            ("num_values", 2 if self.variant == "niah_multivalue" else 1, 100),
            ("num_cities_retrieval", 1, len(CITIES)),
            ("rnd_number_digits", 1, 100),
        ):
            if not least <= getattr(self, name) <= most:
                raise WrongTask(f"{name}: {least} to {most} is allowed with {self.variant}, got {getattr(self, name)}")
        if self.num_values > 1 and self.variant != "niah_multivalue":
            raise WrongTask(f"num_values={self.num_values} is for the variant niah_multivalue, not {self.variant}")
        if self.num_values > 1 and self.num_cities_retrieval > 1:
            raise WrongTask("num_values and num_cities_retrieval: only one of them can be above 1")

    def to_value(self) -> dict[str, Any]:
        """As a results file holds it."""
        return dataclasses.asdict(self)


def _require_one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise WrongTask(f"{name}: one of {', '.join(allowed)} is allowed, got {value!r}")


@dataclass(frozen=True)
class NeedleTest:
    """One test: a prompt of token ids that ends where the answer begins, and the answer."""

    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class NeedleMaker:
    """Makes tests for a tokenizer and a haystack.

    Args:
        encode: text -> token ids, without special tokens.
        leading_ids: special tokens that the tokenizer begins a text with.
        haystack_ids: the haystack's tokens; a test longer than they are begins them again.
        ends: their sorted places after which a sentence has ended, where needles are put.
    """

    def __init__(
        self,
        task: NeedleTask,
        encode: Callable[[str], list[int]],
        leading_ids: Sequence[int],
        haystack_ids: Sequence[int],
        ends: Sequence[int],
    ):
        self.task, self._encode = task, encode
        self._leading, self._hay, self._ends = list(leading_ids), list(haystack_ids), list(ends)
        self._prompts = PROMPTS[task.prompts]

    def make(self, length: int, depth: float, sample: int) -> NeedleTest:
        """The test number `sample` of a cell: exactly `length` tokens, answer included, the needle at `depth` (0 to 1).

        The same arguments give the same test, on every rank and in every run. The depth is that of the (first) needle
        that is asked for; further ones, and distractors, are anywhere.

        Raises:
            WrongTask: the length has no room for needles and question.
        """
        task = self.task
        draw = random.Random(f"{task.seed}-{length}-{depth:.6f}-{sample}")
        keys = (
            draw.sample(CITIES, task.num_cities_retrieval) if task.num_cities_retrieval > 1 else [draw.choice(CITIES)]
        )
        wanted = [(key, self._number(draw)) for key in keys for _ in range(task.num_values)]
        others = [(OTHER_CITIES[i % len(OTHER_CITIES)], self._number(draw)) for i in range(task.num_distractors)]
        several = len(wanted) > 1
        prefix = self._prompts.prefix_of_several if several else self._prompts.prefix
        question = self._prompts.question_of_several if several else self._prompts.question
        question = question.format(key=", ".join(keys))
        needles = [self._encode(self._prompts.needle.format(key=k, value=v)) for k, v in wanted + others]
        depths = [depth] + [draw.random() for _ in needles[1:]]
        in_text = sorted(range(len(needles)), key=lambda i: (depths[i], i))
        answered = [i for i in in_text if i < len(wanted)] if task.num_values > 1 else range(len(wanted))
        answer = ", ".join(wanted[i][1] for i in answered)
        begin, start = self._leading + self._encode(prefix), draw.randrange(len(self._hay))
        asked, answer_ids = self._question(question, answer)
        num_hay = length - len(begin) - sum(map(len, needles)) - len(asked) - len(answer_ids)
        if num_hay < 0:
            raise WrongTask(
                f"length {length}: needles, question and answer alone take {length - num_hay} tokens; give a greater length "
                "(--min-context-length), or fewer needles"
            )
        hay = [self._hay[(start + i) % len(self._hay)] for i in range(num_hay)]
        text, last = begin, 0
        for i in in_text:
            place = self._after_sentence(start, int(depths[i] * num_hay), num_hay)
            text = text + hay[last:place] + needles[i]
            last = place
        return NeedleTest(text + hay[last:] + asked, answer_ids, answer)

    def _number(self, draw: random.Random) -> str:
        digits = self.task.rnd_number_digits
        return str(draw.randrange(10 ** (digits - 1), 10**digits))

    def _question(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the question, and of what greedy decoding must add to it: the answer as the tokenizer writes it there."""
        alone, whole = self._encode(question), self._encode(f"{question} {answer}")
        same = next(
            (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole))
        )
        return whole[:same], whole[same:]

    def _after_sentence(self, start: int, place: int, num_hay: int) -> int:
        """The next end of a sentence at or after a place, if there is one; 0 stays 0, as in nanotron's test."""
        at = (start + place) % len(self._hay)
        i = bisect_left(self._ends, at)
        moved = place + (self._ends[i] if i < len(self._ends) else len(self._hay)) - at
        return min(moved, num_hay) if place else 0
