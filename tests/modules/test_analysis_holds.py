"""An analysis holds at every length, for every value and state: what begins later, or is left behind, is seen."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import assert_same_training, batch, count_layers, twins, with_class
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.config import MiniSequenceConfig
from ds_minis.layer.tiled import tiled_layer
from ds_minis.tiling.modules import tiled_module
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import tile, untile, whole_fallback_reason
from ds_minis.tiling.modules.tiled_module import TiledModule

H = 8
LARGE_CHUNKS = {"chunk_size": 96, "loss_chunk_size": 50}


def inputs(*shape, seed=0):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed))


def tiled(module, **settings):
    tile(module, TiledModule, Chunking(MiniSequenceConfig(**{"chunk_size": 40, **settings}), hidden_size=H))
    return module


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(H, H)

    def mixed(self, x):
        return x

    def forward(self, x):
        return torch.sigmoid(self.up(self.mixed(x)))


class RollsFar(Up):
    def mixed(self, x):
        return x + x.roll(90, 1)


class Dilated(Up):
    def mixed(self, x):
        kernel = torch.full((H, 1, 2), 0.5)
        return x + F.conv1d(F.pad(x.mT, (90, 0)), kernel, dilation=90, groups=H).mT


class ScalesWithLength(Up):
    def mixed(self, x):
        return x * max(1.0, math.log(x.shape[1]) / math.log(50))


class GuardsItsMaximum(Up):
    def mixed(self, x):
        return x / x.abs().amax().clamp(min=100.0)


class CountsItsPositions(Up):
    """The tokens behind the hundredth are left out."""

    def mixed(self, x):
        return x * (torch.ones(x.shape[:2], device=x.device).cumsum(1) <= 100)[..., None]


class WeakBranch(Up):
    """Frozen, and so weak that rounding hides it from few rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 1e-6), requires_grad=False)

    def mixed(self, x):
        return x + self.weight * F.pad(x, (0, 0, 1, 0))[:, :-1]


class WeakGather(Up):
    def mixed(self, x):
        before = (torch.arange(x.shape[1], device=x.device) - 1).clamp(min=0)
        return x + 1e-6 * x[:, before]


class DropsWeights(Up):
    def forward(self, x):
        return F.linear(x, F.dropout(self.up.weight, 0.5))


class SharedDraw(Up):
    def mixed(self, x):
        return x * (torch.rand(1) < 0.5)


class SharedNoise(Up):
    def forward(self, x):
        return F.linear(x, self.up.weight * (1 + 0.1 * torch.randn_like(self.up.weight)))


@pytest.mark.parametrize(
    "cls",
    [
        RollsFar,
        Dilated,
        ScalesWithLength,
        GuardsItsMaximum,
        CountsItsPositions,
        WeakBranch,
        WeakGather,
        DropsWeights,
        SharedDraw,
        SharedNoise,
    ],
)
def test_a_module_that_mixes_tokens_where_few_would_not_show_it_runs_as_a_whole(cls):
    module, x = tiled(cls()), inputs(2, 120)
    x[1, 100] *= 1000
    torch.manual_seed(3)
    y = module(x)
    assert whole_fallback_reason(module)
    untile(module)
    torch.manual_seed(3)
    assert torch.equal(module(x), y)


def test_a_first_call_of_one_token_decides_nothing():
    class Shifts(Up):
        def mixed(self, x):
            return x + F.pad(x, (0, 0, 1, 0))[:, :-1]

    module = tiled(Shifts(), chunk_size=1)
    module(inputs(1, 1))
    answer = tiled_module.token_wise_fallback_reason(module, lambda x: Shifts.forward(module, x), _call(inputs(1, 1)))
    assert answer == "its result for a token depends on others"
    y = module(inputs(2, 60))
    untile(module)
    assert torch.equal(module(inputs(2, 60)), y)


def _call(x):
    return tiled_module.RowArgs((x,), {})


class Scheduled(Up):
    """Mixes tokens once its schedule has started."""

    share, step = 0.0, 0

    def __init__(self):
        super().__init__()
        self.share, self.step = 0.0, 0
        self.register_buffer("gate", torch.zeros(()))

    def mixed(self, x):
        if self.share or self.gate.item():
            x = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x


