"""Logits of a model that was given no labels: every loss of somebody's own, by chunks, as with all logits."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from heads import CHUNK, LOSS_ONLY, H, LargestTensor, Model, V, data
from models import add_lora, assert_same_tensors, batch, build, twins
from torch import nn

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.loss.logits.deferred import DeferredLogits

CHUNKS = {"chunk_size": 10_000, "loss_chunk_size": 7}
INPUTS = batch(23, prompt=2, padding=3)
LABELS = INPUTS.pop("labels")
Y = LABELS.clamp(min=0)


def smoothed(x, y):
    """The Trainer's LabelSmoother."""
    x, y = x[..., :-1, :].contiguous(), y[..., 1:, None]
    log_probs, padding = -F.log_softmax(x, dim=-1), y.eq(-100)
    nll, smooth = log_probs.gather(-1, y.clamp(min=0)), log_probs.sum(-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smooth.sum() / (count * log_probs.shape[-1])


def mixture(p, q):
    """A generalized Jensen-Shannon divergence, as TRL writes it."""
    m = torch.logsumexp(torch.stack([p + torch.log(torch.tensor(0.3)), q + torch.log(torch.tensor(0.7))]), dim=0)
    kl = 0.3 * F.kl_div(m, q, reduction="none", log_target=True)
    return (kl + 0.7 * F.kl_div(m, p, reduction="none", log_target=True)).sum()


def dpo(x, y):
    per_token = x[:, :-1].log_softmax(-1).gather(-1, y[:, 1:].clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (per_token * (y[:, 1:] != -100)).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


CONSUMERS = {
    "mean": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "sum": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x.reshape(-1, x.size(-1)), y.flatten(), reduction="none").square().sum(),
    "weight": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), y.flatten(), torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)
    ),
    "smoothing": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "smoothing and weight": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), y.flatten(), torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype), label_smoothing=0.1
    ),
    "soft targets": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), F.one_hot(y.flatten() % x.shape[-1], x.shape[-1]).to(x) * 0.7 + 0.01
    ),
    "nll": lambda x, y: F.nll_loss(x.log_softmax(-1).flatten(0, 1), y.flatten(), reduction="sum"),
    "label smoother": smoothed,
    "gather minus logsumexp": lambda x, y: (
        x.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) - torch.stack([torch.logsumexp(r, -1) for r in x])
    ).mean(),
    "z-loss": lambda x, y: x.logsumexp(-1).square().mean(),
    "entropy": lambda x, y: (x.softmax(-1) * x.log_softmax(-1)).sum(-1)[y != -100].mean(),
    "entropy by logsumexp": lambda x, y: (x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1)).sum(),
    "largest": lambda x, y: x.max(-1).values.sum() + x.amax(-1).square().sum() + x.topk(3).values.prod(-1).sum(),
    "accuracy weighs": lambda x, y: (x.logsumexp(-1) * (x.argmax(-1) == y)).sum() + (x.max(dim=-1)[1] * 1e-3).sum(),
    "mask": lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "rows by number": lambda x, y: F.cross_entropy(x[torch.tensor([1, 0]), torch.tensor([5, 7])], y[:, 5]),
    "nothing selected": lambda x, y: x[torch.zeros_like(y, dtype=torch.bool)].logsumexp(-1).sum() + x.mean() * 0.5,
    "temperature": lambda x, y: F.cross_entropy((x / 0.7).flatten(0, 1), y.flatten()),
    "temperature of each sequence": lambda x, y: (
        (x / torch.tensor([0.5, 2.0], dtype=x.dtype)[:, None, None]).log_softmax(-1)[..., 3].sum()
    ),
    "in place": lambda x, y: F.cross_entropy(x.div_(0.7).view(-1, x.shape[-1]), y.view(-1)),
    "normalized": lambda x, y: (x - x.logsumexp(-1, keepdim=True)).gather(-1, y.clamp(min=0)[..., None]).mean(),
    "some tokens": lambda x, y: x[:, -1, [3, 5]].softmax(-1)[:, 0].log().sum() + x[:, 1:, 7].square().sum(),
    "chunks": dpo,
    "split and cat": lambda x, y: torch.cat(x.split(1)[::-1]).logsumexp(-1)[0].sum() + torch.stack(list(x))[1].sum(),
    "two consumers": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()) + 0.1 * x[:, 3:].logsumexp(-1).sum(),
    "against its own past": lambda x, y: F.kl_div(
        x.log_softmax(-1), (x.detach() * 0.9).softmax(-1), reduction="batchmean"
    ),
    "against given ones": lambda x, y: F.kl_div(
        x.log_softmax(-1), torch.full(x.shape, 0.01, dtype=x.dtype), reduction="sum"
    ),
    "pseudo-labels": lambda x, y: F.cross_entropy(x.flatten(0, 1), x.detach().mul(2).softmax(-1).flatten(0, 1)),
    "mixture": lambda x, y: mixture(x.log_softmax(-1), (x.detach() / 2).log_softmax(-1)),
    "everything": lambda x, y: x.square().mean() + x.float().sum(),
    "in float64": lambda x, y: x.double().logsumexp(-1).sum(),
}


