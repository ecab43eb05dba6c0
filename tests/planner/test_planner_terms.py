"""What engines, optimizers and a step's time come to, by hand: numbers that steps of small models are too coarse for."""

from types import SimpleNamespace

import numpy as np
import pytest

from ds_minis.planner.devices.engines import held_by
from ds_minis.planner.devices.held import Counts, optimizer_states, weights
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.timing import Card, step_time
from ds_minis.planner.step.lengths import SYMBOLS
from ds_minis.planner.step.profile import Profile

# 4 layers of 200 parameters, an embedding and an LM head of 100 each; buckets of 16 x 16 elements.
LAYER = {"all": 200, "trained": 200, "linear": 200}
MODEL = {"all": 1000, "trained": 1000, "linear": 800, "largest_linear": 80, "largest_in_layer": 80, "num_layers": 4}
COUNTS = Counts(MODEL | {"embeddings": 200, "largest_embedding": 100}, LAYER, 16)
ADAPTED = Counts(COUNTS.model | {"all": 1040, "trained": 40}, {"all": 210, "trained": 10}, 16)
HEAD, ONE_LAYER = 200, 400  # bytes of their gradients


def held(engine: str, counts: Counts = COUNTS, **fields):
    return held_by(Setup(engine=engine, **{"gpus": 1 if engine == "single" else 8} | fields), counts)


def named(terms) -> dict[str, float]:
    return {term.name: term.nbytes for term in terms}


def at(held, where: str, sofar: float, since_layer: float = 0.0) -> dict[str, float]:
    """What varies, at a moment."""
    return {v.term.name: float(v.bytes_at(where, np.array([sofar]), np.array([since_layer]))[0]) for v in held.varying}


def moment(held, where: str) -> dict[str, float]:
    return named(next(m for m in held.moments if m.where == where).terms)


def test_one_process_and_ddp():
    own = {"weights": 2000, "optimizer states": 4000}
    single, ddp = held("single"), held("ddp")
    assert named(single.terms) == own and named(ddp.terms) == own | {"gradient buckets": 2000}
    for one in (single, ddp):
        assert at(one, "backward", 600) == {"gradients at the peak": 600} and moment(one, "optimizer") == {
            "gradients": 2000
        }
    assert at(held("ddp", accumulation=2), "forward", 0) == {"gradients at the peak": 2000}
    assert not held("single", optimizer_in_backward=True).varying
    master = held("ddp", master_weights=True)
    assert named(master.terms) == {
        "weights": 4000, "optimizer states": 8000, "gradient buckets": 4000, "weights cast by autocast": 2000
    }  # fmt: skip
    assert at(master, "backward", 600) == {"gradients at the peak": 1200}


def test_fsdp2():
    one = held("fsdp2")
    assert named(one.terms) == {"weights": 500, "optimizer states": 1000} and named(one.during) == {
        "gathered root unit": 400
    }
    gathered, waiting = "gathered layers", "gradients at the peak"
    reduced, shards = "input of the reduction", "gradient shards"
    assert at(one, "forward", 0) == {gathered: 800, waiting: 0, reduced: 0, shards: 0}
    assert at(one, "loss", HEAD) == {gathered: 400, waiting: 200, reduced: 0, shards: 0}
    assert at(one, "backward", HEAD + ONE_LAYER) == {gathered: 800, waiting: 200, reduced: 400, shards: 100}
    assert at(one, "backward", ONE_LAYER)[reduced] == 0  # the LM head's gradient is the first
    assert at(one, "backward", HEAD + 3 * ONE_LAYER)[gathered] == 400
    assert moment(one, "end of backward") == {"gathered root unit": 400, shards: 500, "the root unit's gradients": 800}
    assert at(held("fsdp2", accumulation=2), "forward", 0)[shards] == 500
    four_bit = at(held("fsdp2", ADAPTED, train="qlora"), "forward", 0)[gathered]
    assert four_bit == pytest.approx(2 * 210 * (0.5 + 1 / 64 + 4 / 16384))
    on_host = {term.name for term in held("fsdp2", offload_param=True).terms if term.on_host}
    assert on_host == {"weights", "optimizer states"}


