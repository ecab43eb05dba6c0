"""What crosses module borders: wrappers that call `forward`, engine hooks between the LM head and the loss, models inside of
models, caches that nobody asked for, packed positions, and passes without gradients from the same random state."""

import copy

import pytest
import torch
from heads import LOSS_ONLY, Model, Output, assert_same_loss, data
from models import CHUNKS, assert_same_tensors, assert_same_training, batch, count_layers, twins
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
)

from ds_minis import convert_to_mini_sequence, mini_sequence_report, revert_mini_sequence

INPUTS = batch(23, prompt=2, padding=3)


def caching(**kwargs):
    """A model that makes a cache where it is not told otherwise, and its copy."""
    models = twins("llama", **kwargs)
    for model in models:
        model.config.use_cache = True
    return models


class Wrapper(nn.Module):
    """As of PEFT before 0.20, and Megatron: the model's `forward` and none of its hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class Penalized(Wrapper):
    def forward(self, input_ids, attention_mask=None, labels=None):
        output = self.model.forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        output.loss += 0.1 * self.model.lm_head.weight.square().mean()
        return output


@pytest.mark.parametrize("wrapper", [Wrapper, Penalized, lambda m: Wrapper(Wrapper(m))])
def test_a_wrapper_that_calls_forward_is_tiled(wrapper):
    model, reference = map(wrapper, caching())
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, INPUTS)
    assert "logits" not in model(**INPUTS) and count_layers(model) == 2
    assert mini_sequence_report(model).loss.startswith("tiled")
    revert_mini_sequence(model)
    assert "logits" in model(**INPUTS)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_wrapper_that_came_after_the_conversion_is_told_or_attached_by_another():
    model, reference = map(Wrapper, caching())
    convert_to_mini_sequence(model.model, CHUNKS)
    assert_same_training(model, reference, INPUTS)
    assert "called that model's `forward`" in mini_sequence_report(model).loss
    convert_to_mini_sequence(model, CHUNKS)  # as a second source of settings does
    assert_same_training(model, reference, INPUTS)
    assert "logits" not in model(**INPUTS) and mini_sequence_report(model).loss.startswith("tiled")


def test_adalora():
    from peft import AdaLoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(0)
        settings = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 0, "tfinal": 5, "task_type": "CAUSAL_LM"}
        return get_peft_model(model, AdaLoraConfig(target_modules=["q_proj", "up_proj"], **settings)).train()

    model, reference = map(adapted, caching())
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, INPUTS)
    assert "logits" not in model(**INPUTS) and count_layers(model) == 2


def hook_of_an_engine(module, args, output):
    return EngineNode.apply(output)


hook_of_an_engine.__module__ = "deepspeed.runtime.zero.parameter_offload"


class EngineNode(torch.autograd.Function):
    """What ZeRO-3 puts on every module's output."""

    @staticmethod
    def forward(ctx, output):
        return output.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