class Twice(nn.Module):
    """A head on an embedding, and its plain twin."""

    def __init__(self, dtype):
        super().__init__()
        self.tiled = convert_to_mini_sequence(Model(bias=True, dtype=dtype), LOSS_ONLY)
        self.plain = Model(bias=True, dtype=dtype)


def gradients(model, loss_of, factor=3.0, **inputs):
    model.zero_grad()
    loss = loss_of(model(**inputs)["logits"], data()["labels"])
    (factor * loss).backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONSUMERS)
def test_a_loss_is_that_of_all_logits(name, dtype, tolerance):
    both, ids = Twice(dtype), data()["input_ids"]
    with LargestTensor(V) as largest:
        found = gradients(both.tiled, CONSUMERS[name], input_ids=ids)
    expected = gradients(both.plain, CONSUMERS[name], input_ids=ids)
    for key, value in expected.items():
        scale = max(value.abs().max().item(), 0.1 if dtype == torch.float32 else 1e-8)
        assert (found[key] - value).abs().max() <= tolerance * scale, key
    given = name in ("soft targets", "against given ones")  # which are as large as the logits
    assert largest.rows <= max(CHUNK, H) or given


@pytest.mark.parametrize("name", ["mean", "entropy", "chunks", "label smoother", "mixture"])
def test_accumulated_over_two_batches(name):
    both = Twice(torch.float64)
    for model in (both.tiled, both.plain):
        for seed in range(2):
            ids = data()["input_ids"].roll(seed, -1)
            (CONSUMERS[name](model(ids)["logits"], data()["labels"]) / 2).backward()
    for tiled, plain in zip(both.tiled.parameters(), both.plain.parameters(), strict=True):
        torch.testing.assert_close(tiled.grad, plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "entropy", "chunks", "label smoother", "temperature", "largest"])
@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast(name, inside):
    """Around the model alone, as accelerate does it, or around the loss too."""
    both, ids = Twice(torch.float32), data()["input_ids"]

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)["logits"]
            if inside:
                return CONSUMERS[name](logits, data()["labels"])
        return CONSUMERS[name](logits, data()["labels"])

    results = []
    for model in (both.tiled, both.plain):
        loss = loss_of(model)
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
    assert results[0][0].dtype == results[1][0].dtype
    for found, expected in zip(*results, strict=True):
        scale = expected.float().abs().max()
        assert (found.float() - expected.float()).abs().max() <= 0.02 * scale


def student_and_teacher(dtype=torch.float64):
    teacher = Model(bias=True, dtype=dtype).requires_grad_(False).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(-0.5)
    return convert_to_mini_sequence(Model(dtype=dtype), LOSS_ONLY), Model(dtype=dtype), teacher


