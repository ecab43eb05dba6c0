import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from models import (
    CONFIGS,
    MOE_CONFIGS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    checkpointed,
    twins,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ds_minis import MiniSequenceConfig, convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence
from ds_minis.layer.tiled.tiled_layer import TiledLayer
from ds_minis.tiling.modules.tiled_module import TiledModule

SMALL_CHUNKS = {"chunk_size": 5, "loss_chunk_size": 4}
INPUTS = batch(13, prompt=2, padding=3)
LAYERS = {f"model.layers.{i}" for i in range(2)}
MLPS = {f"{layer}.mlp" for layer in LAYERS}
LORA = {
    "all-linear": {},
    "saved head": {"modules_to_save": ["lm_head"]},
    "adapted head": {"target_modules": ["lm_head", "down_proj", "q_proj"]},
}


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def tiled_names(model, kind: type[nn.Module] = TiledModule) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def named(model, *ends: str) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__.endswith(ends)}


def snapshot(model) -> dict:
    """Class and attributes of every module; dictionaries (parameters, hooks) copied, so that additions show."""
    return {
        name: (type(m), {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize(("settings", "layers"), [({}, LAYERS), ({"scope": "tokens"}, set())])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_layer_feed_forward_module_and_norm_is_tiled_and_nothing_else(family, settings, layers):
    model = build(family)
    mlps, norms = named(model, "MLP"), named(model, "Norm")
    norms_per_layer = {"qwen3": 4, "gemma2": 4}.get(family, 2)
    assert (len(mlps), len(norms)) == (2, 2 * norms_per_layer + 1) and "model.norm" in norms
    assert convert_to_mini_sequence(model, {**SMALL_CHUNKS, **settings}) is model
    assert tiled_names(model) == mlps | norms and tiled_names(model, TiledLayer) == layers


def test_scope_mlp_tiles_the_feed_forward_modules_alone():
    model = convert_to_mini_sequence(build("qwen3"), {"scope": "mlp"})
    report = mini_sequence_report(model)
    assert tiled_names(model) == set(report.tiled) == MLPS
    assert not report.layers and not tiled_names(model, TiledLayer)
    assert report.untiled["model.norm"] == ("Qwen3RMSNorm", 'outside of scope "mlp"')
    assert report.untiled["model.layers.1.self_attn.q_norm"] == ("Qwen3RMSNorm", 'outside of scope "mlp"')


@pytest.mark.parametrize(
    ("settings", "tiled"),
    [
        ({"include": ["*.mlp"]}, MLPS),
        ({"include": ["model.layers.0.*"], "exclude": ["*_layernorm"]}, {"model.layers.0.mlp"}),
        ({"include": ["layers.1.mlp"]}, {"model.layers.1.mlp"}),
        ({"include": ["mlp", "norm"], "exclude": ["layers.0.*"]}, {"model.layers.1.mlp", "model.norm"}),
        ({"include": ["*.mlp"], "exclude": ["*"]}, set()),
        ({"scope": "mlp", "exclude": ["*.layers.0.*"]}, {"model.layers.1.mlp"}),
    ],
)
def test_include_and_exclude_match_the_name_or_its_end(settings, tiled):
    model = convert_to_mini_sequence(build("llama"), {"scope": "tokens", **settings})
    report = mini_sequence_report(model)
    assert tiled_names(model) == set(report.tiled) == tiled
    reasons = {reason for name, (_, reason) in report.untiled.items() if not name.endswith("self_attn")}
    assert reasons <= {"not in include", "in exclude", 'outside of scope "mlp"'}
    assert len(report.tiled) + len(report.untiled) == 2 + 2 + 5  # no part is left out of the report


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"include": ["model.layers.0"]}, {"model.layers.0"}),  # with its parts, which no pattern names
        ({"include": ["*.layers.*", "model.norm"]}, LAYERS),
        ({"include": ["*.mlp"]}, set()),
        ({"exclude": ["*.layers.1"]}, {"model.layers.0"}),
        ({"exclude": ["layers.1.mlp"]}, {"model.layers.0"}),
        ({"exclude": ["layers.0.self_attn"]}, {"model.layers.1"}),
    ],
)
def test_include_and_exclude_for_layers(settings, layers):
    model, reference = twins("llama")
    report = mini_sequence_report(convert_to_mini_sequence(model, {**SMALL_CHUNKS, **settings}))
    assert tiled_names(model, TiledLayer) == set(report.layers) == layers
    reasons = {report.untiled[layer][1] for layer in LAYERS - layers}
    assert reasons <= {"not in include", "in exclude", "as a whole: a part of it is left out"}
    assert_same_training(model, reference, INPUTS)


