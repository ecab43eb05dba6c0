"""`outputs.logits` of a model that was given labels: computed when it is read before backward, by chunks where possible."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from heads import LargestTensor
from models import CHUNKS, assert_same_tensors, batch, build, twins

from ds_minis import convert_to_mini_sequence
from ds_minis.loss.heads.chunked_head import UnreadableLogits
from ds_minis.loss.logits.deferred import DeferredLogits

INPUTS = batch(23, prompt=2, padding=3)


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


LOSSES = {
    "own cross entropy": lambda out, y: shifted(out.logits, y),
    "both": lambda out, y: out.loss + 0.5 * shifted(out.logits, y),
    "weighted tokens": lambda out, y: (
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="none") * torch.arange(44)
    ).mean(),
    "all of them": lambda out, y: out.loss + out.logits.square().mean(),
    "across tokens": lambda out, y: out.logits.softmax(1).square().sum(),
    "distillation": lambda out, y: F.kl_div(out.logits.log_softmax(-1), torch.full_like(out.logits, 1e-2)),
}


def train(model, loss_of):
    model.zero_grad()
    loss = loss_of(model(**INPUTS), INPUTS["labels"])
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_ones_own_from_the_logits(name):
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    for _ in range(2):
        assert_same_tensors(train(model, LOSSES[name]), train(reference, LOSSES[name]))


def test_a_cross_entropy_of_ones_own_runs_by_chunks():
    model = build("llama")
    convert_to_mini_sequence(model, CHUNKS)
    with LargestTensor(model.config.vocab_size) as largest:
        train(model, LOSSES["own cross entropy"])
    assert largest.rows <= model.config.hidden_size


def test_whatever_walks_over_an_output_sees_none():
    model = build("llama")
    output = convert_to_mini_sequence(model, CHUNKS)(**INPUTS)
    assert list(output.keys()) == ["loss"] and "logits" not in output and len(output.to_tuple()) == 1
    assert not any(isinstance(leaf, DeferredLogits) for leaf in torch.utils._pytree.tree_leaves(output))
    assert isinstance(output.logits, torch.Tensor)


@pytest.mark.parametrize("grad", [True, False])
def test_values_pickles_and_copies(grad):
    model, reference = twins("llama")
    convert_to_mini_sequence(model.eval(), CHUNKS), reference.eval()
    with torch.set_grad_enabled(grad):
        output, expected = model(**INPUTS), reference(**INPUTS).logits.detach()
        torch.testing.assert_close(torch.from_numpy(output.logits.detach().cpu().numpy()), expected)
        assert torch.equal(output.logits.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(pickle.loads(pickle.dumps(model(**INPUTS))).logits.detach(), expected)
        if not grad:
            torch.testing.assert_close(copy.deepcopy(model(**INPUTS)).logits, expected)


def test_after_backward_they_are_gone_and_what_was_taken_before_stays():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    expected = reference(**INPUTS).logits.detach()
    output = model(**INPUTS)
    output.loss.backward()
    assert output.logits is None
    output = model(**INPUTS)
    logits = output.logits
    output.loss.backward()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_a_graph_that_is_kept_keeps_them():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    output = model(**INPUTS)
    output.loss.backward(retain_graph=True)
    torch.testing.assert_close(output.logits.detach() + 0, reference(**INPUTS).logits.detach())


def test_weights_that_have_changed_are_an_error_with_a_way_out():
    model = convert_to_mini_sequence(build("llama"), CHUNKS)
    output = model(**INPUTS)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="return_logits"):
        output.logits.sum()


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[:, :-1],
        lambda logits: logits.argmax(-1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: F.cross_entropy(logits, torch.zeros(1)),
        lambda logits: logits / 2,
        lambda logits: 2 * logits,
        lambda logits: logits.shape,
    ],
)
def test_logits_of_weights_that_an_engine_holds_in_parts_are_an_error_with_a_way_out(use):
    model = convert_to_mini_sequence(build("llama"), CHUNKS)
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape  # as ZeRO-3's
    output = model(**INPUTS)
    assert isinstance(output.logits, UnreadableLogits)
    with pytest.raises(RuntimeError, match="ZeRO-3 holds.*return_logits"):
        use(output.logits)
    output.loss.backward()


@pytest.mark.parametrize("method", ["gather", "gather_for_metrics", "pad_across_processes", "reduce"])
def test_accelerators_collectives_are_given_them_in_full(method):
    accelerator = Accelerator(cpu=True)
    model, reference = twins("llama")
    model = accelerator.prepare(convert_to_mini_sequence(model, CHUNKS))
    with torch.no_grad():
        logits, labels = getattr(accelerator, method)((model(**INPUTS).logits, INPUTS["labels"]))
        assert type(logits) is torch.Tensor and labels.shape == (2, 23)
        torch.testing.assert_close(logits, reference(**INPUTS).logits)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(model, **settings):
    return torch.nn.parallel.DistributedDataParallel(model, **settings)


@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_logits_are_read_through_ddp_which_rebuilds_outputs(one_process, settings):
    """The accuracy that a trainer (ms-swift) takes from `outputs.logits`, where HF Trainer has DDP find unused parameters."""
    model, reference = twins("llama")
    own_class = type(reference(**INPUTS))
    plain = wrapped(reference, **settings)
    converted = wrapped(convert_to_mini_sequence(model, CHUNKS), **settings)
    for _ in range(2):
        found, expected = converted(**INPUTS), plain(**INPUTS)
        assert "logits" not in found and isinstance(found, own_class) and isinstance(found.logits, DeferredLogits)
        with LargestTensor(131) as largest:
            predicted = found.logits.argmax(-1)
        assert largest.rows < 46 and torch.equal(predicted, expected.logits.argmax(-1))
        assert_same_tensors(trained(converted, found.loss), trained(plain, expected.loss))
        assert found.logits is None  # from backward on


def trained(model, loss):
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_gradient_of_logits_that_ddp_has_rebuilt_is_refused(one_process):
    model = wrapped(convert_to_mini_sequence(build("llama"), CHUNKS), find_unused_parameters=True)
    for loss_of in LOSSES.values():
        with pytest.raises(RuntimeError, match="only the output's own loss has gradients.*return_logits"):
            loss_of(model(**INPUTS), INPUTS["labels"]).backward()
    output = model(**INPUTS)
    assert output.logits.shape == (2, 23, 131) and pickle.loads(pickle.dumps(output)).loss == output.loss
