"""What must hold for any plan: less is never more."""

import itertools

import pytest
from transformers import LlamaConfig

from ds_minis.planner.inputs.setup import GIB, Setup
from ds_minis.planner.plan.planner import FITS, TOO_LARGE, UNCERTAIN, Planner
from ds_minis.planner.step.trace import CannotTrace

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
CONFIG = LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=32000)
LENGTHS = 1024, 8192, 65536, 524288
ENGINES = "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG)


def device(planner: Planner, tokens: int, **setup) -> float:
    return planner.estimate(Setup(**setup), tokens).device


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_fewer_trained_parameters_and_fewer_bits_never_need_more(planner, engine):
    gpus = 1 if engine == "single" else 4
    for tokens in LENGTHS:
        full, lora, qlora = (
            device(planner, tokens, engine=engine, gpus=gpus, train=train) for train in ("full", "lora", "qlora")
        )
        assert qlora <= lora <= full


def test_more_and_smaller_chunks_never_need_more(planner):
    for tokens in LENGTHS:
        sizes = [device(planner, tokens, settings={"chunk_size": size}) for size in (256, 1024, 4096, 16384)]
        assert sizes == sorted(sizes)
        numbers = [device(planner, tokens, settings={"num_mini_sequences": m}) for m in (2, 8, 64)]
        assert numbers == sorted(numbers, reverse=True)


def test_the_same_moment_of_both_traces_is_carried_on_to_full_depth():
    """What an engine begins to hold in backward may make another moment the peak of one trace alone: 30 times that, by 32."""
    sizes = SIZES | {"num_hidden_layers": 64, "num_key_value_heads": 4, "vocab_size": 8000}
    planner = Planner(LlamaConfig(**sizes))
    for engine, tokens in itertools.product(("zero1", "zero2", "fsdp2"), (200, 400, 800, 1600, 3200)):
        chunks = [
            planner.estimate(Setup(engine=engine, gpus=8, train="lora", settings={"num_mini_sequences": m}), tokens)
            for m in (1, 2, 3, 7)
        ]
        needed = [estimate.device for estimate in chunks]
        assert needed == sorted(needed, reverse=True), (engine, tokens)
        inputs = 64 * tokens * 512 * 2
        assert all(estimate.parts()["layer inputs"] <= 1.01 * inputs for estimate in chunks)


@pytest.mark.parametrize("mode", ["auto", "gather", "ring", "ulysses"])
def test_sharing_a_sequence_never_needs_more(planner, mode):
    for tokens in LENGTHS[1:]:
        alone = device(planner, tokens, engine="zero3", gpus=4)
        two, four = (
            device(planner, tokens, engine="zero3", gpus=4, settings={"sequence_parallel": {"size": n, "mode": mode}})
            for n in (2, 4)
        )
        assert four <= two <= alone


@pytest.mark.parametrize("engine", ENGINES)
def test_more_gpus_never_need_more_each(planner, engine):
    for tokens, train in itertools.product(LENGTHS, ("full", "lora")):
        few, many = (device(planner, tokens, engine=engine, gpus=gpus, train=train) for gpus in (2, 8))
        assert many <= few


@pytest.mark.parametrize("train", ["full", "lora", "qlora"])
def test_stages_of_zero_never_need_more_than_the_one_before(planner, train):
    """Where stage 3 keeps nothing gathered for its next use: by default it keeps 1e9 elements, more than this model has."""
    for tokens in LENGTHS:
        stages = [
            device(planner, tokens, engine=f"zero{stage}", gpus=8, train=train, reuse_distance=0) for stage in range(4)
        ]
        assert stages == sorted(stages, reverse=True)


def test_weights_that_are_met_again_stay_gathered(planner):
    """By DeepSpeed's default, those of a small model all of the time."""
    kept, freed = (
        planner.estimate(Setup(engine="zero3", gpus=8, reuse_distance=distance), 65536) for distance in (None, 0)
    )
    gathered = {term.name: term.nbytes for term in kept.terms}["gathered weights"]
    assert gathered > 0.6 * 2 * planner.counts(planner.profile(planner.way(kept.setup))).model["all"]
    assert kept.device > freed.device


def test_memory_grows_with_the_length_and_the_batch(planner):
    for settings in (None, {}, {"head_groups": "auto"}, {"offload": "cpu"}, {"keep": "attention"}):
        found = [device(planner, tokens, settings=settings) for tokens in LENGTHS]
        assert found == sorted(found)
        assert device(planner, 8192, settings=settings, batch=2) >= found[1]
    for engine, train in itertools.product(ENGINES, ("full", "lora")):
        found = [device(planner, tokens, engine=engine, gpus=4, train=train) for tokens in LENGTHS]
        assert found == sorted(found)