def test_patterns_hold_for_a_model_in_a_wrapper_too():
    model = convert_to_mini_sequence(add_lora(build("llama")), {"include": ["model.layers.0.mlp"]})
    assert tiled_names(model) == {"base_model.model.model.layers.0.mlp"}


def test_module_filter_decides_about_each_tileable_module():
    model, seen = build("llama"), {}

    def keep(module, fqn):
        seen[fqn] = module
        return fqn != "model.layers.1.mlp"

    convert_to_mini_sequence(model, {"scope": "tokens", "exclude": ["*norm"]}, module_filter=keep)
    assert seen == {name: model.get_submodule(name) for name in MLPS}
    assert tiled_names(model) == {"model.layers.0.mlp"}
    assert mini_sequence_report(model).untiled["model.layers.1.mlp"] == ("LlamaMLP", "left out by module_filter")
    revert_mini_sequence(model)
    convert_to_mini_sequence(model, module_filter=keep)
    report = mini_sequence_report(model)
    assert seen.keys() >= LAYERS and set(report.layers) == {"model.layers.0"}
    assert report.untiled["model.layers.1"] == ("LlamaDecoderLayer", "as a whole: a part of it is left out")


def test_report_tells_what_is_tiled_what_is_not_and_why():
    settings = {**SMALL_CHUNKS, "scope": "tokens", "exclude": ["model.norm"]}
    report = mini_sequence_report(convert_to_mini_sequence(build("qwen3"), settings))
    assert report.config == MiniSequenceConfig(**settings)
    assert report.source == "convert_to_mini_sequence"
    assert len(report.tiled) == 10 and report.tiled["model.layers.0.self_attn.k_norm"] == "Qwen3RMSNorm"
    attention = {f"model.layers.{i}.self_attn": ("Qwen3Attention", "mixes tokens") for i in range(2)}
    assert report.untiled == {**attention, "model.norm": ("Qwen3RMSNorm", "in exclude")}
    for line in (
        "ds_minis (convert_to_mini_sequence): {'scope': 'tokens', 'chunk_size': 5, 'loss_chunk_size': 4, "
        "'exclude': ['model.norm']}",
        "  tiled: 8 x Qwen3RMSNorm",
        "  tiled: 2 x Qwen3MLP",
        "  not tiled: 2 x Qwen3Attention (mixes tokens)",
        "  not tiled: 1 x Qwen3RMSNorm (in exclude)",
        "  loss: tiled, LM head Linear; with labels, the output has no `logits` (return_logits brings them back); without, "
        "they are computed as far as a loss reads them",
    ):
        assert line in str(report).splitlines()


def test_report_tells_which_layers_are_tiled_and_what_is_there_where_they_are_not():
    report = mini_sequence_report(convert_to_mini_sequence(build("qwen3"), {**SMALL_CHUNKS, "exclude": ["layers.1"]}))
    assert report.layers == {"model.layers.0": "Qwen3DecoderLayer"} and len(report.tiled) == 11
    attention = {"model.layers.1.self_attn": ("Qwen3Attention", "mixes tokens")}
    assert report.untiled == {"model.layers.1": ("Qwen3DecoderLayer", "in exclude"), **attention}
    for line in (
        "  tiled as a whole: 1 x Qwen3DecoderLayer",
        "  tiled: 5 x Qwen3RMSNorm",
        "  tiled: 1 x Qwen3MLP",
        "  tiled where their layer is not: 4 x Qwen3RMSNorm",
        "  tiled where their layer is not: 1 x Qwen3MLP",
        "  not tiled: 1 x Qwen3DecoderLayer (in exclude)",
        "  not tiled: 1 x Qwen3Attention (mixes tokens)",
    ):
        assert line in str(report).splitlines()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "tiled, LM head Linear"), ({"loss": False}, "loss is off"), ({"return_logits": True}, "asks for all logits")],
)
def test_report_tells_what_becomes_of_the_loss(settings, words):
    assert words in mini_sequence_report(convert_to_mini_sequence(build("llama"), settings)).loss


