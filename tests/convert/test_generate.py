"""`generate` between training steps: the tokens of the unconverted model, and the training after it is unchanged."""

from pathlib import Path

import pytest
import torch
from engine_cases import RANKS
from engines import launch
from generate_worker import CASES, STEPS
from models import (
    CHUNKS,
    CONFIGS,
    LLAMA_CALLS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    checkpointed,
    twins,
)
from parity import ENGINE_CLASSES

from ds_minis import convert_to_mini_sequence


def generate(model, length: int = 17, **settings) -> torch.Tensor:
    prompt = batch(length, padding=0)
    inputs = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)


WAYS = {
    "with cache": {"use_cache": True},
    "without cache": {"use_cache": False},
    "static cache": {"use_cache": True, "cache_implementation": "static"},
    "beams": {"use_cache": True, "num_beams": 2},
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_between_forward_and_backward(way, mode, scope, tiled_calls):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    tokens, grads = [], []
    for m in (model, reference):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.2)
        found = []
        for step in range(2):
            found.append(generate(getattr(m, mode)(), **WAYS[way]))
            tiled_calls.clear()
            loss = m.train()(**batch(23, seed=step)).loss
            assert len(tiled_calls) == (sum(LLAMA_CALLS[scope].values()) if m is model else 0)
            found.append(generate(getattr(m, mode)(), 23, **WAYS[way]))
            assert m.training == (mode == "train")
            m.train()
            loss.backward()
            found.append(generate(m, **WAYS[way]))
            grads.append({n: p.grad.clone() for n, p in m.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
        tokens.append(found)
    assert all(torch.equal(*pair) for pair in zip(*tokens, strict=True))
    assert any(not torch.equal(tokens[0][0], other) for other in tokens[0][3::3])  # training changed something
    for ours, plain in zip(grads[:2], grads[2:], strict=True):
        assert_same_tensors(ours, plain)
    assert_same_training(model, reference, batch(23))


@pytest.mark.parametrize("settings", [{}, {"tile_inference": True}], ids=["default", "tiled inference"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_generates_the_same_and_trains_on(family, settings):
    model, reference = (checkpointed(add_lora(m)) for m in twins(family))
    convert_to_mini_sequence(model, {**CHUNKS, **settings})
    for _ in range(2):
        assert torch.equal(*(generate(m, use_cache=True) for m in (model, reference)))
        assert_same_training(model, reference, batch(23))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    output = tmp_path_factory.mktemp("generate")
    launch(Path(__file__).parents[1] / "generate_worker.py", str(output))
    return {case.name: [torch.load(output / f"{case.name}-{rank}.pt") for rank in range(RANKS)] for case in CASES}


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generate_under_an_engine_with_prompts_that_differ(results, case):
    lengths = set()
    for result in results[case.name]:
        ours, plain = result["converted"], result["plain"]
        for run in (ours, plain):
            assert run["engine"].startswith(ENGINE_CLASSES[case.engine]) and run["processes"] == RANKS
            assert run["zero_stage"] == case.zero_stage
        assert ours["tiled"] and all(ours["tiled"]) and not plain["tiled"]
        assert len(ours["tokens"]) == 2 * STEPS
        assert all(torch.equal(*pair) for pair in zip(ours["tokens"], plain["tokens"], strict=True))
        torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(plain["losses"]), rtol=1e-5, atol=0)
        assert_same_tensors(ours["params"], plain["params"])
        lengths.add(tuple(t.shape[1] for t in ours["tokens"]))
    assert len(lengths) == RANKS
