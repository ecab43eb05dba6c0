"""Roles by rule: architectures of unusual names, as somebody may bring one next month, and the forms that are known."""

import copy

import pytest
import torch
import torch.nn.functional as F
from heads import Output
from models import assert_same_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.conversion.detect import find_candidates
from ds_minis.tiling.modules.tiled_module import TiledModule

H, V = 16, 37
CHUNKS = {"chunk_size": 5, "loss_chunk_size": 7}


class Poise(nn.Module):
    """A norm that is not called one."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, H))

    def forward(self, x):
        return self.gain * x / x.abs().amax(-1, keepdim=True)


class Weave(nn.Module):
    """Mixes tokens, under a name that no rule knows."""

    def __init__(self):
        super().__init__()
        self.warp, self.weft, self.knot = (nn.Linear(H, H, bias=False) for _ in range(3))

    def forward(self, x):
        scores = self.warp(x) @ self.weft(x).transpose(-1, -2)
        return self.knot(scores.tril().cumsum(-1).tanh() @ x)


class Squish(nn.Module):
    """A feed-forward module: widens, squares, narrows."""

    def __init__(self, shift=False):
        super().__init__()
        self.widen, self.narrow, self.shift = nn.Linear(H, 3 * H), nn.Linear(3 * H, H), shift

    def forward(self, x):
        before = F.pad(x, (0, 0, 1, 0))[:, :-1] if self.shift else 0
        return self.narrow(self.widen(x + before).relu().square())


class Crowd(nn.Module):
    """A mixture of experts in fused weights, and a router whose outputs for all tokens the loss needs."""

    def __init__(self):
        super().__init__()
        self.usher, self.experts = nn.Linear(H, 4, bias=False), CrowdExperts()

    def forward(self, x):
        self.scores = self.usher(x.flatten(0, -2))
        weights, chosen = self.scores.softmax(-1).topk(2)
        return self.experts(x.flatten(0, -2), chosen, weights).view_as(x)


class CrowdExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, H, 24) / 4), nn.Parameter(torch.randn(4, 24, H) / 5)

    def forward(self, rows, chosen, weights):
        out = torch.zeros_like(rows)
        for expert in range(4):
            row, place = (chosen == expert).nonzero(as_tuple=True)
            y = (rows[row] @ self.up[expert]).relu() @ self.down[expert]
            out = out.index_add(0, row, y * weights[row, place, None])
        return out


class Plank(nn.Module):
    def __init__(self, squish):
        super().__init__()
        self.before, self.weave, self.between, self.squish = Poise(), Weave(), Poise(), squish

    def forward(self, x):
        x = x + self.weave(self.before(x))
        return x + self.squish(self.between(x))


class Zorblax(nn.Module):
    """A decoder that no rule was written for."""

    def __init__(self, squish=Squish, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.letters, self.planks = nn.Embedding(V, H), nn.ModuleList([Plank(squish()) for _ in range(layers)])
        self.last, self.mouth, self.checkpointing = Poise(), nn.Linear(H, V), False

    def get_output_embeddings(self):
        return self.mouth

    def forward(self, input_ids, labels=None):
        x = self.letters(input_ids)
        for plank in self.planks:
            x = checkpoint(plank, x, use_reentrant=False) if self.checkpointing else plank(x)
        logits = 3 * torch.tanh(self.mouth(self.last(x)) / 3)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        for plank in self.planks:
            if hasattr(plank.squish, "scores"):  # a loss of all tokens' routing
                loss = loss + plank.squish.scores.softmax(-1).mean(0).square().sum()
        return Output(loss=loss, logits=logits)


def batch():
    ids = torch.randint(0, V, (2, 23), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def grads(model):
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("squish", [Squish, lambda: Squish(shift=True), Crowd], ids=["dense", "shifts", "experts"])
def test_an_architecture_of_unusual_names_is_exact(squish, checkpointing):
    model, reference = Zorblax(squish), Zorblax(squish)
    model.checkpointing = reference.checkpointing = checkpointing
    convert_to_mini_sequence(model, CHUNKS)
    assert_same_tensors(grads(model), grads(reference))


def test_what_is_found_in_an_architecture_of_unusual_names():
    report = mini_sequence_report(convert_to_mini_sequence(Zorblax(), CHUNKS))
    poises = [f"planks.{i}.{name}" for i in range(2) for name in ("before", "between")]
    assert set(report.tiled) == {*poises, "planks.0.squish", "planks.1.squish", "last"}
    assert {name for name, _ in report.untiled.values()} == {"Weave", "Plank"} and "LM head Linear" in report.loss
    assert not report.layers and "no attention in it goes through" in report.untiled["planks.0"][1]


def test_what_is_not_token_wise_is_in_the_report_with_the_reason_after_the_first_step(capsys):
    model = convert_to_mini_sequence(Zorblax(lambda: Squish(shift=True)), CHUNKS)
    assert "planks.0.squish" in mini_sequence_report(model).tiled
    grads(model)
    report = mini_sequence_report(model)
    assert "planks.0.squish" not in report.tiled
    assert report.untiled["planks.1.squish"] == ("Squish", "its result for a token depends on others")
    assert "2 x Squish (its result for a token depends on others)" in str(report)


def test_experts_are_tiled_and_their_router_is_not():
    model = convert_to_mini_sequence(Zorblax(Crowd), CHUNKS)
    grads(model)
    report = mini_sequence_report(model)
    assert {name for name, cls in report.tiled.items() if cls == "CrowdExperts"} == {
        f"planks.{i}.squish.experts" for i in range(2)
    }
    assert "a mixture of experts" in report.untiled["planks.0.squish"][1]
    assert model.planks[0].squish.scores.shape == (46, 4)  # of all tokens, as it was


def test_chunks_keep_experts_busy():
    """With "auto", a chunk has enough tokens for each expert to have a matmul, not two rows."""
    model = convert_to_mini_sequence(Zorblax(Crowd), {"loss": False})
    experts = model.planks[0].squish.experts
    chunking = experts.mini_sequence_chunking
    dense, sparse = chunking.module_rows(100_000, H), chunking.module_rows(100_000, H, experts_per_choice=64)
    assert sparse >= 64 * 128 > dense


def test_a_module_that_layers_share_is_tiled_once():
    model, reference = Zorblax(), Zorblax()
    for m in (model, reference):
        m.planks[1].squish = m.planks[0].squish
    assert len([c for c in find_candidates(model) if c.role == "feed-forward"]) == 1
    convert_to_mini_sequence(model, CHUNKS)
    assert type(model.planks[0].squish).__mro__.count(TiledModule) == 1
    assert_same_tensors(grads(model), grads(reference))


class SeesAndSpeaks(Zorblax):
    """A language model with a tower for images."""

    def __init__(self):
        super().__init__()
        self.vision_tower = Zorblax()


def test_towers_are_left_alone_unless_named():
    model = copy.deepcopy(SeesAndSpeaks())
    report = mini_sequence_report(convert_to_mini_sequence(model, CHUNKS))
    assert not any(name.startswith("vision_tower") for name in report.tiled) and len(report.tiled) == 7
    assert report.untiled["vision_tower.planks.0.squish"][1].startswith("encodes images or sound; tiled only where")
    named = mini_sequence_report(
        convert_to_mini_sequence(SeesAndSpeaks(), {**CHUNKS, "include": ["vision_tower.*.squish"]})
    )
    assert set(named.tiled) == {"vision_tower.planks.0.squish", "vision_tower.planks.1.squish"}


def test_one_mixer_that_is_all_parts_of_a_layer():
    """As in Nemotron-H: a layer has one part, and the class tells which."""

    class ToyMLP(Squish):
        pass

    class ToyAttention(Weave):
        pass

    def layer(part):
        module = nn.Module()
        module.norm, module.mixer = nn.RMSNorm(H), part
        return module

    model = nn.Module()
    model.layers = nn.ModuleList([layer(ToyAttention()), layer(ToyMLP())])
    roles = {c.fqn: (c.role, bool(c.reason)) for c in find_candidates(model)}
    assert roles["layers.0.mixer"] == ("mixer", True) and roles["layers.1.mixer"] == ("feed-forward", False)


def test_a_layer_inside_of_a_layer():
    """As in Zamba: an attention layer that others share, inside of a state-space layer."""

    class SharedLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.squish = Weave(), Squish()

    outer = nn.Module()
    outer.mamba, outer.shared = Weave(), SharedLayer()
    model = nn.Module()
    model.layers = nn.ModuleList([outer])
    assert {c.fqn for c in find_candidates(model) if c.role == "feed-forward"} == {"layers.0.shared.squish"}


def test_one_list_for_each_part_of_all_layers():
    """As in XLM."""
    model = nn.Module()
    model.attentions = nn.ModuleList([Weave() for _ in range(2)])
    model.ffns = nn.ModuleList([Squish() for _ in range(2)])
    model.norms = nn.ModuleList([nn.LayerNorm(H) for _ in range(2)])
    report = mini_sequence_report(convert_to_mini_sequence(model, CHUNKS))
    assert set(report.tiled) == {f"{name}.{i}" for name in ("ffns", "norms") for i in range(2)}