@pytest.mark.parametrize("modules_to_save", ["model.norm", "layers.0.post_attention_layernorm"])
def test_a_norm_that_peft_trains_is_tiled_or_reported_with_a_true_reason(modules_to_save):
    model, reference = (add_lora(m, modules_to_save=[modules_to_save]) for m in twins("llama"))
    report = mini_sequence_report(convert_to_mini_sequence(model, SMALL_CHUNKS))
    assert_same_training(model, reference, INPUTS)
    wrapper = f"base_model.model.model.{modules_to_save.removeprefix('model.')}"
    told = {name: value for name, value in {**report.tiled, **report.untiled}.items() if name.startswith(wrapper)}
    assert told and "mixes tokens" not in str(told)


def test_bare_decoder_is_tiled_without_a_loss():
    model, reference = (m.model for m in twins("llama"))
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    assert "layers.0.mlp" in tiled_names(model) and len(tiled_names(model)) == 7
    assert "no module here has an LM head" in mini_sequence_report(model).loss
    inputs = {key: INPUTS[key] for key in ("input_ids", "attention_mask")}
    for m in (model, reference):
        m(**inputs).last_hidden_state.square().sum().backward()
    assert_same_tensors(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)))


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.output = self.model(input_ids, attention_mask=attention_mask, labels=labels)
        return self.output


def test_a_wrapper_that_passes_labels_on_never_sees_deferred_logits():
    model, reference = map(Wrapper, twins("gemma2"))
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    assert_same_training(model, reference, INPUTS)
    assert set(model.output) == {"loss"}


@pytest.mark.parametrize(("rank", "times"), [(None, 1), ("0", 1), ("1", 0), ("7", 0)])
def test_report_is_printed_once_and_on_rank_0_alone(monkeypatch, capsys, rank, times):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    model = convert_to_mini_sequence(build("llama"), SMALL_CHUNKS)
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    assert capsys.readouterr().out == f"{mini_sequence_report(model)}\n" * times


@pytest.mark.parametrize("again", [None, True, {}, {"scope": "layer"}, MiniSequenceConfig()])
def test_second_conversion_with_the_same_settings_changes_and_prints_nothing(capsys, again):
    model = convert_to_mini_sequence(build("llama"))
    before = snapshot(model)
    capsys.readouterr()
    assert convert_to_mini_sequence(model, again) is model
    assert snapshot(model) == before and capsys.readouterr().out == ""


@pytest.mark.parametrize("wrap", [lambda model: model, add_lora], ids=["model", "adapted"])
@pytest.mark.parametrize(
    "other", [False, {"chunk_size": 3}, {**SMALL_CHUNKS, "scope": "mlp"}, {**SMALL_CHUNKS, "scope": "tokens"}]
)
def test_second_conversion_with_other_settings_shows_both(wrap, other):
    model = wrap(convert_to_mini_sequence(build("llama"), SMALL_CHUNKS))
    with pytest.raises(ValueError, match="different mini-sequence settings") as error:
        convert_to_mini_sequence(model, other)
    one, two = (MiniSequenceConfig.from_value(settings).to_dict() for settings in (SMALL_CHUNKS, other))
    for settings in (one, two):
        shown = {key: value for key, value in settings.items() if one[key] != two[key]}
        assert shown and f"convert_to_mini_sequence: {shown}\n" in str(error.value)
    assert "revert_mini_sequence" in str(error.value)
    assert mini_sequence_report(model).config == MiniSequenceConfig(**SMALL_CHUNKS)


