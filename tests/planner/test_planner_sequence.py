"""A plan counts the mode of sequence parallelism that a call chooses; what each mode moves and holds."""

from types import SimpleNamespace

import pytest
import torch

from ds_minis.config_values import SequenceParallel
from ds_minis.parallel.attention.attention import AttentionCall, AttentionRequest, fewer_bytes_by_heads
from ds_minis.planner.devices.sequence import mode_of, received_bytes, terms_of_sequence_parallel
from ds_minis.planner.inputs.setup import Setup

HEADS = [(32, 8), (32, 32), (28, 4), (16, 1), (12, 3), (64, 8)]
MODES = "auto", "gather", "ulysses", "ring", {"ulysses": 2, "ring": 2}


def text(heads: int, kv_heads: int, **more) -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, **more)


def setup(size: int, mode, **settings) -> Setup:
    return Setup(engine="ddp", gpus=size, settings={"sequence_parallel": {"size": size, "mode": mode}, **settings})


def chosen(heads: int, kv_heads: int, size: int, mode, **arguments) -> str:
    """The mode of a call in training."""

    def sdpa_attention_forward():
        pass

    qkv = tuple(torch.empty(1, n, 2, 128, device="meta") for n in (heads, kv_heads, kv_heads))
    parallel = SimpleNamespace(
        settings=SequenceParallel.from_value({"size": size, "mode": mode}), group=lambda: SimpleNamespace(size=size)
    )
    sequence = SimpleNamespace(parallel=parallel, cut=None, padding_is_behind=True)
    request = AttentionRequest(sdpa_attention_forward, torch.nn.Module(), qkv, (), arguments)
    rule = SimpleNamespace(is_causal=True, window=0, sequence=sequence)
    return AttentionCall(request, 0, rule).mode()[0]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_mode_is_the_one_that_a_call_chooses(heads, mode):
    for size in (2, 3, 4, 8, 16) if isinstance(mode, str) else (4,):
        assert mode_of(setup(size, mode), text(*heads)) == chosen(*heads, size, mode), size


def test_a_softcap_keeps_the_ring_away():
    for mode in ("auto", "ring"):
        with_cap = mode_of(setup(3, mode), text(32, 8, attn_logit_softcapping=50.0))
        assert with_cap == chosen(32, 8, 3, mode, softcap=50.0) == "gather"


def test_what_each_mode_moves_and_holds():
    """By hand, of 4 ranks with 10 tokens each, 8 heads and 4 KV heads of 128, in 2 bytes."""
    model, one = text(8, 4), 10 * 128  # elements of one head of a rank's tokens
    expected = {
        "gather": (6 * 3 * 4 * one * 2, 4 * 4 * 4 * one * 2),
        "ulysses": (6 * 3 / 4 * (8 + 4) * one * 2, 2 * (2 * 8 + 2 * 4) * one * 2),
        "ring": (2 * 3 * 4 * one * 10, 4 * 4 * one * 6),
        "hybrid": (6 / 2 * (8 + 4) * one * 2 + 2 * 4 * one * 10, 2 * (2 * 8 + 2 * 4) * one * 2 + 4 * 4 * one * 6),
    }
    for mode, (moved, held) in expected.items():
        one_way = setup(4, {"ulysses": 2, "ring": 2} if mode == "hybrid" else mode)
        assert mode_of(one_way, model) == mode
        assert received_bytes(one_way, model, 10) == pytest.approx(moved)
        (term,) = terms_of_sequence_parallel(one_way, model, 10)
        assert term.nbytes == pytest.approx(held) and f"({mode})" in term.name
        by_head = setup(4, one_way.sequence_parallel_mode, head_groups="auto")
        assert terms_of_sequence_parallel(by_head, model, 10)[0].nbytes == pytest.approx(held / 4)


def test_kv_heads_are_repeated_for_more_ranks_than_there_are():
    model, one, eight = text(8, 2), 10 * 128, setup(8, "ulysses")
    assert received_bytes(eight, model, 10) == pytest.approx(6 * 7 / 8 * (8 + 8) * one * 2)
    assert terms_of_sequence_parallel(eight, model, 10)[0].nbytes == 2 * (2 * 8 + 2 * 8) * one * 2
    assert not fewer_bytes_by_heads(3, 1, 1, 1, 4) and fewer_bytes_by_heads(12, 4, 4, 4, 4)
