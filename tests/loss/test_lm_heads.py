"""LM heads that are no plain linear layer: verified like any module, with the dtype and the width that they really give."""

import math

import pytest
import torch
import torch.nn.functional as F
from heads import LOSS_ONLY, H, LargestTensor, Model, Output, V, assert_same_loss, data
from models import add_lora, assert_same_training, batch, build, twins
from torch import nn
from torch.nn.utils import parametrizations, prune

from ds_minis import convert_to_mini_sequence, mini_sequence_report


def with_head(make, **flags):
    """A model whose forward is `loss / scale(logits)`, with another LM head, and its copy."""
    models = []
    for _ in range(2):
        model = Model(**flags)
        head = make()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for param in head.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
        model.lm_head = head
        models.append(model)
    return convert_to_mini_sequence(models[0], LOSS_ONLY), models[1]


class MeanOfTokens(nn.Linear):
    """As PEFT's Lily: a router that looks at all tokens."""

    on = True

    def __init__(self):
        super().__init__(H, V, bias=False)
        self.gate = nn.Parameter(torch.zeros(H))

    def forward(self, x):
        y = super().forward(x)
        return y * torch.sigmoid((x @ self.gate).mean()) if self.on else y


class Float32(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float())


class Narrow(nn.Linear):
    """Padded to a multiple of some number."""

    def forward(self, x):
        return super().forward(x)[..., : V - 3]


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x) * (1 + self.calls % 7)


def told(model) -> str:
    return mini_sequence_report(model).loss


def test_a_head_that_looks_at_all_tokens_is_run_as_a_whole(caplog):
    model, reference = with_head(MeanOfTokens)
    for _ in range(2):
        assert_same_loss(model, reference, data())
    assert told(model).startswith("not tiled (the LM head, a MeanOfTokens, is run as a whole")
    assert caplog.text.count("depends on others") == 1


def test_it_is_asked_again_when_it_is_switched_on_or_off():
    model, reference = with_head(MeanOfTokens)
    for on in (False, True, False):
        model.lm_head.on = reference.lm_head.on = on
        assert_same_loss(model, reference, data())
        assert told(model).startswith("not" if on else "tiled")


def test_a_short_first_batch_decides_nothing():
    model, reference = with_head(MeanOfTokens)
    assert_same_loss(model, reference, data(2))
    assert_same_loss(model, reference, data())


def test_a_head_that_keeps_state_is_run_as_a_whole():
    model, reference = with_head(lambda: Counting(H, V, bias=False))
    for _ in range(2):
        assert_same_loss(model, reference, data())
    assert model.lm_head.calls == reference.lm_head.calls  # verification leaves no trace
    assert "keeps state" in told(model)


@pytest.mark.parametrize("process", [lambda x: x, lambda x: x.float()])
def test_a_float32_head_of_a_bfloat16_model(process):
    model, reference = with_head(lambda: Float32(H, V, bias=False), process=process)
    loss, expected = (m.bfloat16()(**data()).loss for m in (model, reference))
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_a_head_that_gives_fewer_logits_than_it_has_outputs():
    process = lambda x: x / math.log(x.shape[-1])  # noqa: E731
    model, reference = with_head(lambda: Narrow(H, V, bias=False), process=process)
    inputs = data()
    inputs["labels"] = inputs["labels"].clamp(max=V - 4)
    with LargestTensor(V - 3) as largest:
        assert_same_loss(model, reference, inputs)
    assert told(model).startswith("tiled") and largest.rows


def test_a_weight_that_was_exchanged_for_a_wider_one():
    model, reference = with_head(lambda: nn.Linear(H, V, bias=False), process=lambda x: x / x.shape[-1])
    for m in (model, reference):
        m.lm_head.weight = nn.Parameter(torch.cat([m.lm_head.weight.detach(), torch.zeros(5, H)]))
    assert_same_loss(model, reference, data())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.0, "use_rslora": True}])
def test_token_wise_adapters_on_the_head_are_tiled(settings):
    model, reference = (add_lora(m, target_modules=["lm_head"], **settings) for m in twins("llama"))
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    assert_same_training(model, reference, batch(23))
    assert told(model).startswith("tiled")


def test_lily_on_the_head_is_run_as_a_whole():
    from peft import LilyConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(3)
        model = get_peft_model(model, LilyConfig(target_modules=["lm_head"]))
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.3 * torch.randn(param.shape))
        return model

    model, reference = map(adapted, twins("llama"))
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    assert_same_training(model, reference, batch(23))
    assert "depends on others" in told(model)


class Keeping(Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embed(input_ids))
        self.kept = self.keep(logits)
        return Output(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


KEEP = {
    "themselves": lambda logits: logits,
    "shifted": lambda logits: logits[:, 1:],
    "scaled": lambda logits: [logits * 2.0],
}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", KEEP)
def test_logits_that_the_model_keeps_are_those_of_the_weights_of_then(name, held):
    kept = []
    for convert in (True, False):
        model = Keeping()
        model.keep = KEEP[name]
        if convert:
            convert_to_mini_sequence(model, LOSS_ONLY)
        output = model(**data())
        output.loss.backward()
        if not held:
            del output
        torch.optim.SGD(model.parameters(), lr=10.0).step()
        (logits,) = model.kept if isinstance(model.kept, list) else [model.kept]
        kept.append(logits.detach() + 0)
    torch.testing.assert_close(*kept)


def test_logits_that_are_kept_without_backward_are_refused_once_weights_have_changed():
    model = Keeping()
    model.keep = KEEP["themselves"]
    convert_to_mini_sequence(model, LOSS_ONLY)(**data())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed since.*return_logits"):
        model.kept.sum()


@pytest.mark.parametrize("settings", [{}, {"scope": "tokens"}])
def test_hidden_states_are_let_go_of_before_the_decoders_backward(settings):
    """Also where the output is held: they are 8 KiB a token in Llama-3-8B."""
    model, alive = build("llama"), []
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7, **settings})
    for _ in range(2):  # the first call verifies
        hidden = []
        handle = model.model.norm.register_forward_hook(lambda m, a, o: hidden.append(o.untyped_storage()))  # noqa: B023
        output = model(**batch(23))
        handle.remove()
        (storage,) = hidden
        pointer = storage._cdata

        def look(_, pointer=pointer):
            alive.append(torch._C._storage_Use_Count(pointer))

        handle = model.model.embed_tokens.weight.register_hook(look)
        output.loss.backward()
        handle.remove()
    assert alive == [1, 1]  # the one held here


@pytest.mark.parametrize(
    ("change", "tiled"),
    [
        (lambda head: prune.l1_unstructured(head, "weight", 0.4), False),
        (nn.utils.weight_norm, False),
        (nn.utils.spectral_norm, False),
        (parametrizations.weight_norm, True),
        (parametrizations.spectral_norm, False),  # power iterations in place at each call
        (parametrizations.orthogonal, True),
    ],
    ids=["pruned", "weight_norm", "spectral_norm", "weight_norm (new)", "spectral_norm (new)", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_head_whose_weight_is_made_of_others(change, tiled):
    """What makes the weight is no leaf, and is made anew at each step."""
    models = []
    for _ in range(2):
        model = Model()
        torch.manual_seed(1)
        change(model.lm_head)
        models.append(model)
    model, reference = convert_to_mini_sequence(models[0], LOSS_ONLY), models[1]
    optimizers = [torch.optim.SGD(m.parameters(), 0.3) for m in models]
    for _ in range(3):
        assert_same_loss(model, reference, data())
        for optimizer in optimizers:
            optimizer.step()
    assert told(model).startswith("tiled" if tiled else "not tiled")