def test_what_saves_memory_saves_memory(planner):
    def at(**settings):
        return device(planner, 262144, settings=settings)

    assert at(scope="layer") < at(scope="tokens") < at(scope="mlp") < device(planner, 262144, settings=None)
    assert at(head_groups="auto") <= at() < at(keep="attention")
    assert at(offload="cpu") < at()
    optimizers = [device(planner, 1024, optimizer=name) for name in ("adamw", "adamw_8bit", "sgd")]
    assert optimizers == sorted(optimizers, reverse=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_offloading_never_needs_more_on_the_device(planner, engine):
    for tokens, train in itertools.product(LENGTHS, ("full", "lora")):
        own, inputs, states = (
            device(planner, tokens, engine=engine, gpus=4, train=train, **fields)
            for fields in (
                {},
                {"settings": {"offload": "cpu"}},
                {"offload_optimizer": True, "offload_param": True},
            )
        )
        assert inputs <= own
        assert states <= own


def test_offloading_moves_bytes_to_the_host(planner):
    plain, offloaded = (planner.estimate(Setup(settings=s), 65536) for s in ({}, {"offload": "cpu"}))
    assert plain.host == 0
    assert offloaded.host == 12 * 65536 * 512 * 2  # layers x tokens x hidden size x bytes, in whole blocks of 16 MiB
    moved = Setup(engine="zero2", gpus=4, offload_optimizer=True)
    assert (
        planner.estimate(moved, 1024).host
        > 12 / 4 * 50e6
        > planner.estimate(moved.replace(offload_optimizer=False), 1024).host
    )


def test_the_longest_that_fits_fits_and_the_next_does_not(planner):
    setup, capacity = Setup(), 6 * GIB
    longest = planner.longest(setup, capacity)
    assert longest > 0 and longest % 1024 == 0
    assert planner.estimate(setup, longest).verdict(capacity) == FITS
    assert planner.estimate(setup, longest + 1024).verdict(capacity) != FITS
    assert planner.longest(setup, 2**20) == 0


def test_three_verdicts(planner):
    estimate = planner.estimate(Setup(), 65536)
    slack = sum(term.nbytes for term in estimate.slack)
    assert slack > 0
    assert estimate.verdict(estimate.device + slack) == FITS
    assert estimate.verdict(estimate.device + slack / 2) == UNCERTAIN
    assert estimate.verdict(estimate.device - 1) == TOO_LARGE


def test_what_no_tensor_takes(planner):
    for engine, gpus in (("single", 1), ("zero2", 4)):
        estimate = planner.estimate(Setup(engine=engine, gpus=gpus, train="lora"), 65536)
        fixed = {term.name: term.nbytes / GIB for term in estimate.terms if term.part == "fixed"}
        own = {"CUDA context": 0.5, "libraries' workspaces": 0.1}
        assert fixed == own | ({"NCCL buffers": 0.5} if gpus > 1 else {})
        assert estimate.device - estimate.allocated == pytest.approx(sum(fixed.values()) * GIB)
        stays = "weights", "optimizer states", "master weights"
        moving = sum(t.nbytes for t in estimate.terms if t.part != "fixed" and t.name not in stays)
        assert sum(term.nbytes for term in estimate.slack) == pytest.approx(0.05 * moving)


def test_kept_attention_is_offloaded_too(planner):
    host = planner.estimate(Setup(settings={"offload": "cpu", "keep": "attention"}), 65536).host
    assert host == 12 * (2 * 65536 * 512 * 2 + 65536 * 8 * 4)  # inputs, outputs, and the log-sums of 8 heads


def test_all_terms_say_what_they_are(planner):
    for engine in ENGINES:
        estimate = planner.estimate(Setup(engine=engine, gpus=4, settings={"sequence_parallel": 2}), 65536)
        assert all(term.why and term.nbytes >= 0 for term in [*estimate.terms, *estimate.slack])
        assert sum(estimate.parts().values()) == pytest.approx(estimate.device)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"engine": "zero4"}, "engine: one of single"),
        ({"gpus": 0}, "gpus: a whole number from 1"),
        ({"gpus": 2}, "one process"),
        ({"engine": "zero3", "gpus": 3, "settings": {"sequence_parallel": 2}}, "must divide"),
        ({"optimizer": "lion"}, "adafactor"),
    ],
)
def test_wrong_setups_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Setup(**wrong)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_shards_hold_whole_gradients_of_few_layers_only(engine):
    """However deep the model: an engine's rule for gradients is applied to what there is at full depth."""
    sizes = dict(SIZES, num_key_value_heads=4, vocab_size=32000)
    whole = []
    for depth in (12, 48):
        estimate = Planner(LlamaConfig(**sizes | {"num_hidden_layers": depth})).estimate(
            Setup(engine=engine, gpus=8), 2048
        )
        whole.append(sum(term.nbytes for term in estimate.terms if term.name == "gradients at the peak"))
    assert whole[1] == pytest.approx(whole[0], rel=0.01)


def test_what_the_attention_exchanges_counts_where_the_attention_runs(planner):
    """Plain checkpointing peaks in the MLP, where no keys of other ranks are held; a tiled layer at the attention."""
    ring = {"sequence_parallel": {"size": 4, "mode": "ring"}}
    for settings, holds in (({"scope": "mlp", "chunk_size": 500000, **ring}, False), (ring, True)):
        terms = planner.estimate(Setup(engine="ddp", gpus=4, train="lora", settings=settings), 524288).terms
        assert any("sequence parallelism" in term.name for term in terms) == holds


def test_patterns_for_single_layers_are_refused(planner):
    with pytest.raises(CannotTrace, match="single layers"):
        planner.estimate(Setup(settings={"exclude": ["*.layers.0.*"]}), 1024)
