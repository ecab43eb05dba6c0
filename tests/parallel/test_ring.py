"""Ring attention on 1, 2 and 4 real processes: output and gradients are those of plain attention over the whole sequence.

All cases run in one start of four processes (ring_worker.py), which takes about ten seconds.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_minis.parallel.attention.block_kernels import visible
from ds_minis.parallel.attention.ring import check_inputs, plan_ring

ROOT = Path(__file__).parents[2]
PART = 6  # tokens
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclasses.dataclass
class Case:
    name: str
    size: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    value_width: int = 8
    part: int = PART
    batch: int = 2
    dtype: str = "float64"
    window: int | None = None
    documents: list[list[int]] | None = None


def numbered(*lengths: int, names: list[int] | None = None) -> list[int]:
    """Documents of these lengths, one behind another."""
    names = names or list(range(len(lengths)))
    return [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]


# Of 24 tokens for two ranks, whose parts end at 6, 12 and 18: (B, S).
DOCUMENTS = {
    "documents across parts": [numbered(4, 11, 9)] * 2,
    "other documents in each row": [numbered(4, 11, 9), numbered(13, 11)],
    "documents as long as parts": [numbered(6, 6, 6, 6)] * 2,
    "padding behind": [numbered(9, 8, 7, names=[3, 4, -1]), numbered(24)],
    "padding before and behind": [numbered(5, 14, 5, names=[-1, 0, -1]), numbered(1, 22, 1, names=[-1, 0, -1])],
    "a document that goes on after another": [numbered(5, 9, 10, names=[7, 2, 7])] * 2,
    "other parts that see one another in each row": [numbered(12, 6, 6), numbered(6, 6, 6, 6, names=[0, 1, 0, 2])],
    "documents of one token": [list(range(24))] * 2,
}
CASES = [
    *(
        Case(f"heads 4/{kv_heads}, {size} ranks", size, kv_heads=kv_heads)
        for size in (1, 2, 4)
        for kv_heads in (4, 2, 1)
    ),
    *(
        Case(f"window {window}, {size} ranks", size, window=window)
        for size, windows in {1: (4, 9), 2: (1, 4, PART, 7, 13, 100), 4: (2, PART, 13, 20)}.items()
        for window in windows
    ),
    *(Case(name, documents=documents) for name, documents in DOCUMENTS.items()),
    Case("documents and a window", documents=DOCUMENTS["other documents in each row"], window=5),
    Case("documents, 4 ranks", 4, documents=[numbered(10, 21, 17), numbered(30, 3, 15, names=[0, 1, -1])]),
    Case("documents, alone", 1, documents=[numbered(7, 5), numbered(2, 10)]),
    Case("narrow values", value_width=3),
    Case("wide values, one KV head, window", kv_heads=1, value_width=20, window=8),
    Case("parts of one token", 4, part=1),
    *(
        Case(f"{dtype}, {name}", 2, dtype=dtype, **settings)
        for dtype in ("float32", "bfloat16", "float16")
        for name, settings in {
            "heads 4/4": {"kv_heads": 4},
            "heads 4/1": {"kv_heads": 1},
            "window": {"window": 8},
            "documents": {"documents": DOCUMENTS["other documents in each row"]},
            "narrow values": {"value_width": 3},
            "wide values, window": {"value_width": 11, "window": 8},
        }.items()
    ),
    Case("float32, 4 ranks", 4, dtype="float32", part=40, width=16, value_width=16, window=70),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ring")
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in CASES]))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ring_worker.py")), str(folder / "cases.json"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_plain_attention(case, ranks):
    for rank, found in enumerate(ranks):
        errors = {name: found["results"][case.name][name] for name in ("out", "dq", "dk", "dv")}
        assert max(errors.values()) <= TOLERANCES[case.dtype], f"rank {rank}: {errors}"


def test_a_second_run_gives_the_same_bits(ranks):
    assert all(result["again"] for found in ranks for result in found["results"].values())


def test_keeps_no_more_than_queries_keys_values_output_and_lse(ranks):
    """What is kept of them is what the caller holds anyway: only lse is a tensor of its own."""
    for found in ranks:
        for case in CASES:
            tokens, result = 2 * case.part, found["results"][case.name]
            q, out = [case.batch, case.heads, tokens, case.width], [case.batch, tokens, case.heads, case.value_width]
            k, v = ([case.batch, case.kv_heads, tokens, width] for width in (case.width, case.value_width))
            assert result["kept"] == [q, k, v, out, q[:3]]
            assert result["copies"] == 1


def test_bytes_are_those_of_the_docstring(ranks):
    elements = 1 * 2 * 8 * (4 + 4)
    for found in ranks:
        assert found["facts"]["sent"] == [2 * 3 * elements, (2 + 4) * 3 * elements]


def test_keys_travel_while_blocks_are_computed(ranks):
    first, later, last = ["send keys", *["compute"] * 3, "wait keys"], ["send keys", "compute"], ["compute"]
    for found in ranks:
        (forward, backward), held = found["facts"]["events"]
        assert held == [4, 6]  # keys and values of two ranks, and in backward the gradients of one
        assert forward == [*first, *later, "wait keys", *later, "wait keys", *last]
        assert backward == [
            *first, *later, "send grads", "wait keys", *later, "wait grads", "send grads", "wait keys",
            *last, "wait grads", "send grads", "wait grads",
        ]  # fmt: skip


def test_autocast_computes_in_its_dtype(ranks):
    for found in ranks:
        dtypes, same_bits = found["facts"]["autocast"]
        assert dtypes == ["torch.bfloat16", "torch.float32", "torch.float32", "torch.bfloat16"]
        assert same_bits, "products of matrices inside were in autocast's dtype"


def tokens_of(rank: int, size: int, part: int) -> list[int]:
    parts = torch.arange(2 * size * part).chunk(2 * size)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]]).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 9, 40])
@pytest.mark.parametrize("kind", ["none", "short", "long", "rows", "scattered"])
def test_the_plan_has_each_pair_that_sees_one_another_once(size, window, kind):
    part, batch = 4, 2
    length = 2 * size * part
    position = torch.arange(length).expand(batch, -1)
    documents = {
        "none": None,
        "short": position // 3,
        "long": position // 7,
        "rows": (position + torch.tensor([[0], [2]])) // 5,
        "scattered": position * 7 % 5 % 3,
    }[kind]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    expected = ((j <= i) & (i - j < (window or length))).expand(batch, -1, -1)
    if documents is not None:
        expected = expected & (documents[:, :, None] == documents[:, None])
    counts = torch.zeros(batch, length, length, dtype=torch.int64)
    for rank in range(size):
        own = tokens_of(rank, size, part)
        for step, blocks in enumerate(plan_ring(rank, size, part, window, documents)):
            other = tokens_of((rank - step) % size, size, part)
            for rows, queries, keys, band in blocks:
                mask = visible(queries.stop - queries.start, keys.stop - keys.start, band)
                assert mask.any(1).all() and mask.any(0).all(), "a query or a key is in vain"
                for row in range(batch)[rows]:
                    counts[row][torch.tensor(own[queries])[:, None], torch.tensor(other[keys])] += mask
    assert counts.max() == 1
    assert (counts.bool() == expected).all()


def test_what_nobody_sees_is_not_computed():
    size, part = 4, 8
    plan = plan_ring(1, size, part, window=4)
    assert [len(blocks) for blocks in plan] == [2, 1, 0, 1]  # the parts before those of rank 1 are on its neighbours
    documents = torch.arange(2 * size * part)[None] // part  # each part is a document
    assert [len(blocks) for blocks in plan_ring(1, size, part, documents=documents)] == [2, 0, 0, 0]
    assert [len(blocks) for blocks in plan_ring(1, size, part)] == [3, 1, 1, 1]  # and none twice as often as needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": (1, 4, 7, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8)},
            "two equal parts.*7 tokens are not.*multiple of .*4",
        ),
        ({"k": (1, 3, 8, 8), "v": (1, 3, 8, 8)}, "3 key/value heads do not divide 4"),
        ({"k": (1, 2, 8, 4)}, r"not q \(1, 4, 8, 8\), k \(1, 2, 8, 4\)"),
        ({"v": (1, 2, 6, 8)}, r"v \(1, 2, 6, 8\)"),
        ({"q": (1, 4, 8)}, r"not q \(1, 4, 8\)"),
        ({"window": 0}, "window is 0.*1 or more, or None"),
        ({"documents": (1, 8)}, r"documents is \(1, 8\).*\(1, 16\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    shapes = {"q": (1, 4, 8, 8), "k": (1, 2, 8, 8), "v": (1, 2, 8, 8)} | change
    window, documents = shapes.pop("window", None), shapes.pop("documents", None)
    if documents is not None:
        documents = torch.zeros(documents, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        check_inputs(*(torch.zeros(shapes[name]) for name in "qkv"), 2, window, documents)


def test_dtypes_that_differ_are_named():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="one floating dtype, not torch.float32, torch.float16 and torch.float32"):
        check_inputs(q, q.half(), q, 1, None, None)