DISTILLATIONS = {
    "kl": lambda s, t: F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"),
    "reverse kl": lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1).mean(),
    "temperature": lambda s, t: F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum") * 4,
    "jensen-shannon": lambda s, t: mixture(s.log_softmax(-1), t.log_softmax(-1)),
    "soft cross entropy": lambda s, t: F.cross_entropy(s.flatten(0, 1), t.softmax(-1).flatten(0, 1)),
    "mean square": lambda s, t: F.mse_loss(s, t),
    "masked": lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none")[:, 4:].sum(-1).mean(),
}


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_student_and_teacher_chunk_by_chunk_together(name):
    student, plain, plain_teacher = student_and_teacher()
    teacher = convert_to_mini_sequence(copy.deepcopy(plain_teacher), LOSS_ONLY)
    ids, losses = data()["input_ids"], []
    with LargestTensor(V) as largest:
        for s, t in ((student, teacher), (plain, plain_teacher)):
            rows = largest.rows
            with torch.no_grad():
                teachers = t(ids)["logits"]
            losses.append(DISTILLATIONS[name](s(ids)["logits"], teachers))
            losses[-1].backward()
    assert rows <= max(CHUNK, H)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)
    for tiled, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(tiled.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def test_two_heads_that_are_both_trained():
    """One autograd node has the gradients of one module: the second head's logits are computed in full."""
    models = [Model(dtype=torch.float64) for _ in range(4)]
    ids, losses = data()["input_ids"], []
    for model in models[:2]:
        convert_to_mini_sequence(model, LOSS_ONLY)
    for first, second in (models[:2], models[2:]):
        with torch.no_grad():
            second.lm_head.weight.mul_(0.5)
        losses.append(DISTILLATIONS["kl"](first(ids)["logits"], second(ids)["logits"]))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    for tiled, plain in zip(models[:2], models[2:], strict=True):
        for a, b in zip(tiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_two_passes_of_one_model():
    both, ids = Twice(torch.float64), data()["input_ids"]
    for model in (both.tiled, both.plain):
        a, b = model(ids)["logits"], model(ids.flip(-1))["logits"]
        loss = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum") + torch.cat([a, b]).logsumexp(-1).mean()
        loss.backward()
    for tiled, plain in zip(both.tiled.parameters(), both.plain.parameters(), strict=True):
        torch.testing.assert_close(tiled.grad, plain.grad)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", ["mean", "chunks", "entropy"])
def test_of_real_models(family, name):
    model, reference = twins(family)
    convert_to_mini_sequence(model, CHUNKS)
    results = []
    for m in (model.train(), reference.train()):
        loss = CONSUMERS[name](m(**INPUTS).logits, LABELS)
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert_same_tensors(*results)


@pytest.mark.parametrize("read_without", [True, False])
def test_adapters_and_a_reference_without_them(read_without):
    """Logits are those of the adapters of their pass, whichever are on when they are read."""
    model, reference = (add_lora(m, target_modules=["q_proj", "lm_head"]) for m in twins("llama"))
    convert_to_mini_sequence(model, CHUNKS)
    results = []
    for m in (model, reference):
        logits = m.train()(**INPUTS).logits
        with m.disable_adapter():
            with torch.no_grad():
                base = m(**INPUTS).logits.log_softmax(-1)
            if read_without:
                loss = F.kl_div(logits.log_softmax(-1), base, log_target=True, reduction="batchmean")
        if not read_without:
            loss = F.kl_div(logits.log_softmax(-1), base, log_target=True, reduction="batchmean")
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert_same_tensors(*results)


def test_a_value_that_nobody_reads_costs_nothing(tiled_calls):
    model = convert_to_mini_sequence(Model(), LOSS_ONLY)
    with LargestTensor(V) as largest:
        model(data()["input_ids"])["logits"].float()[:, :-1]
    assert largest.rows == 0 and not tiled_calls


@pytest.fixture
def logits():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    return model.train()(**INPUTS).logits, reference.train()(**INPUTS).logits


def test_what_a_tensor_can_do(logits):
    deferred, plain = logits
    assert isinstance(deferred, torch.Tensor) and isinstance(deferred, DeferredLogits)
    for attribute in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "is_cuda", "layout", "_base"):
        assert getattr(deferred, attribute) == getattr(plain, attribute), attribute
    assert deferred.size(-1) == plain.size(-1) and len(deferred) == len(plain) and deferred.numel() == plain.numel()
    assert deferred.grad_fn is not None and deferred.grad is None and not deferred.is_known()
    values = plain.detach()
    for found in (
        deferred.detach().cpu(), torch.from_numpy(deferred.detach().numpy()), torch.tensor(deferred.tolist()),
        pickle.loads(pickle.dumps(deferred.detach())), copy.deepcopy(deferred.detach()), deferred.data,
        torch.empty_like(values).copy_(deferred), deferred.to("cpu").clone(),
    ):  # fmt: skip
        torch.testing.assert_close(found + 0, values)
    assert deferred[0, 3, 5].item() == pytest.approx(plain[0, 3, 5].item(), rel=1e-4)
    assert torch.zeros_like(deferred).shape == plain.shape and "DeferredLogits" in repr(logits[0])


@pytest.mark.parametrize("name", ["hook", "retain_grad"])
def test_gradients_of_logits(logits, name):
    seen = []
    for x in logits:
        x.register_hook(seen.append) if name == "hook" else x.retain_grad()
        x.logsumexp(-1).sum().backward()
        if name == "retain_grad":
            seen.append(x.grad)
    torch.testing.assert_close(*seen)


def test_a_gradient_that_would_miss_a_part_is_refused(logits):
    loss = logits[0].logsumexp(-1).sum()
    with pytest.raises(RuntimeError, match='"loss": false'):
        logits[0].register_hook(print)
    loss.backward()


def test_after_backward_and_after_a_step(logits):
    deferred, plain = logits
    deferred.logsumexp(-1).sum().backward()
    torch.testing.assert_close(deferred.argmax(-1), plain.argmax(-1))
    with torch.no_grad():
        deferred.heads()[0].module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed since.*return_logits"):
        deferred.softmax(-1).sum()


def test_in_a_checkpoint():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, CHUNKS)
    for reentrant in (False, True):
        results = []
        for m in (model.train(), reference.train()):
            m.zero_grad()
            embeds = m.get_input_embeddings()(INPUTS["input_ids"])
            x = torch.utils.checkpoint.checkpoint(
                lambda e, m=m: m(inputs_embeds=e).logits, embeds, use_reentrant=reentrant
            )
            loss = F.cross_entropy(x.flatten(0, 1), LABELS.flatten())
            loss.backward()
            results.append({"loss": loss.detach()} | {n: p.grad for n, p in m.named_parameters()})
        assert_same_tensors(*results)


