"""TRL's `model(..., labels=..., fused_lm_head=True)`, answered from the model's own logits."""

import logging

import pytest
import torch
from heads import LargestTensor
from models import add_lora, assert_same_tensors, batch, build, twins

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.loss.forward import fused_outputs
from ds_minis.loss.kernels.token_statistics import token_statistics

utils = pytest.importorskip("trl.trainer.utils")
SETTINGS = {"chunk_size": 10_000, "loss_chunk_size": 7}
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
INPUTS = batch(23, prompt=4, padding=3)


def expected(model, temperature=1.0, num_items_in_batch=None, shift_labels=None, **inputs):
    """The same from all logits of the unconverted model."""
    labels = inputs.pop("labels", None)
    output = model(**inputs)
    logits, target = (
        (output.logits, shift_labels) if shift_labels is not None else (output.logits[:, :-1], labels[:, 1:])
    )
    mask = target != -100
    log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    p = log_p.exp()
    found = {
        "log_probs": log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0],
        "entropy": -(p * log_p).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log().detach(),
        "mean_logits": (logits.float() / temperature).mean(-1).to(log_p).detach(),
        "is_top1": logits.argmax(-1) == target,
    }
    found = {name: value.masked_fill(~mask, 0) for name, value in found.items()}
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -found["log_probs"].sum() / count
    aux = output.get("aux_loss") if inputs.get("output_router_logits") else None
    loss = loss if aux is None else loss + model.config.router_aux_loss_coef * aux
    return {"loss": loss, "label_mask": mask, "aux_loss": aux, **found}


def compared(model, reference, temperature=1.0, **inputs):
    """What both give and the gradients of a loss that reads all that has one."""
    results = []
    for m in (model, reference):
        m.zero_grad()
        if m is model:
            out = dict(m(**inputs, fused_lm_head=True))
        else:
            out = {name: value for name, value in expected(m, temperature, **inputs).items() if value is not None}
        loss = (
            out["loss"]
            + (out["log_probs"] * torch.linspace(-1, 2, out["log_probs"].numel()).view_as(out["log_probs"])).sum()
        )
        (loss + 0.3 * out["entropy"].square().sum()).backward()
        grads = {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
        results.append({name: value.detach() for name, value in out.items()} | grads)
    assert list(results[0]) and results[0].keys() == results[1].keys()
    for name in ("is_top1", "label_mask"):
        assert torch.equal(results[0].pop(name), results[1].pop(name))
    assert_same_tensors(*results)


CALLS = {
    "labels": {},
    "count": {"num_items_in_batch": torch.tensor(11)},
    "shifted": {"shift_labels": INPUTS["labels"].roll(-1, -1), "labels": None},
}


@pytest.mark.parametrize("name", CALLS)
def test_ways_to_call(name):
    model, reference = twins("llama")
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    inputs = {key: value for key, value in {**INPUTS, **CALLS[name]}.items() if value is not None}
    compared(model.train(), reference.train(), **inputs)
    assert mini_sequence_report(model).last_loss == "by chunks (fused_lm_head)"


@pytest.mark.parametrize("family", ["gemma2", "cohere", "mixtral", "gpt2", "llama-tied-bias"])
def test_heads_that_scale_and_cap_and_routers(family):
    model, reference = twins(family)
    convert_to_mini_sequence(model, SETTINGS)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)  # after the conversion
    routers = {"output_router_logits": True} if family == "mixtral" else {}
    compared(model.train(), reference.train(), 0.7, **INPUTS, **routers)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(settings):
    """TRL reads `lm_head.weight`, which is the base layer's."""
    model, reference = twins("llama")
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    model, reference = add_lora(model, **settings), add_lora(reference, **settings)
    convert_to_mini_sequence(model, SETTINGS)
    compared(model.train(), reference.train(), **INPUTS)


def test_a_frozen_head_is_run_once_for_log_probs(monkeypatch):
    model, reference = (add_lora(m) for m in twins("llama"))
    utils.add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    compared(model.train(), reference.train(), **INPUTS)  # a loss of entropies runs it again
    rows = []

    def counted(logits, *args):
        rows.append(len(logits))
        return token_statistics(logits, *args)

    monkeypatch.setattr(fused_outputs, "token_statistics", counted)
    output = model(**INPUTS, fused_lm_head=True)
    (output.loss + output.log_probs.square().sum() + output.entropy.detach().sum()).backward()
    assert sum(rows) == output.log_probs.numel()


