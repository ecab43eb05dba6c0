"""RoPE's base for a length."""

import dataclasses

import pytest

from ds_minis.context import SEED_STAGES, rope_theta_for, stages_for


@pytest.mark.parametrize("stage", SEED_STAGES, ids=lambda stage: str(stage.sequence_length))
def test_the_formula_gives_the_four_bases_of_the_seed_within_one_percent(stage):
    assert rope_theta_for(stage.sequence_length, 8192, 5e5) == pytest.approx(stage.rope_theta, rel=0.01)


def test_a_base_taken_in_steps_is_the_base_taken_at_once():
    middle = rope_theta_for(65_536, 8192, 5e5)
    assert rope_theta_for(1_048_576, 65_536, middle) == pytest.approx(rope_theta_for(1_048_576, 8192, 5e5))
    assert rope_theta_for(8192, 8192, 5e5) == pytest.approx(5e5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((4096, 8192, 5e5), "length: 8192 .base_length. or more is allowed, got 4096"),
        ((8192, 6, 5e5), "base_length: more than 2.pi tokens"),
        ((8192, 4096, 1.0), "base_theta: more than 1 is allowed, got 1.0"),
    ],
)
def test_what_the_formula_cannot_answer_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        rope_theta_for(*arguments)


def test_stages_are_plain_data():
    stages = stages_for([128, 512], base_length=64, base_theta=100.0, steps=3, accumulation=2)
    assert [dataclasses.asdict(stage) for stage in stages] == [
        {
            "sequence_length": length,
            "rope_theta": rope_theta_for(length, 64, 100.0),
            "steps": 3,
            "accumulation": 2,
            "micro_batch_size": 1,
        }
        for length in (128, 512)
    ]
