"""Adapters of a converted model: merged, unloaded, switched off, added and switched, it equals the unconverted twin."""

import os
import subprocess
import sys

import pytest
import torch
from models import CHUNKS, LLAMA_CALLS, VOCAB_SIZE, add_lora, assert_same_training, batch, build, checkpointed, twins
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.tiling.modules.tiled_module import TiledModule

INPUTS = batch(23, prompt=2, padding=3)
SETTINGS = {"all-linear": {}, "adapted head": {"target_modules": ["lm_head", "down_proj", "q_proj"]}}


@pytest.fixture(params=SETTINGS)
def pair(request, scope, tiled_calls):
    """A converted adapted model, and its unconverted twin."""
    model, reference = (add_lora(m, **SETTINGS[request.param]) for m in twins("llama"))
    yield convert_to_mini_sequence(model, {**CHUNKS, "scope": scope}), reference
    num_calls = sum(LLAMA_CALLS[scope].values())  # of every forward pass that was compared last
    assert len(tiled_calls) >= num_calls and sum(isinstance(m, TiledModule) for m in model.modules()) == 7


def assert_same(model, reference):
    assert_same_training(model, reference, INPUTS)
    weights, expected = model.state_dict(), reference.state_dict()
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, msg=name)


def both(models, action):
    return [action(m) for m in models]


def test_merge_and_unmerge_in_place(pair):
    assert_same(*pair)
    both(pair, lambda m: m.merge_adapter())
    assert_same_training(*both(pair, lambda m: m.requires_grad_(True)), INPUTS)
    both(pair, lambda m: m.unmerge_adapter())
    assert_same(*pair)


def test_unloaded_without_merging(pair):
    model, reference = both(pair, lambda m: m.unload())
    both((model, reference), lambda m: m.requires_grad_(True))
    assert_same(model, reference)


def test_switched_off_for_a_while(pair):
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        losses = [m(**INPUTS).loss for m in pair]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert_same(*pair)
    assert abs(losses[0] - pair[0](**INPUTS).loss) > 1e-3


def test_a_second_adapter_is_added_switched_to_and_deleted(pair):
    def add(model):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        model.set_adapter("second")

    losses = [pair[0](**INPUTS).loss]
    both(pair, add)
    assert_same(*pair)
    losses.append(pair[0](**INPUTS).loss)
    both(pair, lambda m: m.set_adapter("default"))
    assert_same(*pair)
    losses.append(pair[0](**INPUTS).loss)
    both(pair, lambda m: m.base_model.set_adapter(["default", "second"]))
    assert_same(*pair)
    both(pair, lambda m: m.base_model.set_adapter("default"))
    both(pair, lambda m: m.delete_adapter("second"))
    assert_same(*pair)
    assert abs(losses[0] - losses[1]) > 1e-3 and losses[0] == losses[2]


LOAD = """
import sys
assert "ds_minis" not in sys.modules
sys.modules["ds_minis"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
torch.save(model(torch.arange(1, 24)[None]).logits.detach(), sys.argv[2])
"""


def test_merged_it_is_tiled_trains_and_loads_in_plain_transformers(pair, scope, tiled_calls, tmp_path):
    assert_same(*pair)
    model, reference = both(pair, lambda m: m.merge_and_unload())
    both((model, reference), lambda m: m.requires_grad_(True))
    tiled_calls.clear()
    assert_same(model, reference)
    assert len(tiled_calls) == sum(LLAMA_CALLS[scope].values())
    for m in (model, reference):
        with torch.no_grad():
            for param in m.parameters():
                param.sub_(0.01 * param.grad)
    model.save_pretrained(tmp_path / "ours"), reference.save_pretrained(tmp_path / "plain")
    ours, plain = (load_file(tmp_path / kind / "model.safetensors") for kind in ("ours", "plain"))
    assert ours.keys() == plain.keys()
    script, logits = tmp_path / "load.py", tmp_path / "logits.pt"
    script.write_text(LOAD)
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "ours"), str(logits)],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, check=True, timeout=300,
    )  # fmt: skip
    expected = reference.eval()(torch.arange(1, 24)[None]).logits
    assert expected.shape == (1, 23, VOCAB_SIZE)
    torch.testing.assert_close(torch.load(logits), expected.detach(), rtol=1e-5, atol=1e-5)
    # Not to the bit: products depend on where in memory their operands begin, on some processors.
    expected = model.eval()(torch.arange(1, 24)[None]).logits.detach()
    torch.testing.assert_close(torch.load(logits), expected, rtol=1e-5, atol=1e-5)


def test_adapter_files_are_those_of_the_unconverted_model(pair, tmp_path):
    assert_same(*pair)
    for model, kind in zip(pair, ("ours", "plain"), strict=True):
        model.save_pretrained(tmp_path / kind)
    assert {f.name for f in (tmp_path / "ours").iterdir()} == {f.name for f in (tmp_path / "plain").iterdir()}
    ours, plain = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("ours", "plain"))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in plain)
    config = [(tmp_path / kind / "adapter_config.json").read_text() for kind in ("ours", "plain")]
    assert config[0] == config[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_adapters_of_experts(first, checkpointing):
    """PEFT parametrizes the experts' weights for each call: the experts are run as a whole then, and the rest is tiled."""
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    models = []
    for converted in (True, False):
        model = build("mixtral")
        if converted and first == "convert":
            convert_to_mini_sequence(model, CHUNKS)
        model = get_peft_model(model, config)
        with torch.no_grad():
            torch.manual_seed(1)
            for name, param in model.named_parameters():
                if "lora_" in name:
                    param.normal_(0, 0.1)
        if converted and first == "adapt":
            convert_to_mini_sequence(model, CHUNKS)
        models.append(checkpointed(model) if checkpointing else model)
    assert any("experts" in name and p.requires_grad for name, p in models[0].named_parameters())
    assert_same_training(*models, batch(23))
    report = mini_sequence_report(models[0])
    assert set(report.tiled.values()) == {"MixtralRMSNorm"} and report.loss.startswith("tiled")
    assert len([name for name in report.untiled if ".experts" in name]) == 2