@pytest.mark.parametrize("off", [False, {"enabled": False, **SMALL_CHUNKS}, MiniSequenceConfig(enabled=False)])
def test_switched_off_leaves_everything_alone_and_is_remembered(capsys, off):
    model = build("llama")
    before = snapshot(model)
    assert convert_to_mini_sequence(model, off) is model and convert_to_mini_sequence(model, off) is model
    after, report = snapshot(model), mini_sequence_report(model)
    assert capsys.readouterr().out == "" and not tiled_names(model)
    assert after[""][1].pop("_mini_sequence") is report and after == before
    assert report.config == MiniSequenceConfig.from_value(off) and not report.tiled and "off" in report.loss
    with pytest.raises(ValueError, match="different mini-sequence settings"):
        convert_to_mini_sequence(model, True)
    assert snapshot(revert_mini_sequence(model)) == before


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda: nn.Linear(2, 2), None, ["Linear", "the defaults", "No list of layers with an attention module"]),
        (
            lambda: build("llama"),
            {"include": ["*.self_attn"], "loss": False},
            ["self_attn", "2 x LlamaMLP: not in include"],
        ),
        (lambda: build("llama"), {"exclude": ["*"], "loss": False}, ["5 x LlamaRMSNorm: in exclude"]),
        (lambda: build("llama").model, {"exclude": ["*"]}, ["LlamaModel", "2 x LlamaAttention: mixes tokens"]),
    ],
)
def test_nothing_to_tile_is_an_error_that_helps(make, settings, words):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^convert_to_mini_sequence: nothing in ") as error:
        convert_to_mini_sequence(model, settings)
    assert all(word in str(error.value) for word in [*words, "include, exclude and scope"])
    assert snapshot(model) == before


@pytest.mark.parametrize("family", MOE_CONFIGS)
def test_experts_and_norms_are_tiled_and_routers_left_alone(family):
    model = build(family)
    reference, blocks = copy.deepcopy(model), named(model, "SparseMoeBlock")
    parts = named(model, "Norm") | named(model, "Experts") | (named(model, "MLP") - blocks)
    report = mini_sequence_report(convert_to_mini_sequence(model, {**SMALL_CHUNKS, "scope": "tokens"}))
    assert {name for name, (_, reason) in report.untiled.items() if "a mixture of experts" in reason} == blocks == MLPS
    assert tiled_names(model) == parts and len(named(model, "Experts")) == len(blocks)
    assert_same_training(model, reference, INPUTS)
    revert_mini_sequence(model)
    report = mini_sequence_report(convert_to_mini_sequence(model, SMALL_CHUNKS))
    assert set(report.layers) == LAYERS and tiled_names(model) == set(report.tiled) == parts
    assert_same_training(model, reference, INPUTS)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_run_by_the_implementation_that_was_chosen(implementation, monkeypatch):
    from transformers.integrations import moe

    calls = []
    if implementation != "eager":
        own = moe.ALL_EXPERTS_FUNCTIONS[implementation]
        counted = lambda module, x, *args: calls.append(len(x)) or own(module, x, *args)  # noqa: E731
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, implementation, counted)
    model, reference = build("mixtral"), build("mixtral")
    for m in (model, reference):
        m.set_experts_implementation(implementation)
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    model(**INPUTS)  # the first call of each class verifies it on some rows
    calls.clear()
    model(**INPUTS).loss.backward()
    assert implementation == "eager" or (max(calls) == SMALL_CHUNKS["chunk_size"] and sum(calls) == 2 * 2 * 26)
    model.zero_grad()
    assert_same_training(model, reference, INPUTS)


def test_an_adapter_named_expert_makes_no_mixture_of_experts():
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"), adapter_name="expert")
    assert len(tiled_names(convert_to_mini_sequence(model))) == 7


@pytest.mark.parametrize("wrap", [lambda model: model, add_lora], ids=["model", "adapted"])
@pytest.mark.parametrize("settings", [SMALL_CHUNKS, {"loss": False}, {"return_logits": True}])
def test_revert_restores_classes_hooks_and_attributes(wrap, settings):
    model = wrap(build("qwen3"))
    model.register_forward_hook(lambda *_: None)
    model(**INPUTS)
    before = snapshot(model)
    convert_to_mini_sequence(model, settings)
    assert snapshot(model) != before
    model(**INPUTS).loss.backward()
    assert revert_mini_sequence(model) is model
    assert snapshot(model) == before and mini_sequence_report(model) is None