def test_zero_0():
    one = held("zero0")
    assert named(one.terms) == {"weights": 2000, "master weights": 4000, "optimizer states": 8000}
    assert moment(one, "reduction") == {"gradients": 2000, "input of the reduction": 2000}
    assert moment(one, "optimizer") == {"gradients": 2000, "gradients in float32": 4000}
    assert [m.where for m in held("zero0", dtype="float32").moments] == ["reduction"]
    large = Counts(COUNTS.model | {"trained": 10**9}, LAYER, 16)
    assert moment(held("zero0", large), "reduction")["input of the reduction"] == 10**9


STATES = {"master weights": 500, "optimizer states": 1000}
STEP = {"gradient shards": 250, "optimizer's step": 125 * 2 + 125 * 4}


def test_zero_1_and_2():
    first, second = held("zero1"), held("zero2")
    assert named(first.terms) == named(second.terms) == {"weights": 2000, **STATES}
    assert at(first, "backward", 0) == {"gradients at the peak": 0, "gradient bucket": 0}
    assert at(first, "backward", 600) == {"gradients at the peak": 600, "gradient bucket": 512}
    assert moment(first, "reduction") == {"gradients": 2000, "gradient shards": 250, "gradient bucket": 512}
    assert at(second, "forward", 0) == {"gradients at the peak": 0, "gradient buckets": 0, "gradient shards": 0}
    assert at(second, "backward", 600, 300) == {
        "gradients at the peak": 0, "gradient buckets": 1024, "gradient shards": 250
    }  # fmt: skip
    assert moment(first, "optimizer") == moment(second, "optimizer") == STEP
    assert named(held("zero2", accumulation=2).terms)["accumulated gradient shards"] == 250
    assert moment(held("zero2", dtype="float32"), "optimizer")["optimizer's step"] == 125 * 4
    offloaded = held("zero2", offload_optimizer=True)
    assert moment(offloaded, "optimizer")["optimizer's step"] == 0
    assert {term.name for term in offloaded.terms if term.on_host} == set(STATES)


def test_a_gradient_that_is_larger_than_the_bucket_waits_by_itself():
    for engine in ("zero2", "zero3"):
        one = held(engine, bucket=50)
        assert at(one, "loss", HEAD, HEAD)["gradients at the peak"] == HEAD
        assert at(one, "backward", HEAD + 160, 160)["gradients at the peak"] == 160  # the largest of a layer
        assert at(one, "backward", HEAD + 90, 90)["gradients at the peak"] == 90
        assert at(held(engine, bucket=90), "backward", HEAD + 160, 160)["gradients at the peak"] == 0


def test_zero_3():
    one = held("zero3")
    assert named(one.terms) == {"weights": 250, **STATES, "gradient shards": 250, "gradient bucket": 512}
    assert moment(one, "optimizer") == {"optimizer's step": 125 * 2 + 125 * 4}

    def gathered(where: str, layers_done: int = 0, **fields) -> float:
        return at(held("zero3", **fields), where, (HEAD + layers_done * ONE_LAYER) * (where == "backward"))[
            "gathered weights"
        ]

    everything = 2 * (4 * 200 + 100)
    assert gathered("forward") == everything and gathered("loss") == everything + 2 * 100
    assert gathered("backward", 1) == everything + 2 * 100 - ONE_LAYER
    freed = {"reuse_distance": 0}
    assert [gathered(where, **freed) for where in ("forward", "loss", "backward")] == [
        2 * ONE_LAYER,
        200,
        2 * ONE_LAYER + 200,
    ]
    assert gathered("backward", 3, **freed) == ONE_LAYER + 200  # none is ahead of the first layer
    some = {"reuse_distance": 450}  # the head's 100 and two layers
    assert gathered("forward", **some) == 2 * (3 * 200 + 100)
    plain = {"settings": None}
    assert gathered("forward", **plain) == 2000 and gathered("forward", live_parameters=300, **plain) == 600
    assert gathered("backward", 4, live_parameters=300, **plain) == 2 * 200
    large = Counts(COUNTS.model | {"trained": 16e9}, LAYER, 16)
    assert moment(held("zero3", large), "optimizer")["optimizer's step"] == 1e9 * 6


