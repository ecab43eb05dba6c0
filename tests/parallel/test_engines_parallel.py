"""Sequence parallelism under every engine, real gloo processes: the parameters after 4 steps are those of one process.

A part of the table of `scripts/parallel_matrix.py`. The one process has no engine and no conversion, and the batches of all
replicas: odd and even lengths, another at each step and for each replica, prompts masked, a row padded, two micro batches.
"""

import pytest
from engine_cases import Case
from engines import run_cases
from parity import ENGINES, PARALLEL_COLUMNS, PARALLEL_ROWS, judge, parallel_cell

pytestmark = pytest.mark.engine
CELLS = [
    ("DDP, 2 ranks", "ulysses, layer, full"),
    ("DDP, 2 x 2 ranks", "ring, layer, LoRA"),
    ("FSDP1, 2 ranks", "ring, tokens, LoRA"),
    ("FSDP1, 2 x 2 ranks", "gather, layer, full"),
    ("FSDP2, 2 ranks", "gather, layer, LoRA"),
    ("FSDP2, 2 x 2 ranks", "ring, mlp, full"),
    ("FSDP2, 4 ranks", "ulysses, layer, full"),
    ("ZeRO-0, 4 ranks", "gather, mlp, LoRA"),
    ("ZeRO-1, 2 ranks", "ring, layer, full"),
    ("ZeRO-2, 2 x 2 ranks", "ulysses, layer, LoRA"),
    ("ZeRO-2, 4 ranks", "ring, tokens, full"),
    ("ZeRO-3, 2 ranks", "gather, tokens, full"),
    ("ZeRO-3, 2 x 2 ranks", "ulysses, layer, full"),
    ("ZeRO-3, 4 ranks", "ring, layer, LoRA"),
]
CASES = {f"{row}: {column}": parallel_cell(row, column) for row, column in CELLS}
TWO_RANKS = {"sequence_parallel": 2, "replicas": 1}
QLORA = {"lora": True, "quantized": True, **TWO_RANKS}
CASES |= {
    "DDP, 2 x 2 ranks: GradScaler, clipping": Case(
        engine="ddp", sequence_parallel=2, replicas=2, scaler=True, clip=0.5
    ),
    "FSDP2, 2 ranks: ring, QLoRA": Case(engine="fsdp2", mode="ring", **QLORA),
    "ZeRO-2, 2 ranks: ulysses, QLoRA": Case(zero_stage=2, mode="ulysses", **QLORA),
}


@pytest.fixture(scope="module")
def results(request) -> dict[str, dict]:
    """What every case that a selected test looks at came to, from one launch for each number of processes."""
    tests = [item for item in request.session.items if item.module is request.module]
    names = [item.callspec.params["name"] for item in tests if hasattr(item, "callspec")]
    return run_cases([CASES[name] for name in names] or [CASES["DDP, 2 ranks: ulysses, layer, full"]])


@pytest.mark.parametrize("name", CASES)
def test_the_parameters_of_one_process(results, name):
    judgement = judge(CASES[name], results[CASES[name].name])
    assert judgement.kind == "exact", judgement.text


def test_every_engine_layout_and_way_is_tested():
    assert {name.partition(", ")[2] for name in PARALLEL_ROWS} == {row.partition(", ")[2] for row, _ in CELLS}
    assert {row.partition(",")[0] for row, _ in CELLS} == set(ENGINES)
    for part in range(3):
        assert {column.split(", ")[part] for _, column in CELLS} == {c.split(", ")[part] for c in PARALLEL_COLUMNS}