@pytest.mark.parametrize("value", [True, False])
def test_router_outputs_that_the_configuration_asks_for(value):
    model, reference = twins("mixtral")
    for m in (model, reference):
        m.config.output_router_logits = value
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    found = model.train()(**INPUTS, fused_lm_head=True)
    true = expected(reference.train(), **INPUTS, output_router_logits=value)
    torch.testing.assert_close(found.loss, true["loss"])
    assert (found.aux_loss is not None) == value


def test_an_auxiliary_loss_that_the_model_does_not_give_is_refused():
    model = build("llama")
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    with pytest.raises(RuntimeError, match="which LlamaForCausalLM's own forward does not give. Set the trainer's"):
        model.train()(**INPUTS, output_router_logits=True, fused_lm_head=True)
    assert model(**INPUTS, fused_lm_head=True).aux_loss is None


def test_labels_that_are_all_masked():
    model = build("llama")
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    output = model.train()(INPUTS["input_ids"], labels=torch.full_like(INPUTS["labels"], -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and not output.log_probs.any() and not any(p.grad.any() for p in model.parameters())


def test_no_more_than_a_chunk_of_logits_and_without_gradients():
    model = build("llama", num_hidden_layers=1)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    convert_to_mini_sequence(model, SETTINGS)
    with LargestTensor(model.config.vocab_size) as largest:
        model.train()(**INPUTS, fused_lm_head=True).loss.backward()
        with torch.no_grad():
            output = model.eval()(**INPUTS, fused_lm_head=True)
    assert largest.rows <= max(7, model.config.hidden_size)  # the transposed weight has as many rows as the hidden size
    assert not output.loss.requires_grad and output.mean_logits is None and output.is_top1.dtype == torch.bool


def test_a_head_in_float32_under_autocast():
    model, reference = twins("llama")
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=OUTPUTS)
    convert_to_mini_sequence(model, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(**INPUTS, fused_lm_head=True)
        hidden = reference.train().model(**{k: v for k, v in INPUTS.items() if k != "labels"})[0][:, :-1]
    logits = torch.nn.functional.linear(hidden.float(), reference.lm_head.weight)
    mask = INPUTS["labels"][:, 1:] != -100
    log_p = logits.log_softmax(-1).gather(-1, INPUTS["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs, log_p.masked_fill(~mask, 0), rtol=1e-4, atol=1e-5)


def test_an_accelerators_autocast_around_the_forward():
    from accelerate import Accelerator

    results = []
    for converted in (True, False):
        model = build("llama")
        utils.add_fused_lm_head(model, outputs=OUTPUTS)
        if converted:
            convert_to_mini_sequence(model, SETTINGS)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        output = accelerator.prepare(model.train())(**INPUTS, fused_lm_head=True)
        output.loss.backward()
        results.append((output.log_probs.detach(), output.entropy.detach(), model.lm_head.weight.grad))
        accelerator.state._reset_state(reset_partial_state=True)
    for found, other in zip(*results, strict=True):
        assert (found - other).abs().max() <= 0.03 * other.abs().max()


def test_what_is_not_recognized_is_left_to_trl_with_a_line(caplog):
    model, reference = twins("llama")
    for m in (model, reference):
        utils.add_fused_lm_head(m, outputs=(*OUTPUTS, "perplexity"))
    convert_to_mini_sequence(model, SETTINGS)
    with caplog.at_level(logging.WARNING):
        found = model.train()(**INPUTS, fused_lm_head=True)
    torch.testing.assert_close(found.loss, reference.train()(**INPUTS, fused_lm_head=True).loss)
    assert "whose settings ds_minis does not know" in mini_sequence_report(model).loss


def test_settings_that_leave_the_loss_alone():
    model, reference = twins("llama")
    for m in (model, reference):
        utils.add_fused_lm_head(m, outputs=OUTPUTS)
    convert_to_mini_sequence(model, {**SETTINGS, "loss": False, "chunk_size": 10})
    found, other = (m.train()(**INPUTS, fused_lm_head=True) for m in (model, reference))
    torch.testing.assert_close(found.log_probs, other.log_probs, rtol=1e-4, atol=1e-5)
