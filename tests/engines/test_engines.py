"""Engines for real, two gloo processes: parameters after 4 steps equal the unconverted run's and a one-process run's.

A part of the matrix of `scripts/parity_matrix.py`, and cases beside it. Each rank has other lengths and another number of
chunks; labels of prompts are masked.
"""

import pytest
from engine_cases import NUM_LAYERS, RANKS, STEPS, Case, make_model
from engines import run_cases
from parity import COLUMNS, ROWS, cell, judge

pytestmark = pytest.mark.engine
CELLS = [  # every row and every column of the matrix, and what once was wrong under one engine only
    *((row, "full") for row in ROWS),
    *((row, "LoRA") for row in ROWS),
    *(("ZeRO-3", column) for column in COLUMNS if not column.startswith("dropout")),
    *(("ZeRO-2", column) for column in ("uneven lengths", "one rank masked", "tied embeddings", "bf16")),
    *(("FSDP2", column) for column in ("LoRA, LM head saved", "tied embeddings", "QLoRA", "no checkpointing")),
    *(("FSDP1, use_orig_params=True", column) for column in ("LoRA on LM head", "uneven lengths", "QLoRA")),
    *(("DDP", column) for column in ("reentrant checkpointing", "dropout 0.1")),
    ("FSDP1, use_orig_params=False", "gradient clipping"),
    ("ZeRO-2, optimizer offloaded", "accumulation 4"),
    ("ZeRO-3, all offloaded", "gradient clipping"),
    ("ZeRO-0", "gradient clipping"),
]
SETTINGS = {
    "head groups and host memory, ZeRO-3": Case(zero_stage=3, head_groups="auto", offload_inputs="cpu", uneven=True),
    "head groups and host memory, FSDP2, LoRA": Case(
        engine="fsdp2", lora=True, head_groups="auto", offload_inputs="cpu"
    ),
    "head groups, FSDP1": Case(engine="fsdp1", head_groups="auto", offload_inputs="cpu"),
    "head groups, flat FSDP1": Case(engine="fsdp1_flat", head_groups=2),
    "head groups and host memory, DDP": Case(engine="ddp", head_groups="auto", offload_inputs="cpu", uneven=True),
    "attention kept in host memory, ZeRO-3": Case(zero_stage=3, keep="attention", offload_inputs="cpu", uneven=True),
    "attention kept in host memory, FSDP2, LoRA": Case(
        engine="fsdp2", lora=True, keep="attention", offload_inputs="cpu"
    ),
    "attention kept, FSDP1": Case(engine="fsdp1", keep="attention", uneven=True),
    "products kept, ZeRO-2": Case(zero_stage=2, keep="matmuls", uneven=True),
    "products kept, ZeRO-3, LoRA": Case(zero_stage=3, keep="matmuls", lora=True),
    "products kept, FSDP2": Case(engine="fsdp2", keep="matmuls", uneven=True),
    "products kept, FSDP1": Case(engine="fsdp1", keep="matmuls"),
    "all kept, ZeRO-2": Case(zero_stage=2, keep="mixed", uneven=True),
    "all kept, ZeRO-3": Case(zero_stage=3, keep="mixed", uneven=True),
    "all kept, ZeRO-3, LoRA": Case(zero_stage=3, keep="mixed", lora=True),
    "all kept, FSDP2": Case(engine="fsdp2", keep="mixed", uneven=True),
    "all kept, FSDP2, LoRA": Case(engine="fsdp2", keep="mixed", lora=True),
    "all kept, FSDP1": Case(engine="fsdp1", keep="mixed"),
    "all kept, FSDP1, flat": Case(engine="fsdp1_flat", keep="mixed"),
    "all kept, DDP, QLoRA": Case(engine="ddp", keep="mixed", quantized=True, lora=True),
    "free memory, ZeRO-2": Case(zero_stage=2, keep="free", uneven=True),
    "free memory, ZeRO-3": Case(zero_stage=3, keep="free", uneven=True),
    "free memory, FSDP2, LoRA": Case(engine="fsdp2", keep="free", lora=True, uneven=True),
    "all kept, DDP, MoE": Case("mixtral without router outputs", engine="ddp", keep="mixed"),
    "attention kept, DDP, reentrant": Case(engine="ddp", keep="attention", reentrant=True),
}
PEFT_POLICY = Case(engine="fsdp1_peft", lora=True)
CASES = {
    **{f"{row}: {column}": cell(row, column) for row, column in dict.fromkeys(CELLS)},
    "gemma2": Case(family="gemma2", zero_stage=3),
    "experts, ZeRO-3": Case(family="mixtral", zero_stage=3),
    "experts, ZeRO-2": Case(family="qwen2_moe", zero_stage=2, uneven=True),
    "experts, FSDP2": Case(family="mixtral", engine="fsdp2"),
    "layers with experts, ZeRO-3": Case(family="mixtral without router outputs", zero_stage=3, uneven=True),
    "modules, ZeRO-3": Case(scope="tokens", zero_stage=3, uneven=True),
    "modules, ZeRO-2": Case(scope="tokens", zero_stage=2),
    "modules, FSDP1": Case(scope="tokens", engine="fsdp1"),
    "modules, FSDP2": Case(scope="tokens", engine="fsdp2", lora=True),
    "modules, DDP": Case(scope="tokens", engine="ddp", checkpointing=False),
    "qwen3": Case(engine="fsdp2", checkpointing=False, family="qwen3"),
    "what TRL makes of ZeRO-3 with PEFT": Case(zero_stage=3, lora=True, reentrant=True),
    "what the Trainer makes of FSDP1 with PEFT": Case(engine="fsdp1_trainer", lora=True, lora_head=True, uneven=True),
    "loss of the logits, DDP": Case(engine="ddp", loss="logits", uneven=True),
    "loss of the logits, FSDP2": Case(engine="fsdp2", loss="logits", uneven=True),
    "loss of the logits, FSDP2, a head beside LoRA": Case(engine="fsdp2", loss="logits", lora=True, save_head=True),
    "loss of the logits, FSDP1": Case(engine="fsdp1", loss="logits"),
    "loss of the logits, ZeRO-2": Case(zero_stage=2, loss="logits", uneven=True),
    "loss of the logits, ZeRO-3": Case(zero_stage=3, loss="logits", uneven=True),
    "loss of the logits, ZeRO-3, LoRA on the head": Case(zero_stage=3, loss="logits", lora=True, lora_head=True),
    "loss of the logits, FSDP2, a frozen head": Case(engine="fsdp2", loss="logits", lora=True, uneven=True),
    "loss of the logits, ZeRO-3, a frozen head": Case(zero_stage=3, loss="logits", lora=True, uneven=True),
    "accumulation and a rank that is masked": Case(zero_stage=3, masked_rank=0),
    **SETTINGS,
    "LoRA dropout": Case(engine="ddp", lora=True, dropout=0.1, accumulation=1, seeds=24),
}
REFUSED = ["FSDP1, use_orig_params=False: LoRA"]