def test_compiled_loss(logits):
    loss = torch.compile(lambda x: x.logsumexp(-1).sum(), backend="eager")
    torch.testing.assert_close(loss(logits[0]), loss(logits[1]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "prepare"),
    [
        ({}, lambda m: m.eval()),
        ({"loss": False}, lambda m: m),
        ({"return_logits": True}, lambda m: m),
    ],
)
def test_passes_that_give_all_logits(settings, prepare):
    model = prepare(convert_to_mini_sequence(build("llama"), {**CHUNKS, **settings}).train())
    assert type(model(**INPUTS).logits) is torch.Tensor
    with torch.no_grad():
        assert type(model(**INPUTS).logits) is torch.Tensor  # its weights may change before somebody reads them


def test_generation_and_inference_give_all_logits():
    model = convert_to_mini_sequence(build("llama").requires_grad_(False), CHUNKS).eval()
    with torch.inference_mode():
        assert type(model(**INPUTS).logits) is torch.Tensor
    with torch.no_grad():
        cached = model(**INPUTS, use_cache=True)
        assert type(cached.logits) is torch.Tensor
        out = model(input_ids=INPUTS["input_ids"][:, :1], past_key_values=cached.past_key_values)
        assert type(out.logits) is torch.Tensor
        assert isinstance(model(**INPUTS).logits, DeferredLogits)  # a teacher
    plain = build("llama").requires_grad_(False).eval()
    tokens = [m.generate(INPUTS["input_ids"], max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*tokens)


def test_what_the_report_says():
    model = convert_to_mini_sequence(build("llama"), CHUNKS).train()
    assert mini_sequence_report(model).loss.startswith("tiled, ")
    model(**INPUTS).logits.sort(-1).values.sum().backward()
    assert mini_sequence_report(model).last_loss == "from all logits (sort)"
