"""Whole layers over chunks: every kind of attention, mask, position and dtype, against the unconverted model."""

import pytest
import torch
from models import (
    CHUNKS,
    LAYER_CONFIGS,
    add_lora,
    assert_same_tensors,
    assert_same_training,
    batch,
    build,
    checkpointed,
    count_layers,
    loss_and_grads,
    twins,
)
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.check.exactness import compare_with_plain
from ds_minis.check.tiny import tiny_config

# Tokens; a chunk has 10, or 5 of each of two sequences: below one chunk, exactly one, not divisible, divisible.
LENGTHS = {1: (7, 10, 23, 20), 2: (4, 5, 23, 20)}
KINDS = {
    "MHA": ("llama", {"num_key_value_heads": 4}),
    "GQA": ("llama", {}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "biases": ("qwen2", {}),
    "norms of queries and keys": ("qwen3", {}),
    "sliding window": ("mistral", {}),
    "alternating windows, softcap": ("gemma2", {"attn_logit_softcapping": 1.0}),
    "alternating windows, two rotations": ("gemma3", {}),
    "parallel attention, a part rotated": ("phi", {}),
    "parallel attention, queries in one with keys": ("gpt_neox", {}),
    "parallel attention, interleaved rotation": ("cohere", {}),
    "sinks": ("gpt_oss", {}),
    "one projection for all heads": ("phi3", {}),
    "experts": ("qwen3_moe", {}),
}
ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def converted_pair(family: str, **kwargs):
    model, reference = twins(family, **kwargs)
    return convert_to_mini_sequence(model, CHUNKS), reference


def assert_layers(model, count: int = 2) -> None:
    assert count_layers(model) == count, mini_sequence_report(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention(kind, attention):
    family, settings = KINDS[kind]
    if attention == "sdpa" and family in ("gpt_oss", "gemma2"):
        pytest.skip("transformers has no sdpa for attention sinks and softcaps")
    model, reference = converted_pair(family, attention=attention, **settings)
    for batch_size, lengths in LENGTHS.items():
        for length in lengths:
            assert_same_training(model, reference, batch(length, batch_size=batch_size, prompt=length // 3))
    assert_layers(model)


def test_every_family_above_has_what_it_stands_for():
    """Or a configuration that ignores a setting would be tested twice under two names."""
    named = {kind: dict(build(family, **settings).named_parameters()) for kind, (family, settings) in KINDS.items()}
    first = "model.layers.0.self_attn"
    rows = [len(named[kind][f"{first}.k_proj.weight"]) for kind in ("MHA", "GQA", "MQA")]
    assert rows == [32, 16, 8]
    assert f"{first}.q_proj.bias" in named["biases"] and f"{first}.sinks" in named["sinks"]
    assert f"{first}.q_norm.weight" in named["norms of queries and keys"]
    types = [build(family).config.layer_types for family in ("gemma2", "gemma3", "gpt_oss")]
    assert all(set(kinds) == {"sliding_attention", "full_attention"} for kinds in types)


def test_the_gradient_of_the_attentions_output_may_be_part_of_the_incoming_one():
    """Without a projection behind it; written over too early, it would be lost."""
    model, reference = twins("cohere")
    for m in (model, reference):
        for layer in m.model.layers:
            layer.self_attn.o_proj = torch.nn.Identity()
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    assert_layers(model)


def test_gradient_of_sinks_comes_by_way_of_the_attentions_arguments():
    model, _ = converted_pair("gpt_oss")
    _, grads = loss_and_grads(model, batch(23))
    assert all(grads[f"model.layers.{i}.self_attn.sinks"].abs().max() > 1e-6 for i in range(2))


@pytest.mark.parametrize("kind", ROPE)
def test_every_rotation(kind):
    rope = {"rope_type": kind, "rope_theta": 100.0, **ROPE[kind]}
    model, reference = converted_pair("llama", rope_parameters=rope)
    assert_same_training(model, reference, batch(23))
    assert_layers(model)
    plain = build("llama")(**batch(23)).loss
    assert (
        kind == "dynamic" or (reference(**batch(23)).loss - plain).abs() > 1e-4
    )  # dynamic: longer than 128 tokens only


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")])
def test_padding(family, attention, side):
    model, reference = converted_pair(family, attention=attention)
    inputs = batch(23, padding=7)
    if side == "left":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_same_training(model, reference, inputs)
    assert_layers(model)


PACKED = torch.cat([torch.arange(n) for n in (9, 3, 11)])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_sequences(batch_size, attention):
    """Positions that start anew; transformers makes a mask of them where there is none."""
    model, reference = converted_pair("llama", attention=attention)
    inputs = batch(23, batch_size=batch_size)
    del inputs["attention_mask"]
    plain = reference(**inputs).loss
    inputs["position_ids"] = PACKED.expand(batch_size, -1)
    assert_same_training(model, reference, inputs)
    assert_layers(model)
    assert (reference(**inputs).loss - plain).abs() > 1e-4


def attention_within_sequences(module, queries, keys, values, mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """As flash attention's varlen function: packed sequences are told by where they begin, and no mask is given."""
    assert mask is None and cu_seq_lens_q is not None
    token = torch.arange(queries.shape[2])
    sequence = (token[:, None] >= cu_seq_lens_q[1:]).sum(1)
    allowed = (sequence[:, None] == sequence) & (token[:, None] >= token)
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    scores = (queries @ keys.transpose(-1, -2) * scaling).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("starts", [[0, 9, 12, 23], list(range(22)) + [23]], ids=["three", "as many as tokens"])
def test_starts_of_packed_sequences_as_flash_attention_takes_them(starts):
    AttentionInterface.register("within_sequences", attention_within_sequences)
    AttentionMaskInterface.register("within_sequences", lambda *args, **kwargs: None)
    model, reference = converted_pair("llama", attention="within_sequences")
    starts = torch.tensor(starts, dtype=torch.int32)
    lengths = {"max_length_q": 11, "max_length_k": 11}
    inputs = batch(23, batch_size=1) | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, **lengths}
    del inputs["attention_mask"]
    assert_same_training(model, reference, inputs)
    assert_layers(model)
    whole = torch.tensor([0, 23], dtype=torch.int32)
    assert (reference(**inputs).loss - reference(**inputs | {"cu_seq_lens_q": whole}).loss).abs() > 1e-4


def test_a_mask_of_the_users_own():
    model, reference = converted_pair("llama")
    inputs = batch(23)
    allowed = torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs["attention_mask"] = torch.zeros(2, 1, 23, 23).masked_fill(~(allowed.tril() | torch.eye(23).bool()), -1e9)
    assert_same_training(model, reference, inputs)
    assert_layers(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt_oss"])
def test_adapters(family):
    targets = {"target_modules": ["q_proj", "v_proj"]} if family == "gpt_oss" else {}
    model, reference = (add_lora(m, **targets) for m in twins(family))
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, batch(23))
    assert_layers(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("aux", [False, True], ids=["", "router outputs"])
@pytest.mark.parametrize("family", ["mixtral without router outputs", "qwen3_moe"])
def test_mixtures_of_experts(family, aux, checkpointing):
    """Where router outputs are asked for, hooks in the layers take them for all tokens: those layers run as they are."""
    model, reference = converted_pair(family)
    if checkpointing:
        checkpointed(model), checkpointed(reference)
    assert_same_training(model, reference, batch(23), **({"output_router_logits": True} if aux else {}))
    assert_layers(model, 0 if aux else 2)
    if aux:
        outputs = [m(**batch(23), output_router_logits=True) for m in (model, reference)]
        torch.testing.assert_close(outputs[0].aux_loss, outputs[1].aux_loss)
        assert any("has the hook" in reason for _, reason in mini_sequence_report(model).untiled.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_autocast(family, lora):
    """bfloat16 has 3 digits: gradients within 3% of their largest entry, as everywhere where autocast is on."""
    model, reference = twins(family)
    if lora:
        model, reference = (add_lora(m, target_modules=["q_proj", "v_proj"]) for m in (model, reference))
    convert_to_mini_sequence(model, CHUNKS)
    results = []
    for m in (model, reference):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**batch(23)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    assert {grad.dtype for grad in results[0][1].values()} == {torch.float32}
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-3, atol=0)
    assert_same_tensors(results[0][1], results[1][1], rtol=0.03)
    assert_layers(model)


def differences(model, inputs, names, step: float = 1e-3):
    """Derivative of the loss along one direction, from backward and from differences, with the same random numbers."""
    params = {n: p for n, p in model.named_parameters() if n in names}
    torch.manual_seed(1)
    directions = {n: torch.randn_like(p) for n, p in params.items()}

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return model(**inputs).loss

    def shifted_loss(shift: float) -> torch.Tensor:
        with torch.no_grad():
            for name, param in params.items():
                param.add_(directions[name], alpha=shift)
            value = loss()
            for name, param in params.items():
                param.sub_(directions[name], alpha=shift)
        return value

    model.zero_grad()
    loss().backward()
    actual = sum((p.grad * directions[n]).sum() for n, p in params.items())
    return actual, (shifted_loss(step) - shifted_loss(-step)) / (2 * step)


DROPOUT = {
    "attention": (lambda m: m, {"attention_dropout": 0.3}),
    "adapters": (lambda m: add_lora(m, lora_dropout=0.3), {}),
    "attention and adapters": (lambda m: add_lora(m, lora_dropout=0.3), {"attention_dropout": 0.3}),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_has_the_same_masks_in_backward(kind):
    wrap, settings = DROPOUT[kind]
    model = wrap(build("llama", **settings)).double()
    convert_to_mini_sequence(model, CHUNKS)
    inputs = batch(23)
    parts = ("q_proj", "v_proj", "down_proj", "o_proj")
    names = {n for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in parts)}
    for name in (names, *[{n for n in names if part in n} for part in parts]):
        actual, expected = differences(model, inputs, name)
        # Norms and the loss are in float32 whatever the model is in, so that differences have four digits.
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-3)
        assert expected.abs() > 1e-2
    assert_layers(model)
    torch.manual_seed(5)
    first, second = model(**inputs).loss, model(**inputs).loss
    torch.manual_seed(5)
    assert (
        model(**inputs).loss == first and (first - second).abs() > 1e-5
    )  # reproducible; another draw in the next step
    model.eval()
    assert model(**inputs).loss == model(**inputs).loss


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    model = convert_to_mini_sequence(add_lora(build("llama", attention_dropout=0.3), lora_dropout=0.3), CHUNKS)
    found = []
    for between in (model.train, model.eval):
        model.train().zero_grad()
        torch.manual_seed(5)
        loss = model(**batch(23)).loss
        between()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert not model.training
    assert_same_tensors(*found)
    assert_layers(model)


def test_without_dropout_no_random_number_is_drawn():
    model, _ = converted_pair("llama")
    model(**batch(23))
    torch.manual_seed(0)
    model(**batch(23)).loss.backward()
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


FALL_BACK = {
    "falcon": "as a whole: no attention in it goes through transformers' attention interface",
    "mamba": "as a whole: no attention in it goes through transformers' attention interface",
    "gemma3n_text": "",
    "gemma4_text": "",
}


@pytest.mark.parametrize("name", FALL_BACK)
def test_layers_that_cannot_be_tiled_are_exact_and_say_why(name):
    """Other attentions; and layers that share keys and values, which are in the arguments of later layers."""
    config = tiny_config(CONFIG_MAPPING[name](), dropout=0.0)
    result = compare_with_plain(AutoModelForCausalLM.from_config, config)
    assert result.exact and result.report.tiled
    reasons = {what for fqn, what in result.report.untiled.items() if fqn.rsplit(".", 1)[-1].isdigit()}
    assert reasons and all(reason for _, reason in reasons)
    assert not FALL_BACK[name] or {reason for _, reason in reasons} == {FALL_BACK[name]}


def test_every_configuration_for_layers_is_used():
    assert set(LAYER_CONFIGS) <= {family for family, _ in KINDS.values()} | {"mixtral without router outputs"}