def test_revert_of_an_unconverted_model_does_nothing_and_a_reverted_one_converts_anew():
    model, reference = twins("llama")
    before = snapshot(model)
    assert revert_mini_sequence(model) is model and snapshot(model) == before
    revert_mini_sequence(convert_to_mini_sequence(model))
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    assert mini_sequence_report(model).config == MiniSequenceConfig(**SMALL_CHUNKS)
    assert_same_training(model, reference, INPUTS)


@pytest.mark.parametrize("family", CONFIGS)
def test_names_of_weights_and_classes_of_modules_stay(family):
    model, reference = twins(family)
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in reference.named_modules()]
    assert all(isinstance(m, type(reference.get_submodule(n))) for n, m in model.named_modules())
    assert type(model) is type(reference)


def loaded_through_torch_save(model, folder: Path):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [lambda m, _: copy.deepcopy(m), lambda m, _: pickle.loads(pickle.dumps(m)), loaded_through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("wrap", [lambda model: model, add_lora], ids=["model", "adapted"])
def test_a_copy_is_tiled_and_independent(tmp_path, wrap, duplicate):
    model, reference = (wrap(m) for m in twins("gemma2"))
    convert_to_mini_sequence(model, SMALL_CHUNKS)
    twin = duplicate(model, tmp_path)
    assert tiled_names(twin) == tiled_names(model) and mini_sequence_report(twin) == mini_sequence_report(model)
    assert_same_training(checkpointed(twin), reference, INPUTS)
    with torch.no_grad():
        for param in twin.parameters():
            param.zero_()
    revert_mini_sequence(twin)
    assert not tiled_names(twin) and tiled_names(model) and mini_sequence_report(model)
    assert "logits" in twin(**INPUTS) and "logits" not in model(**INPUTS)
    assert_same_training(model, reference, INPUTS)


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_save_pretrained_writes_what_the_unconverted_model_writes(tmp_path, family):
    model, reference = twins(family)
    convert_to_mini_sequence(model, SMALL_CHUNKS).save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "plain")
    assert {f.name for f in (tmp_path / "ours").iterdir()} == {f.name for f in (tmp_path / "plain").iterdir()}
    ours, plain = ((tmp_path / kind / "config.json").read_text() for kind in ("ours", "plain"))
    assert ours == plain and json.loads(ours)["architectures"] == ["LlamaForCausalLM"]
    ours, plain = (load_file(tmp_path / kind / "model.safetensors") for kind in ("ours", "plain"))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in plain)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert not tiled_names(loaded) and mini_sequence_report(loaded) is None
    assert torch.equal(loaded(**INPUTS).logits, reference.eval()(**INPUTS).logits)


def test_weights_loaded_after_the_conversion_are_used():
    model, reference = build("llama", seed=1), build("llama", seed=2)
    convert_to_mini_sequence(model, SMALL_CHUNKS).load_state_dict(reference.state_dict())
    assert_same_training(model, reference, INPUTS)


def converted_with_adapters(model, order: str, settings: dict):
    if order == "adapters first":
        return convert_to_mini_sequence(add_lora(model, **settings), SMALL_CHUNKS)
    return add_lora(convert_to_mini_sequence(model, SMALL_CHUNKS), **settings)


adapter_cases = pytest.mark.parametrize("settings", LORA.values(), ids=LORA)
both_orders = pytest.mark.parametrize("order", ["adapters first", "conversion first"])


@both_orders
@adapter_cases
def test_adapters_train_as_in_the_unconverted_model(order, settings):
    model, reference = twins("llama")
    model, reference = converted_with_adapters(model, order, settings), add_lora(reference, **settings)
    assert len(tiled_names(model)) == 7
    assert_same_training(model, reference, INPUTS)
    assert_same_training(checkpointed(model), checkpointed(reference), INPUTS)
    assert "logits" not in model(**INPUTS)