def test_weights_in_4_bits():
    own = named(weights(Setup(train="qlora"), ADAPTED, 2, 1))
    assert own == {
        "weights": 40 * 2 + 200 * 2,
        "4-bit weights": pytest.approx(800 * 0.515869140625),
        "a weight in 16 bits": 160,
    }
    in_shards = named(weights(Setup(train="qlora", engine="fsdp2", gpus=8), ADAPTED, 4, 8))
    assert in_shards["4-bit weights"] == own["4-bit weights"] / 8
    assert in_shards["weights"] == (40 * 4 + 200 * 2) / 8 and in_shards["a weight in 16 bits"] == 160


@pytest.mark.parametrize(
    ("name", "nbytes", "on_host"),
    [("adamw", 8000, False), ("adamw_8bit", 2062.5, False), ("paged_adamw_8bit", 2062.5, True), ("sgd", 0, False)],
)
def test_optimizers(name, nbytes, on_host):
    term = optimizer_states(Setup(optimizer=name), 1000, 4.0)
    assert (term.nbytes, term.on_host) == (nbytes, on_host)


def profile_of(where: str, aligned: bool, depth: int = 32) -> Profile:
    """Two moments of two and of three layers: 100 bytes + 10 for each layer, and 50 + 20 for each."""

    def events(layers: int) -> list[list[float]]:
        return [[base + each * layers, *[0.0] * len(SYMBOLS), layers] for base, each in ((100.0, 10.0), (50.0, 20.0))]

    data = {"depths": (2, 3, depth), "parameters": {}, "of_layer": {}, "flops": [], "widest": [], "notes": []}
    data |= {"positions": 0, "largest": ("", 0), "undivided": "", "series": [(where, events(2), events(3), aligned)]}
    return Profile.from_data(data)


@pytest.mark.parametrize(("where", "layers"), [("forward", 4), ("loss", 1), ("backward", 2)])
def test_what_of_a_trace_is_carried_on_to_which_depth(where, layers):
    lengths = [1.0, *[0.0] * (len(SYMBOLS) - 1)]

    def peak(profile, **how):
        return profile.peak(lengths, lambda where, sofar, since: np.zeros_like(sofar), **how)

    found = peak(profile_of(where, aligned=True))
    assert (found.activations, found.layer_inputs, found.where) == (50 + 32 * 20, 32 * 20, where)
    assert peak(profile_of(where, aligned=False)).activations == 100 + 32 * 10  # the highest moment of each
    few_on_device = max(100 + layers * 10, 50 + layers * 20)
    assert peak(profile_of(where, aligned=True), offloaded=True).activations == few_on_device
    assert peak(profile_of(where, aligned=True, depth=1), offloaded=True).activations == 110


def test_seconds_of_a_step():
    text = SimpleNamespace(
        num_hidden_layers=4, hidden_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4
    )
    profile = SimpleNamespace(flops=(1000.0, 10.0), parameters=MODEL)
    card = Card(flops=1e6, matmul_efficiency=0.5, attention_efficiency=0.25, host_bytes=100.0, link_bytes=1000.0)

    def step(**fields):
        return step_time(Setup(**fields), profile, text, 64, card=card)

    own = step()
    assert (own.matmuls, own.attention, own.host, own.collectives) == (64 * 1000 / 5e5, 64**2 * 10 / 2.5e5, 0, 0)
    assert own.seconds == own.matmuls + own.attention
    assert step(dtype="float32").seconds == 2 * own.seconds and step(batch=3).seconds == pytest.approx(3 * own.seconds)
    assert step(settings={"offload": "cpu"}).host == 2 * 4 * 64 * 16 * 2 / 100
    moved = {"ddp": 2 * 2000, "zero2": 2 * 2000, "zero3": 2000 + 2 * 2000, "fsdp2": 2000 + 2 * 2000}
    for engine, nbytes in moved.items():
        assert step(engine=engine, gpus=8).collectives == pytest.approx(nbytes * 7 / 8 / 1000)
    assert step(engine="zero2", gpus=8, offload_optimizer=True).host == 4 * 1000 / 8 * 2 / 100
    shared = step(engine="ddp", gpus=4, settings={"sequence_parallel": 4})
    assert (shared.matmuls, shared.attention) == (own.matmuls / 4, own.attention / 4)
    assert shared.seconds > max(shared.matmuls + shared.attention, 2 * 2000 * 3 / 4 / 1000)