class HeadInside(Model):
    """As BERT's `cls`."""

    def __init__(self, **options):
        super().__init__(**options)
        head, self.lm_head = self.lm_head, None
        self.cls = nn.Sequential(nn.Tanh(), head)

    def get_output_embeddings(self):
        return self.cls[1]

    def forward(self, input_ids, labels=None):
        logits = self.cls(self.embed(input_ids))
        return Output(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


@pytest.mark.parametrize("hooked", [True, False])
def test_an_engines_hook_between_head_and_loss(hooked, caplog):
    model, reference = convert_to_mini_sequence(HeadInside(), LOSS_ONLY), HeadInside()
    for m in (model, reference):
        if hooked:
            m.cls.register_forward_hook(hook_of_an_engine)
    for _ in range(2):
        assert_same_loss(model, reference, data())
    assert ("logits" in model(**data())) == hooked
    assert caplog.text.count("inside of a Sequential, on whose output deepspeed has a hook") == hooked
    assert mini_sequence_report(model).loss.startswith("not tiled" if hooked else "tiled")


def test_a_model_around_a_model_is_tiled_by_the_inner_one():
    """The hook stands between the head and the outer model, not between the head and the loss."""
    model, reference = map(Wrapper, (Model(), Model()))
    for m in (model, reference):
        m.forward = lambda m=m, **kwargs: m.model(**kwargs)
        m.model.register_forward_hook(lambda *_: None)
        m.model.register_forward_hook(engine_of_a_dict)
    convert_to_mini_sequence(model, LOSS_ONLY)
    assert_same_loss(model, reference, data())
    assert "logits" not in model(**data()) and mini_sequence_report(model).loss.startswith("tiled")


def engine_of_a_dict(module, args, output):
    return Output({key: EngineNode.apply(value) for key, value in output.items()})


engine_of_a_dict.__module__ = "deepspeed.runtime.zero.parameter_offload"


BARE = {
    "decoder": AutoModel,
    "sequences": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}


@pytest.mark.parametrize("kind", BARE)
def test_decoders_and_classifiers_make_no_cache_in_training(kind):
    config = caching()[0].config
    config.pad_token_id, config.classifier_dropout = 0, 0.0
    torch.manual_seed(0)
    model = BARE[kind].from_config(config, attn_implementation="eager").train()
    torch.manual_seed(0)
    reference = BARE[kind].from_config(config, attn_implementation="eager").train()
    convert_to_mini_sequence(model, CHUNKS)
    inputs = {key: value for key, value in INPUTS.items() if key != "labels"}
    grads = []
    for m in (model, reference):
        output = m(**inputs)[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        grads.append({"output": output.detach()} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert_same_tensors(*grads)
    assert count_layers(model) == 2
    if kind != "tokens":  # whose output has no place for one
        assert model(**inputs, use_cache=True).past_key_values is not None
        assert model.eval()(**inputs).past_key_values is not None


class RenamedCache(LlamaModel):
    """As of transformers 5.24, where every decoder's `past_key_values` became `cache`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        assert cache is None
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs)


class OfRenamedCache(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, cache=None, labels=None, use_cache=None, **kwargs):
        assert cache is None
        return super().forward(input_ids, attention_mask, labels=labels, use_cache=use_cache, **kwargs)


@pytest.mark.parametrize("bare", [False, True])
def test_a_cache_by_its_newer_name_is_not_made_in_training_either(bare):
    model, reference = caching()
    for m in (model, reference):
        m.model.__class__, m.__class__ = RenamedCache, OfRenamedCache
    if bare:
        convert_to_mini_sequence(model.model, CHUNKS)
    else:
        convert_to_mini_sequence(model, CHUNKS)
    assert_same_training(model, reference, INPUTS)
    assert count_layers(model) == 2


POSITIONS = {
    "packed": torch.cat([torch.arange(9), torch.arange(14)]),
    "one sequence": torch.arange(23),
    "shifted": torch.arange(5, 28),
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_without_a_mask_mean_what_they_mean_to_the_unconverted_model(name, use_cache, mask):
    """Packed sequences are told by positions where there is neither a mask nor a cache: as without ds_minis."""
    model, reference = caching(attention="sdpa")
    convert_to_mini_sequence(model, CHUNKS)
    inputs = batch(23) | {"position_ids": POSITIONS[name][None].expand(2, -1)}
    if not mask:
        del inputs["attention_mask"]
    given = {} if use_cache is None else {"use_cache": use_cache}
    assert_same_training(model, reference, inputs, **given)
    whole = use_cache or (use_cache is None and name == "packed" and not mask)
    assert count_layers(model) == (0 if whole else 2)


@pytest.mark.parametrize("scope", ["layer", "tokens"])
@pytest.mark.parametrize("length", [23, 8])
@pytest.mark.parametrize("bare", [True, False])
def test_a_pass_without_gradients_draws_the_dropout_of_one_with_them(bare, length, scope):
    """GradCache: representations first, and again with gradients from the same random state."""
    model, _ = caching()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.3))
    model = model.model if bare else model
    convert_to_mini_sequence(model, {**CHUNKS, "scope": scope})
    ids = batch(length)["input_ids"]
    model(ids)  # verifies
    results = []
    for grad in (False, True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            results.append(model(ids)[0].detach())
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_language_model_that_is_called_without_labels_inside_of_one_that_has_them(caplog):
    """As BLIP-2, whose output holds the inner model's: nothing is told that is not so, and no full logits are held."""
    config = Blip2Config(
        text_config={
            "model_type": "opt", "vocab_size": 131, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "dropout": 0.0,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "pad_token_id": 0, "attention_dropout": 0.0,
        },
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
        qformer_config={**VISION, "encoder_hidden_size": 32, "vocab_size": 64, "hidden_dropout_prob": 0.0},
        num_query_tokens=4,
        image_token_index=130,
    )  # fmt: skip
    config.qformer_config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).train()
    reference = copy.deepcopy(model)
    convert_to_mini_sequence(model, CHUNKS)
    inputs = batch(23, prompt=5) | {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=129)
    inputs["labels"] = inputs["labels"].clamp(max=129)
    inputs["input_ids"][:, :4] = 130
    assert_same_training(model, reference, inputs)
    assert "not tiled" not in caplog.text and "in full" not in caplog.text
    assert mini_sequence_report(model).loss.startswith("tiled")
    output = model(**inputs)
    assert "logits" not in output and "logits" not in output.language_model_outputs
    with torch.no_grad():
        torch.testing.assert_close(output.logits + 0, reference(**inputs).logits)


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
