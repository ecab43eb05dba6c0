"""Sequence parallelism on real processes: losses and gradients are those of one process on all batches.

All cases run in one start of four processes (sequence_worker.py). The sum of gradients over all ranks, divided by their
number, is what every engine makes of them.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOLERANCE = 1e-5
GRID = {"ulysses": 2, "ring": 2}
LONGROPE = {  # other frequencies for more than 32 tokens, which rank 1 of 2 does not see of 36
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 5.0, 4.0],
    },
}  # fmt: skip


def case(name: str, mode="gather", size: int = 2, length: int = 38, family: str = "llama", **more) -> dict:
    return {"name": name, "mode": mode, "size": size, "length": length, "family": family, **more}


CASES = [
    *(case(f"{mode}, {size} ranks", mode, size) for mode in ("gather", "ulysses", "ring") for size in (2, 4)),
    *(case(f"scope {scope}", "gather", settings={"scope": scope}) for scope in ("mlp", "tokens")),
    case("a grid of 2 x 2", GRID, 4),
    case("a grid of 2 x 2, packed documents", GRID, 4, rows="packed"),
    *(
        case(f"{mode}: a sliding window is not dropped", mode, 4, family="mistral")
        for mode in ("gather", "ulysses", "ring")
    ),
    *(
        case(f"{mode}: softcaps and windows of every other layer", mode, family="gemma2")
        for mode in ("gather", "ulysses", "auto")
    ),
    *(
        case(f"{mode}: documents of a packed row do not see each other", mode, 4, rows="packed")
        for mode in ("gather", "ulysses", "ring")
    ),
    *(
        case(f"{mode}: packed documents and a window", mode, 2, family="mistral", rows="packed")
        for mode in ("gather", "ring")
    ),
    *(case(f"{mode}: padding on the left", mode, rows="left") for mode in ("gather", "ulysses", "ring")),
    *(case(f"{mode}: padding on the right", mode, rows="right") for mode in ("gather", "ulysses", "ring")),
    *(
        case(f"a sequence of {length} tokens on {size} ranks", "gather", size, length)
        for size, length in ((2, 3), (4, 7), (4, 8))
    ),
    case("a sequence of 1 token", "ring", 4, 1, rows="shift_labels"),
    case("a sequence of odd length", "ring", 4, 41),
    case("one KV head, on four ranks by their heads", "ulysses", 4, config={"num_key_value_heads": 1}),
    case("one KV head, on four ranks", "gather", 4, config={"num_key_value_heads": 1}),
    case("the shard of a rank has no labels", "gather", 4, rows="a shard without labels"),
    case("a group has no labels", "gather", 2, rows="a group without labels"),
    case("no group has labels", "gather", 2, rows="no labels anywhere"),
    case("the number of labels is given", "ring", 2, rows="num_items_in_batch"),
    case("labels that are shifted already", "gather", 2, rows="shift_labels"),
    case("the model's own loss function", "gather", 2, own_loss=True),
    case("a trainer's own loss", "ring", 2, trainer=True),
    case("all logits are asked for", "gather", 2, settings={"return_logits": True}),
    case("the loss is not tiled", "ring", 2, settings={"loss": False}),
    case("groups of heads", "gather", 2, settings={"head_groups": "auto"}),
    case("groups of heads in a ring", "ring", 2, settings={"head_groups": 2}),
    case("layer inputs in host memory", "ring", 2, settings={"offload": "cpu"}),
    *(
        case(f"{mode}: attention is kept", mode, 2, settings={"keep": "attention"})
        for mode in ("gather", "ulysses", "ring")
    ),
    case("products are kept", "ring", 2, settings={"keep": "matmuls"}),
    case("adapters", "auto", 2, lora=True),
    case("adapters, scope mlp, checkpointed", "ring", 2, lora=True, checkpointing=True, settings={"scope": "mlp"}),
    case("plain layers, checkpointed", "gather", 2, checkpointing=True, settings={"scope": "tokens"}),
    case("tied embeddings", "gather", 2, family="llama-tied-bias"),
    case("norms of queries and keys", "ring", 2, family="qwen3"),
    *(case(f"{mode} under autocast", mode, 2, autocast=True, tolerance=0.05) for mode in ("gather", "ring")),
    case("frequencies of the whole length", "gather", 2, 36, "phi3", config=LONGROPE),
]
REFUSED = {
    "other batches in a group": (
        {"other_batches": True},
        r"Refused: sequence_parallel: ranks \d and \d of one group were given different batches",
    ),
    "other labels in a group": ({"other_labels": True}, r"of one group were given different batches"),
    "a group's batches in another order": ({"rows_swapped": True}, r"of one group were given different batches"),
    "masks of one's own": (
        {"four_dimensions": True},
        r"attention_mask is a Tensor of shape .* allowed: \(batch, tokens\)",
    ),
    "documents with a cache": ({"packed_with_cache": True}, r"position_ids begin again .* Give use_cache=False"),
    "router logits": ({"arguments": {"output_attentions": True}}, r"output_attentions=True .* leave it out"),
    "a size that does not divide the world": (
        {"size": 3},
        r"ValueError: convert_to_mini_sequence: sequence_parallel: 4 processes cannot be divided into groups of 3; allowed",
    ),
    "a layer that looks at the token before": (
        {"mixing": True},
        r"cannot run on a part of the sequence: .*depend on others",
    ),
}
CASES += [{**case(name, rows=""), "refused": True, **more} for name, (more, _) in REFUSED.items()]


TRL = [
    *(case(f"TRL's call, {size} ranks", "gather", size, fused=True) for size in (2, 4)),
    case("TRL's call, labels that are shifted already", "ring", 2, 41, rows="shift_labels", fused=True),
    case("TRL's call, the loss is left alone", "gather", 2, settings={"loss": False}, fused=True),
]
CASES += TRL if importlib.util.find_spec("trl") else []
TOLERANCES = {c["name"]: c.get("tolerance", TOLERANCE) for c in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sequence")
    (folder / "cases.json").write_text(json.dumps(CASES))
    done = subprocess.run(
        [sys.executable, str(HERE / "sequence_worker.py"), str(folder / "cases.json"), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", [c["name"] for c in CASES if not c.get("refused")])
def test_equals_one_process(name, ranks):
    for rank, results in enumerate(ranks):
        found = results[name]
        assert "error" not in found, found["error"]
        assert found["wrong"] <= TOLERANCES[name], f"rank {rank}: {found['where']} {found['wrong']}"
        assert max(found.get("evaluation", 0), found.get("shifted", 0)) <= TOLERANCE and found["whole"] == 0
        assert found.get("hidden_states", 0) <= TOLERANCE


@pytest.mark.parametrize("trl", TRL[:3], ids=lambda trl: trl["name"])
def test_the_heads_work_for_trls_call_is_divided(trl, ranks):
    pytest.importorskip("trl")
    for found in (results[trl["name"]] for results in ranks):
        assert 1 / trl["size"] <= found["rows"] < 1.3 / trl["size"]  # with the padding of the cut


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name, ranks):
    for results in ranks:
        assert re.search(REFUSED[name][1], results[name]), results[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("the number of labels is given", "mode ring; attention by ring"),
        ("ring, 4 ranks", "each sequence on 4 ranks, mode ring; attention by ring"),
        ("ring: padding on the left", "attention by gather (the batch has padding on the left)"),
        ("ulysses: softcaps and windows of every other layer", "mode ulysses; attention by ulysses"),
        ("auto: softcaps and windows of every other layer", "mode auto; attention by "),
        ("a grid of 2 x 2", "mode 2 x 2; attention by hybrid"),
    ],
)
def test_the_report_says_how_the_attention_ran(name, words, ranks):
    assert words in ranks[0][name]["report"]