@both_orders
@adapter_cases
def test_disabled_adapters_give_the_base_model(order, settings):
    model, reference = twins("llama")
    base = copy.deepcopy(reference)
    model, reference = converted_with_adapters(model, order, settings), add_lora(reference, **settings)
    with torch.no_grad():  # a saved head starts as a copy of the frozen one
        for m in (model, reference):
            for name, param in m.named_parameters():
                if "modules_to_save" in name:
                    param.mul_(1.5)
    with model.disable_adapter(), reference.disable_adapter():
        loss, expected = model(**INPUTS).loss, reference(**INPUTS).loss
        assert loss.requires_grad == expected.requires_grad
    torch.testing.assert_close(loss, base(**INPUTS).loss, rtol=1e-5, atol=0)
    assert_same_training(model, reference, INPUTS)


@both_orders
@adapter_cases
def test_merged_adapters_equal_the_unconverted_ones(order, settings):
    model, reference = twins("llama")
    model = converted_with_adapters(model, order, settings).merge_and_unload()
    reference = add_lora(reference, **settings).merge_and_unload()
    weights, expected = model.state_dict(), reference.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[key], expected[key]) for key in expected)
    assert len(tiled_names(model)) == 7
    for m in (model, reference):
        m.requires_grad_(True)
    assert_same_training(model, reference, INPUTS)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(key):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{key}: the pattern '\\*.mpl' matches no part .* such as 'model.layers.0"):
        convert_to_mini_sequence(model, {key: ["*.mlp", "*.mpl"]})
    assert snapshot(model) == before


def test_a_part_that_was_converted_before_is_an_error():
    model = build("llama")
    convert_to_mini_sequence(model.model, SMALL_CHUNKS)
    with pytest.raises(ValueError, match="without its LM head and loss: call revert_mini_sequence"):
        convert_to_mini_sequence(model, SMALL_CHUNKS)


class Layer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2), norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [(nn.RMSNorm((2, 4)), "more than one dimension"), (nn.GroupNorm(2, 8), None), (nn.BatchNorm1d(8), None)],
)
def test_norms_that_are_not_token_wise_are_left_alone(norm, reason):
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(norm), Layer(nn.LayerNorm(8))])
    report = mini_sequence_report(convert_to_mini_sequence(model))
    assert list(report.tiled) == ["layers.1.norm"]
    assert report.untiled.get("layers.0.norm", (None, None))[1] in (reason, "its weight has more than one dimension")


def test_partitioned_weights_are_judged_by_their_whole_shape():
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(nn.LayerNorm(8))])
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    report = mini_sequence_report(convert_to_mini_sequence(model))
    assert list(report.tiled) == ["layers.0.norm"] and list(report.untiled) == ["layers.0", "layers.0.attention"]
    assert "no attention in it goes through transformers' attention interface" in report.untiled["layers.0"][1]
    assert model.layers[0].norm.mini_sequence_chunking.hidden_size == 8


def test_print_shows_what_is_tiled():
    model = convert_to_mini_sequence(build("llama"), {"chunk_size": 10})
    assert "mini_sequence=(scope=layer, chunk_size=10)" in repr(model.model.layers[0].mlp)
    assert repr(model.model.norm) == "LlamaRMSNorm((32,), eps=1e-06, mini_sequence=(scope=layer, chunk_size=10))"
    layer = model.model.layers[0]
    layer.mini_sequence_analyses.note(True, "of some reason")
    assert "mini_sequence=(run as a whole: of some reason)" in repr(layer)
    assert "mini_sequence" not in repr(revert_mini_sequence(model))


def test_print_shows_a_layers_own_settings_and_what_became_of_them():
    """Phi-3 makes queries, keys and values in one projection: its heads cannot be run in groups."""
    model = convert_to_mini_sequence(build("phi3"), chunk_size=10, head_groups="auto", offload="cpu")
    own = "mini_sequence=(scope=layer, chunk_size=10, head_groups=auto, offload=cpu"
    assert f"{own})" in repr(model.model.layers[0]) and "offload" not in repr(model.model.norm)
    model(**batch(23)).loss.backward()
    assert f"{own}, attention in one call: " in repr(model.model.layers[0])
