"""The benchmarks' own machinery, at sizes that take seconds: what is counted, how it is timed, how lengths are searched."""

import dataclasses
import math
from types import SimpleNamespace

import max_context
import pytest
import report
import simulate
import step_time
import torch
from common import SHAPES, Shape
from full_step import AdamWBytes, adamw
from live_bytes import LiveBytes
from paired import compared, interleaved
from search import largest
from stubs import HostCopies
from transient_memory import DIVISOR, decoder_flops, decoder_memory, loss_memory
from variants import ALL, PLAIN, Unavailable, Variant, ours

SMALL = dataclasses.replace(
    SHAPES["llama-3-8b"],
    kwargs=SHAPES["llama-3-8b"].kwargs
    | {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_hidden_layers": 6,
    },
)
TOKENS = 8192


def test_peak_of_a_known_sequence_of_operations():
    held = torch.zeros(500)
    with LiveBytes() as live:
        live.hold(held, "parameter")  # 2,000 bytes
        a = held + 1  # 4,000
        b = a.view(5, 100).t()  # no bytes of its own
        c = torch.cat([a, a])  # 8,000: the peak
        del a, b, c
        assert live.now == 2000
        torch.ones(750).sum()  # 5,004
    assert (live.peak, live.host_peak) == (8000, 0)
    assert sorted((entry.nbytes, entry.made_by) for entry in live.at_peak) == [
        (2000, "aten.add.Tensor"),
        (2000, "parameter"),
        (4000, "aten.cat.default"),
    ]


def test_products_are_counted():
    with LiveBytes() as live:
        torch.nn.Linear(4, 5)(torch.ones(3, 4)) @ torch.ones(5, 6)
        torch.bmm(torch.ones(7, 2, 3), torch.ones(7, 3, 4))
    assert live.matmul_flops == 2 * (3 * 4 * 5 + 3 * 5 * 6 + 7 * 2 * 3 * 4)


def test_host_and_device_are_counted_apart():
    with HostCopies(), LiveBytes("meta") as live:
        on_device = torch.empty(100, device="meta")
        on_host = torch.empty(100)
        on_host.copy_(on_device)
        del on_device
        back = on_host.to("meta")
        del on_host
    assert (live.peak, live.host_peak, live.now, live.host_now) == (back.nbytes, 400, 400, 0)


@pytest.fixture(scope="module")
def working_sets() -> dict[str, dict]:
    return {
        name: decoder_memory(SMALL, ALL[name], TOKENS, 2) for name in (PLAIN, "mlp", "tokens", "layer", "plain-offload")
    }


def test_each_scope_needs_less_than_the_one_before(working_sets):
    plain, mlp, tokens = (working_sets[name]["W_KiB_per_token"] for name in (PLAIN, "mlp", "tokens"))
    assert plain > 1.2 * mlp > 1.2 * 1.2 * tokens > 0


def test_products_of_a_step_are_those_of_the_full_size():
    """A step of two layers of Llama-3-8B, forward twice and backward, by hand."""
    shape, tokens = SHAPES["llama-3-8b"], 8192
    found = {
        name: decoder_flops(shape, ALL[name], tokens)
        for name in (PLAIN, "mlp", "tokens", "layer", "layer-groups", "layer-keep")
    }
    weights = 2 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    # Checkpointing's second run ends before the last projection, whose output nobody reads.
    matmuls = 2 * tokens * (4 * weights - 2 * 4096 * 14336)
    assert found[PLAIN] == {"matmul_flops": matmuls, "attention_flops": 2 * 9 * 32 * 128 * tokens**2}
    assert found["mlp"] == found["tokens"] == found["layer"] == found[PLAIN]
    kept = {"matmul_flops": matmuls, "attention_flops": 2 * 7 * 32 * 128 * tokens**2}
    assert found["layer-keep"] == kept  # 2 products in forward, 5 in backward
    groups, attention = found["layer-groups"], found[PLAIN]["attention_flops"]
    assert groups["attention_flops"] == attention * 11 / 9
    assert 1 < groups["matmul_flops"] / matmuls < 1.1
    assert shape.divided(DIVISOR).hidden_size == 256


def test_working_set_of_plain_checkpointing_does_not_grow_with_depth(working_sets):
    deeper = decoder_memory(SMALL, ALL[PLAIN], TOKENS, 3)
    assert deeper["W_KiB_per_token"] == pytest.approx(working_sets[PLAIN]["W_KiB_per_token"], abs=1e-9)
    assert deeper["checkpoint_bytes"] == 3 * TOKENS * 64 * 2


@pytest.mark.parametrize("scope", ["mlp", "tokens", "layer"])
def test_working_set_of_ours_does_not_grow_with_depth(working_sets, scope):
    deeper = decoder_memory(SMALL, ALL[scope], TOKENS, 4)
    assert deeper["W_KiB_per_token"] == pytest.approx(working_sets[scope]["W_KiB_per_token"], rel=0.02)


