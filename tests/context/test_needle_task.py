"""The tests that `ds-minis needle` asks: their length, the needle's place, the question, the answer."""

import re

import pytest
from needle_models import maker, tokenizer

from ds_minis.context.needle.model import make_needle_maker
from ds_minis.context.needle.task import PROMPTS, NeedleTask, WrongTask

CASES = [
    {"prompts": prompts, "variant": variant, **more}
    for prompts in PROMPTS
    for variant, more in (
        ("niah_single", {}),
        ("niah_single", {"num_distractors": 2}),
        ("niah_single", {"num_cities_retrieval": 3}),
        ("niah_multikey", {}),
        ("niah_multivalue", {}),
    )
]
NEEDLE = (
    r"[Tt]he special magic ([A-Z]\w+(?: York)?) number is: (\d+)\.|magic numbers for ([A-Z]\w+(?: York)?) is: (\d+)\."
)


def needles_in(text: str) -> list[tuple[str, str]]:
    return [(a or c, b or d) for a, b, c, d in re.findall(NEEDLE, text)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_test_has_its_length_its_needles_and_ends_before_the_answer(case):
    made, words = maker(**case), tokenizer()
    for length, depth, sample in ((300, 0.0, 0), (397, 0.5, 1), (301, 1.0, 2)):
        test = made.make(length, depth, sample)
        assert test == made.make(length, depth, sample) and test.length == length
        whole = words.decode(test.prompt_ids + test.answer_ids)
        assert whole.endswith(f" {test.answer}") and test.prompt_ids[0] != test.answer_ids[0]
        values = test.answer.split(", ")
        found = needles_in(whole)
        asked = [value for _, value in found if value in values]
        if case["variant"] == "niah_multivalue":
            assert asked == values and len(values) == 4 and len({key for key, _ in found}) == 1
        else:
            assert sorted(asked) == sorted(values) and len(values) == case.get("num_cities_retrieval", 1)
            others = {"niah_multikey": 3}.get(case["variant"], case.get("num_distractors", 0))
            assert len(found) == len(values) + others
        assert all(len(value) == 7 for value in values)
        question = whole[whole.rfind("What ") :]
        keys = {key for key, value in found if value in values}
        assert all(key in question for key in keys)


def test_numbers_and_haystack_differ_from_sample_to_sample():
    made = maker()
    first, second = made.make(300, 0.5, 0), made.make(300, 0.5, 1)
    assert first.answer != second.answer and first.prompt_ids[20:60] != second.prompt_ids[20:60]
    assert maker(seed=1).make(300, 0.5, 0) != first


@pytest.mark.parametrize("prompts", PROMPTS)
def test_the_needle_is_at_its_depth_after_a_sentence(prompts):
    made, words = maker(4000, prompts=prompts), tokenizer()
    wording = PROMPTS[prompts]
    for depth in (0.0, 0.1, 0.5, 0.9, 1.0):
        text = words.decode(made.make(4000, depth, 0).prompt_ids)
        place = re.search(NEEDLE, text)
        assert abs(place.start() / len(text) - depth) < 0.06
        before = text[: place.start()].removesuffix("One of the special ").rstrip()
        if depth == 0:
            assert before == wording.prefix.rstrip()
        elif depth < 1:
            assert before[-1] in ".!?"
        else:
            assert text[place.end() :].lstrip().startswith(wording.question[:6].lstrip())


def test_a_text_that_is_shorter_than_a_test_begins_again(tmp_path):
    (tmp_path / "b.txt").write_text("Two words here.\n")
    (tmp_path / "a.txt").write_text("One word.\n")
    made = make_needle_maker(NeedleTask(), tokenizer(), [tmp_path])
    text = tokenizer().decode(made.make(300, 0.5, 0).prompt_ids)
    assert text.count("Two words here.") > 10 and "One word.\n\nTwo" in text


def test_a_tokenizer_that_begins_a_text_with_a_token_does_so_here():
    words = tokenizer()
    from tokenizers.processors import TemplateProcessing

    words._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    test = make_needle_maker(NeedleTask(), words).make(300, 0.5, 0)
    assert test.prompt_ids[0] == 0 and test.prompt_ids.count(0) == 1 and test.length == 300


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"variant": "niah"}, "variant: one of niah_single, niah_multikey, niah_multivalue is allowed, got 'niah'"),
        ({"prompts": "nano"}, "prompts: one of nanotron, ruler is allowed, got 'nano'"),
        ({"num_samples": 0}, "num_samples: 1 to .* is allowed with niah_single, got 0"),
        ({"variant": "niah_multikey", "num_distractors": 0}, "num_distractors: 1 to"),
        ({"num_values": 2}, "num_values=2 is for the variant niah_multivalue"),
        ({"num_cities_retrieval": 9}, "num_cities_retrieval: 1 to 8"),
        ({"variant": "niah_multivalue", "num_cities_retrieval": 2}, "only one of them can be above 1"),
        ({"rnd_number_digits": 0}, "rnd_number_digits: 1 to 100"),
    ],
)
def test_settings_that_make_no_test_are_refused(task, words):
    with pytest.raises(WrongTask, match=words):
        NeedleTask(**task)


def test_a_length_without_room_is_refused_with_what_is_needed():
    with pytest.raises(WrongTask, match=r"length 30: needles, question and answer alone take (\d+) tokens") as error:
        maker().make(30, 0.5, 0)
    least = int(re.search(r"take (\d+)", str(error.value))[1])
    assert maker().make(least, 0.5, 0).length == least


def test_a_haystack_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(WrongTask, match=r"haystack: .*a text file, or a folder with .txt files"):
            make_needle_maker(NeedleTask(), tokenizer(), [path])


def test_a_haystack_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "weights.txt").write_bytes(b"\x80\x81")
    with pytest.raises(WrongTask, match=r"haystack: .*weights.txt: no text in UTF-8"):
        make_needle_maker(NeedleTask(), tokenizer(), [tmp_path])