@pytest.mark.parametrize("start", [lambda m: setattr(m, "share", 0.5), lambda m: m.gate.fill_(1.0)])
def test_a_verdict_is_asked_again_when_what_it_rests_on_changes(start):
    module, x = tiled(Scheduled()), inputs(2, 60)
    module(x)
    assert not whole_fallback_reason(module)
    start(module)
    y = module(x)
    assert whole_fallback_reason(module)
    untile(module)
    assert torch.equal(module(x), y)


def test_what_changes_at_every_call_costs_few_verifications(monkeypatch):
    asked, own = [], tiled_module.token_wise_fallback_reason
    monkeypatch.setattr(tiled_module, "token_wise_fallback_reason", lambda *a, **k: asked.append(1) or own(*a, **k))
    module, x = tiled(Scheduled()), inputs(2, 60)
    for step in range(20):
        module.step = step  # which it does not read
        module.ds_step = step
        module(x)
    assert len(asked) < 8 and not whole_fallback_reason(module)
    for share in range(1, 20):
        module.share = share / 100
        module(x)
    assert len(asked) < 16 and whole_fallback_reason(module)


class LogScale(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        self_attn, before = self.self_attn, self.self_attn.scaling
        self_attn.scaling = before * max(1.0, math.log(hidden_states.shape[1]) / math.log(60))
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            self_attn.scaling = before


class Reaches(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + 0.5 * hidden_states.roll(70, 1), **kwargs)


class Manager:
    losses = []
    calls = 0


class Auxiliary(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        Manager.calls += 1
        Manager.losses.append(hidden_states.pow(2).mean())
        return super().forward(hidden_states, **kwargs)


_kept = []
_keep = _kept.append  # out of the sight of whoever looks for lists


class AuxiliaryUnseen(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        _keep(hidden_states.pow(2).mean())
        return super().forward(hidden_states, **kwargs)


def test_a_part_of_the_graph_that_outlives_the_call():
    model, reference = (with_class(m, AuxiliaryUnseen) for m in twins("llama"))
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    assert_same_training(model, reference, batch(23))
    assert "keeps what it computed beyond the call" in whole_fallback_reason(model.model.layers[0])


@pytest.mark.parametrize("cls", [LogScale, Reaches])
def test_a_layer_that_depends_on_its_length(cls):
    model, reference = (with_class(m, cls) for m in twins("llama"))
    convert_to_mini_sequence(model, LARGE_CHUNKS)
    assert_same_training(model, reference, batch(55))
    assert_same_training(model, reference, batch(200))
    assert count_layers(model) == 0 and not mini_sequence_report(model).layers


def test_what_a_layer_hands_to_others_is_neither_lost_nor_counted_twice():
    model, reference = (with_class(m, Auxiliary) for m in twins("llama"))
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    found = []
    for m in (reference, model, model):
        Manager.losses, Manager.calls = [], 0
        m.zero_grad()
        loss = m(**batch(23)).loss + sum(Manager.losses)
        loss.backward()
        assert Manager.calls == len(Manager.losses) == 2
        found.append([loss.detach(), *(p.grad.clone() for p in m.parameters())])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_report_tells_what_training_does():
    model, reference = twins("llama")
    convert_to_mini_sequence(model, {"chunk_size": 10, "loss_chunk_size": 7})
    with torch.no_grad():
        model.eval()(**batch(23), use_cache=True)
    assert not mini_sequence_report(model).layers
    model.train()
    assert_same_training(model, reference, batch(23))
    assert len(mini_sequence_report(model).layers) == 2
    with torch.no_grad():
        model.eval()(**batch(23), use_cache=True)
    assert len(mini_sequence_report(model).layers) == 2


def test_an_attention_argument_that_differs_at_a_real_call(monkeypatch):
    """Where no probe shows it, the chunks' own calls are compared."""
    model, reference = (with_class(m, LogScale) for m in twins("llama"))
    convert_to_mini_sequence(model, {"chunk_size": 130, "loss_chunk_size": 50})
    monkeypatch.setattr(tiled_layer, "analyze_layer", lambda *_: tiled_layer.LayerAnalysis())
    assert_same_training(model, reference, batch(80))
    assert "'scaling' depends on the number of tokens" in whole_fallback_reason(model.model.layers[0])