def test_offloaded_checkpoints_are_on_the_host(working_sets):
    offloaded = working_sets["plain-offload"]
    assert offloaded["host_bytes"] >= 2 * TOKENS * 64 * 2 and offloaded["checkpoint_bytes"] == 0
    assert offloaded["peak_bytes"] < working_sets[PLAIN]["peak_bytes"]


def test_loss_by_chunks_never_holds_all_logits():
    whole, chunks = (loss_memory(SMALL, ALL[name], TOKENS, 4096) for name in (PLAIN, "tokens"))
    assert whole["bytes_per_token"] > 3 * 4 * 4096  # three copies in float32
    assert chunks["bytes_per_token"] < 4096
    assert chunks["bytes_per_token_beside_weight_buffers"] < chunks["bytes_per_token"]


def test_settings_that_this_version_does_not_know_are_named():
    with pytest.raises(Unavailable, match="no_such_key"):
        ours("", no_such_key=1).apply(torch.nn.Linear(1, 1))


class Clock:
    """Time that passes only where a step says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, seconds: float):
        def run():
            self.calls.append(name)
            self.now += seconds * (100 if self.calls.count(name) == 1 else 1)  # the first run is slow

        return run


def test_rounds_are_interleaved_and_the_first_does_not_count():
    clock = Clock()
    steps = {name: clock.step(name, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 4))}
    times = interleaved(steps, 8, clock=clock)
    assert times == {"a": [1.0] * 8, "b": [2.0] * 8, "c": [4.0] * 8}
    rounds = ["".join(clock.calls[i : i + 3]) for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 9 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3  # in several orders


def test_no_round_begins_when_the_time_is_over():
    clock = Clock()
    times = interleaved({"a": clock.step("a", 1)}, 50, seconds=105, clock=clock)
    assert len(times["a"]) == 6  # begun at 100 to 105 seconds
    assert len(interleaved({"a": clock.step("a", 1)}, 50, seconds=0, least=2, clock=clock)["a"]) == 2


def test_ratios_are_of_one_round():
    result = compared({"plain": [1.0, 2.0, 8.0], "ours": [2.0, 1.0, 4.0]}, "plain")["ours"]
    assert result["ratio"] == 0.5 and result["ratio_range"] == [0.5, 2.0] and result["seconds"] == 2.0


@pytest.mark.parametrize("truth", [0, 1, 2, 7, 96, 97, 250, 400])
@pytest.mark.parametrize("start", [1, 900, 970, 2500, 9999999])
def test_search_finds_the_largest_length(truth, start):
    tried = []

    def trial(tokens: int) -> bool:
        assert tokens % 10 == 0 and 0 < tokens <= 4000 and tokens not in tried
        tried.append(tokens)
        return tokens <= truth * 10

    search = largest(trial, start, 10, 4000)
    assert search.best == truth * 10 and search.ended == ""
    assert search.failed == (None if truth == 400 else truth * 10 + 10)
    assert len(tried) <= 20 and list(search.trials) == tried


def test_search_from_a_good_prediction_takes_few_trials():
    assert len(largest(lambda tokens: tokens <= 100, 96, 4, 100000).trials) <= 4
    assert len(largest(lambda tokens: tokens <= 11000, 9600, 10, 100000).trials) <= 11


def test_search_that_is_cut_off_keeps_what_it_knows():
    answers = iter([True, True, "the time is over"])
    search = largest(lambda _: next(answers), 160, 10, 4000)
    assert (search.best, search.failed, search.ended) == (170, None, "the time is over")


@pytest.mark.parametrize("truth", [0, 5, 8, 20, 32, 33, 77, 100])
def test_length_that_fits_a_budget(truth):
    """Bytes that are a line but for a step, as a chunk size's."""
    unit, calls = 4096, []

    def bytes_of(tokens):
        calls.append(tokens)
        return 1000 + 7 * tokens + (3000 if tokens > 50000 else 0)

    found = simulate.longest(bytes_of, bytes_of(truth * unit) + 6 * unit, unit, 100 * unit)
    assert found.best == truth * unit
    assert found.failed == ((truth + 1) * unit if truth < 100 else None)
    assert len(calls) <= 7


def test_full_depth_is_a_line_through_few_layers():
    for setting in ("full", "lora"):
        expected = simulate.step_bytes(SMALL, setting, ALL[PLAIN], TOKENS, 6)
        assert simulate.at_full_depth(SMALL, setting, ALL[PLAIN], TOKENS).device == pytest.approx(expected.device, 1e-3)
    assert simulate.at_full_depth(SMALL, "lora", ALL["plain-offload"], TOKENS).host >= 6 * TOKENS * 64 * 2


def test_full_training_holds_weights_and_two_moments():
    weights = sum(
        p.numel() for p in step_time.build(SMALL.config(), attention="sdpa", dtype=torch.bfloat16).parameters()
    )
    assert 3 * 2 * weights < simulate.step_bytes(SMALL, "full", ALL[PLAIN], 8, 6).device < 1.3 * 3 * 2 * weights