@pytest.fixture(scope="module")
def results(request) -> dict[str, dict]:
    """What every case that a selected test looks at came to, from few launches."""
    tests = [item for item in request.session.items if item.module is request.module]
    names = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    cases = {case for name, case in CASES.items() if name in names}
    if not all(hasattr(item, "callspec") for item in tests):
        cases |= {PEFT_POLICY, CASES["DDP: full"]}
    # Those that end their processes come last; cases of one kind together, in the same order each time.
    return run_cases(sorted(cases, key=lambda case: (case.engine.startswith("fsdp1_"), case.lora, case.name)))


@pytest.mark.parametrize("name", CASES)
def test_the_unconverted_models_parameters_or_its_refusal(results, name):
    judgement = judge(CASES[name], results[CASES[name].name])
    assert judgement.kind == ("refused" if name in REFUSED else "exact"), judgement.text


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loss == "logits"])
def test_no_engine_makes_all_logits(results, name):
    """FSDP2 asks whether they are a view. FSDP1 cannot gather the head again, and logits are all there."""
    said = results[CASES[name].name]["converted"]["last_loss"]
    assert said == ("" if CASES[name].engine == "fsdp1" else "by chunks (gather, cross_entropy, logsumexp)")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keep == "attention"])
def test_attentions_are_kept_in_every_step(results, name):
    case = CASES[name]
    assert results[case.name]["converted"]["kept_attentions"] == NUM_LAYERS * STEPS * case.accumulation


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keep == "mixed"])
def test_one_rank_keeps_more_layers_than_the_other(results, name):
    case = CASES[name]
    first, last = results[case.name]["converted"]["kept_layers"]
    calls = NUM_LAYERS * STEPS * case.accumulation
    # bitsandbytes holds weights by itself, which an engine might free: refused on several processes. gloo's thread may do so
    # for a moment after a gather; such a call keeps its input.
    assert (last < first and calls - 4 <= first <= calls) or (case.quantized and first == last == 0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keep == "free"])
def test_free_memory_is_used_once_a_step_was_seen(results, name):
    """On either rank, whose first micro batch has the most tokens."""
    case = CASES[name]
    most = NUM_LAYERS * (STEPS * case.accumulation - 1)
    assert all(most - 4 <= kept <= most for kept in results[case.name]["converted"]["kept_layers"])


def test_every_row_and_every_column_is_tested():
    assert {row for row, _ in CELLS} == set(ROWS) and {column for _, column in CELLS} == set(COLUMNS)


def test_adapters_that_fsdp1_wraps_one_by_one_are_refused_with_the_reason(results):
    """By PEFT's own policy; each chunk would gather them. The unconverted model trains."""
    result = results[PEFT_POLICY.name]
    assert all(loss == loss for loss in result["plain"]["losses"])
    assert result["converted"]["ranks_with_error"] == RANKS
    assert "FullyShardedDataParallel was applied to gate_proj.lora_A.default" in result["converted"]["error"]
    assert "use_orig_params=True" in result["converted"]["error"]


def test_training_changed_the_parameters(results):
    """Or all of the above would hold for an engine that does nothing."""
    case = CASES["DDP: full"]
    before = {n: p.detach() for n, p in make_model(case).named_parameters()}
    after = results[case.name]["converted"]["params"]
    assert all((after[n] - before[n]).abs().max() > 1e-3 for n in before)