def test_simulated_optimizer_has_the_bytes_of_the_real_one():
    sizes = []
    for optimizer in (adamw, AdamWBytes):
        parameter = torch.nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        with LiveBytes() as live:
            made = optimizer([parameter])
            made.step()
            sizes.append((live.now, live.peak))
    (real, real_peak), simulated = sizes[0], sizes[1]
    assert simulated == (20000, 20000) and real - 20000 < 100 and real_peak - 20000 < 100


@pytest.mark.parametrize("setting", ["full", "lora"])
def test_a_trial_trains_once_per_parameter(setting):
    result = max_context.run_trial(SMALL, setting, ours("", scope="tokens", chunk_size=100), 700, "sdpa", "cpu")
    assert result["completed"] and result["most_optimizer_steps"] == 1
    assert result["loss"] == pytest.approx(math.log(512), rel=0.1)


def test_a_trial_tells_of_an_optimizer_that_runs_once_per_chunk():
    pytest.importorskip("deepspeed")
    result = max_context.run_trial(SMALL, "full", ALL["alst"], 700, "sdpa", "cpu")
    assert result["most_optimizer_steps"] > 1


def test_trials_that_end_without_a_result():
    case = {
        "shape": "no such shape",
        "setting": "full",
        "variant": PLAIN,
        "tokens": 8,
        "attention": "sdpa",
        "device": "cpu",
    }
    assert max_context.in_fresh_process(case, 0.01)["reason"] == max_context.OUT_OF_TIME
    result = max_context.in_fresh_process(case, 300)
    assert not result["completed"] and "exit status 1" in result["reason"] and "no such shape" in result["reason"]


def tiny_steps(**variants: Variant) -> dict:
    shape = Shape("llama", SMALL.kwargs | {"num_hidden_layers": 1}, "")
    torch.manual_seed(0)
    model = step_time.build(shape.config(), attention="sdpa", dtype=torch.float32)
    args = SimpleNamespace(rounds=1, seconds=60)
    return step_time.measure(model, variants, 300, "model", args)


def test_steps_are_compared_before_they_are_timed():
    def wrong_loss(model):
        model.lm_head.register_forward_hook(lambda module, args, output: output * 1.001)

    def wrong_gradient(model):
        model.model.norm.register_full_backward_hook(lambda module, grads, _: (grads[0] * 1.01,))

    def missing(model):
        raise Unavailable("not here")

    result = tiny_steps(
        loss=Variant("", wrong_loss),
        gradient=Variant("", wrong_gradient),
        missing=Variant("", missing),
        tokens=ours("", scope="tokens", chunk_size=64),
        **{PLAIN: ALL[PLAIN]},
    )
    assert list(result["variants"]) == [PLAIN, "tokens"]
    assert "loss by" in result["refused"]["loss"] and "gradients by" in result["refused"]["gradient"]
    assert result["unavailable"] == {"missing": "not here"}
    assert result["variants"]["tokens"]["rounds"] == 1


def test_sharing_copies_hold_the_same_weights():
    model = step_time.build(SMALL.config(num_hidden_layers=1), attention="sdpa", dtype=torch.float32)
    copy = step_time.sharing_copy(model)
    assert copy.model.layers[0] is not model.model.layers[0]
    assert all(a is b for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def test_page_is_what_the_committed_results_give():
    files = report.read(report.RESULTS)
    assert files and (report.RESULTS / "README.md").read_text(encoding="utf-8") == report.page(files)
    for name, content in files.items():
        assert {"simulated", "device", "versions", "date", "commit", "command"} <= content.keys(), name


def test_simulated_results_say_so_wherever_they_are_shown():
    content = {"benchmark": "max_context", "simulated": True, "device": "", "versions": {}, "date": "", "commit": ""}
    entry = {"setting": "full", "variant": "x", "title": "X", "tokens": 8192, "failed_at": 12288, "ended": ""}
    content |= {"command": "", "arguments": {"shape": "s", "card_gib": 80, "reserve_gib": 2}}
    text = report.page({"a.json": content | {"results": [entry | {"host_bytes": 3 * 2**30}]}})
    assert "## Longest sequence, simulated" in text and "| tokens (simulated) |" in text
    assert "| full | X | 8,192 | 3 GiB |" in text and "measured" not in text


def test_real_sizes_are_the_public_ones():
    """Parameters of each model, in billions, as their model cards give them."""
    cards = {"llama-3-8b": 8.03, "llama-2-7b": 6.74, "mistral-7b": 7.24, "qwen2-7b": 7.62, "gemma-2-9b": 9.24}
    for name, billions in cards.items():
        model = step_time.build(SHAPES[name].config(), attention="eager", dtype=torch.bfloat16, device="meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01), name
