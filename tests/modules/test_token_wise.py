"""What is token-wise is told by behaviour: modules that look it and are not, and what is left of the asking (nothing)."""

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ds_minis.config import MiniSequenceConfig
from ds_minis.tiling.core.replay import has_values
from ds_minis.tiling.core.row_args import RowArgs
from ds_minis.tiling.modules import tiled_module
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import tile, untile, whole_fallback_reason
from ds_minis.tiling.modules.tiled_module import TiledModule
from ds_minis.tiling.verify.token_wise import token_wise_fallback_reason

H = 8


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(H, 12), nn.Linear(12, H), nn.Dropout(0.5)

    def forward(self, x, residual=0.0):
        return self.down(self.dropout(torch.sigmoid(self.up(x)))) + residual


class TokenShift(MLP):
    """As in RWKV: a token looks at the one before."""

    def forward(self, x):
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class CarriesState(MLP):
    """As RG-LRU in a cache: run by chunks in order it gives the whole's result, as it goes on from where it was."""

    state = None

    def forward(self, x):
        sums = x.flatten(0, -2).cumsum(0) + (0 if self.state is None else self.state)
        self.state = sums[-1].detach()
        return super().forward(sums.view_as(x))


class CountsTokens(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.shape[-2]
        return super().forward(x)


class NewBuffer(CountsTokens):
    def forward(self, x):
        self.seen = self.seen + 1
        return MLP.forward(self, x)


class CountsCalls(MLP):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class ExpertsChooseTokens(MLP):
    """Routing that mixes tokens: each expert takes the tokens that like it best."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        chosen = rows[:, 0].topk(max(1, len(rows) // 2)).indices
        return x + torch.zeros_like(rows).index_put((chosen,), super().forward(rows[chosen])).view_as(x)


class FixedLength(MLP):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(8, H))

    def forward(self, x):
        return super().forward(x + self.positions)


class Pair(MLP):
    def forward(self, x):
        return super().forward(x), x


class Pools(MLP):
    def forward(self, x):
        return super().forward(x).mean(-2)


WRONG = {
    TokenShift: "its result for a token depends on others",
    CarriesState: "it keeps state from one call to the next (state)",
    CountsTokens: "it keeps state from one call to the next (a tensor in place)",
    NewBuffer: "it keeps state from one call to the next (seen)",
    CountsCalls: "it keeps state from one call to the next (calls)",
    ExpertsChooseTokens: "its result for a token depends on others",
    FixedLength: "it fails on a part of the tokens (RuntimeError",
    Pair: "it gives a tuple, not one tensor",
    Pools: "its output has the shape (2, 8) for an input of (2, 23, 8)",
}


def ask(module, *args, **kwargs):
    return token_wise_fallback_reason(module, module.forward, RowArgs(args, kwargs))


def inputs(*shape):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_feed_forward_modules_and_norms_are_token_wise(dtype):
    for module in (MLP(), nn.LayerNorm(H), nn.RMSNorm(H), nn.Sequential(nn.LayerNorm(H), MLP())):
        assert ask(module.to(dtype), inputs(2, 23).to(dtype)) == ""
    assert ask(MLP().to(dtype), inputs(2, 23).to(dtype), residual=inputs(2, 23).to(dtype)) == ""


@pytest.mark.parametrize("cls", WRONG)
def test_modules_that_only_look_token_wise(cls):
    assert ask(cls(), inputs(2, 23)).startswith(WRONG[cls])
    assert ask(MLP(), inputs(2, 23)) == ""


@pytest.mark.parametrize("cls", [MLP, *WRONG])
def test_asking_leaves_nothing_behind(cls):
    module, heard = cls().train(), []
    for part in module.modules():
        if part is not module:
            part.register_forward_hook(lambda *_: heard.append(1))
            part.register_forward_pre_hook(lambda *_: heard.append(1))
    x = inputs(2, 23).requires_grad_()
    before = [{**m.__dict__, "_buffers": dict(m._buffers)} for m in module.modules()]
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    ask(module, x)
    assert torch.equal(torch.get_rng_state(), random) and not heard and x.grad is None
    assert all(p.grad is None for p in module.parameters())
    assert before == [{**m.__dict__, "_buffers": dict(m._buffers)} for m in module.modules()]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in values.items())
    module(x[:, :8])
    assert heard  # the hooks are back


def test_nothing_is_concluded_from_a_module_that_gives_the_same_for_every_token():
    module = TokenShift().requires_grad_(False)
    nn.init.zeros_(module.down.weight)
    assert ask(module, inputs(2, 23)) is None
    nn.init.normal_(module.down.weight)
    assert "depends on others" in ask(module, inputs(2, 23))


class MixesLater(MLP):
    """Starts as a feed-forward module, and learns to look back."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x + self.mu * F.pad(x, (0, 0, 1, 0))[:, :-1])


class HoldsInAList(MLP):
    def __init__(self):
        super().__init__()
        self.scales = [nn.Parameter(torch.ones(H))]

    def forward(self, x):
        return super().forward(x) * self.scales[0]


class Notes(MLP):
    def __init__(self):
        super().__init__()
        self.notes = []

    def forward(self, x):
        self.notes.append(x.mean())
        return super().forward(x)


def test_what_only_training_shows():
    assert ask(MixesLater(), inputs(2, 23)) == "its gradients for a token depend on others"
    shifts = TokenShift()
    nn.init.zeros_(shifts.down.weight)  # as a module that is to start as the identity is initialized
    assert "gradients for a token depend on others" in ask(shifts, inputs(2, 23))
    assert "a trainable tensor that it does not hold" in ask(HoldsInAList(), inputs(2, 23))
    noting = Notes()
    assert "keeps state from one call to the next (notes)" in ask(noting, inputs(2, 23)) and noting.notes == []


class Gated(MLP):
    """One number for all tokens, whose gradient is a sum of many that cancel."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gate


def test_rounding_in_bfloat16_is_no_mixing():
    torch.manual_seed(0)
    answers = [ask(Gated().bfloat16(), inputs(2, 100).bfloat16()) for _ in range(100)]
    assert answers.count("") >= 97


def test_large_weights_cost_no_gradient(monkeypatch):
    monkeypatch.setattr("ds_minis.tiling.verify.token_wise.LARGEST_WEIGHT", 1)
    asked, own = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda y, x, *args, **kw: asked.append(len(x)) or own(y, x, *args, **kw)
    )
    assert ask(MixesLater(), inputs(2, 23)) == "its gradients for a token depend on others"
    assert set(asked) == {2}  # the input and the one number


def test_what_is_given_to_the_module_is_not_written_to():
    class AddsInPlace(MLP):
        def forward(self, x, residual):
            return residual.add_(super().forward(x))

    residual = torch.ones(2, 23, H)
    ask(AddsInPlace(), inputs(2, 23), residual)
    assert torch.equal(residual, torch.ones(2, 23, H))


def test_weights_that_are_parametrized_for_one_call():
    """As PEFT's LoRA on parameters (`target_parameters`, for experts) does: gone when a chunk is run again."""
    module, x = tiled(MLP()), inputs(2, 23)

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    register_parametrization(module.up, "weight", Doubled())
    y = module(x)
    remove_parametrizations(module.up, "weight", leave_parametrized=False)
    assert "parametrized" in whole_fallback_reason(module) and y.requires_grad
    assert module.up.weight.grad is None
    y.sum().backward()
    assert module.up.weight.grad.abs().max() > 0


def test_flags_are_asked_for_each_value():
    class MayShift(TokenShift):
        def forward(self, x, shifts=False):
            return super().forward(x) if shifts else MLP.forward(self, x)

    module, x = tiled(MayShift()).eval(), inputs(2, 23)
    module(x, shifts=False)
    assert not whole_fallback_reason(module)
    module(x, shifts=True)
    assert "depends on others" in whole_fallback_reason(module)


def test_without_values_nothing_can_be_asked():
    assert not has_values(torch.empty(2, 3, H, device="meta"))
    assert has_values(inputs(2, 3))


def tiled(module):
    tile(module, TiledModule, Chunking(MiniSequenceConfig(chunk_size=5), hidden_size=H))
    return module


def test_a_module_that_is_not_token_wise_runs_as_a_whole_and_says_so_once(caplog):
    torch.manual_seed(0)
    module, x = TokenShift().eval(), inputs(2, 23)
    expected = module(x)
    with caplog.at_level(logging.WARNING, logger="ds_minis"):
        assert torch.equal(tiled(module)(x), expected) and torch.equal(module(x), expected)
    assert [r.message for r in caplog.records] == [
        "ds_minis: TokenShift is run as a whole: its result for a token depends on others"
    ]
    assert whole_fallback_reason(module) == "its result for a token depends on others"
    caplog.clear()
    tiled(TokenShift())(x)
    assert len(caplog.records) == 1, "another model is not warned of"


def test_a_module_is_asked_once_for_each_way_of_calling_it(monkeypatch):
    asked = []
    monkeypatch.setattr(
        tiled_module, "token_wise_fallback_reason", lambda module, forward, call, **_: asked.append(call.keys) or ""
    )
    module = tiled(MLP())
    module(inputs(2, 23)), module(inputs(2, 23))
    module(inputs(2, 23), residual=1.0)  # a number is no row
    assert asked == [(0,)]
    module(inputs(2, 23), residual=inputs(2, 23))
    module.eval()(inputs(2, 23))
    assert asked == [(0,), (0, "residual"), (0,)]


class ShiftsInSomeLayers(TokenShift):
    """Layers of one class that are not alike."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x):
        return super().forward(x) if self.layer_idx % 2 else MLP.forward(self, x)


def test_every_module_is_asked_for_itself():
    modules = [tiled(ShiftsInSomeLayers(layer_idx)).eval() for layer_idx in range(4)]
    x = inputs(2, 23)
    for module in modules:
        reference = copy.deepcopy(module)
        untile(reference)
        torch.testing.assert_close(module(x), reference(x))
    assert [bool(whole_fallback_reason(module)) for module in modules] == [False, True, False, True]


def test_a_hook_on_a_part_makes_a_module_run_as_a_whole_as_long_as_it_is_there():
    """As PEFT hands a layer what it needs for each sample (aLoRA, several adapters in a batch)."""
    module, x, lengths = tiled(MLP()).eval(), inputs(2, 23), []
    module.up.register_forward_pre_hook(_engines_hook)
    module(x)
    assert not whole_fallback_reason(module)
    handle = module.up.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape))
    module(x)
    assert lengths == [(2, 23, H)] and "has the hook test_a_hook_on_a_part" in whole_fallback_reason(module)
    handle.remove()
    calls = []
    module.up.forward = lambda rows: calls.append(len(rows.flatten(0, -2))) or nn.Linear.forward(module.up, rows)
    module(x)
    assert max(calls) == 5


def _engines_hook(module, args):
    pass


_engines_hook.__module__ = "deepspeed.runtime"


def test_dispatch_modes_do_not_see_the_asking():
    """Selective activation checkpointing would take the results of its matmuls for those of the module."""
    module, x = tiled(MLP()), inputs(2, 23).requires_grad_()
    module.dropout.p = 0.0
    layer = nn.Sequential(module, nn.LayerNorm(H))  # which needs the module's result again in backward
    matmuls = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    save = functools.partial(create_selective_checkpoint_contexts, matmuls)
    checkpoint(layer, x, use_reentrant=False, context_fn=save).sum().backward()
    reference, y = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    untile(reference[0])
    reference(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not whole_fallback_reason(module)


def test_other_tensors_with_a_row_for_each_token_are_cut_too():
    torch.manual_seed(0)
    module, x, residual = MLP().eval(), inputs(2, 23), torch.randn(2, 23, H)
    expected = module(x, residual)
    torch.testing.assert_close(tiled(module)(x, residual), expected)
    torch.testing.assert_close(module(x, residual=residual.view(46, H).view(2, 23, H)), expected)
    assert not whole_fallback_reason(module)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((inputs(2, 23), {"x": 1}), "its argument 1 is a dict, which may hold anything"),
        ((inputs(2, 23), torch.zeros(2)), "its argument 1 does not have one row for each token"),
        ((3,), "no tensor with a row for each token"),
    ],
)
def test_calls_that_cannot_be_cut(arguments, words):
    assert words in RowArgs(arguments, {}).reason


def test_rows_of_a_call():
    x, ids, flat = inputs(2, 3), torch.arange(6).view(2, 3), torch.arange(12.0).view(6, 2)
    call = RowArgs((x, 0.5), {"ids": ids, "flat": flat, "mode": "sum", "scale": torch.tensor(2.0)})
    assert (call.keys, call.num_rows, call.width, call.reason) == ((0, "ids", "flat"), 6, H, "")
    args, kwargs = call.with_rows([row[1:3] for row in call.rows()])
    assert args[0].shape == (1, 2, H) and args[1] == 0.5 and torch.equal(kwargs["ids"], torch.tensor([[1, 2]]))
    assert torch.equal(kwargs["flat"], flat[1:3]) and kwargs["mode"] == "sum" and kwargs["scale"] == 2
    few = call.narrowed(1, 2, torch.zeros_like)
    assert few.num_rows == 2 and torch.equal(few.input, torch.zeros(1, 2, H))
    assert [row.tolist() for row in few.rows()[1:]] == [[0, 1], [[0.0, 1.0], [2.0, 3.0]]]


def test_experts_chosen_per_token():
    rows, chosen, weights = inputs(6), torch.zeros(6, 4, dtype=torch.long), torch.zeros(6, 4)
    assert RowArgs((rows, chosen, weights), {}).choices == 4
    assert RowArgs((rows, weights), {}).choices == 0


class WeakShift(MLP):
    """A token looks at the one before, a little."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        return super().forward(x + self.share * F.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("dtype, share", [(torch.float64, 1e-4), (torch.float32, 0.03), (torch.bfloat16, 0.5)])
def test_weak_mixing_is_seen(dtype, share):
    torch.manual_seed(0)
    assert "depends on others" in ask(WeakShift(share).to(dtype), inputs(2, 23).to(dtype))


def test_rows_that_are_all_alike_hide_nothing():
    torch.manual_seed(0)
    assert "depends on others" in ask(TokenShift(), torch.zeros(2, 23, H))  # the rows asked with are random


def test_a_number_that_needs_a_gradient_is_not_cut():
    scale = torch.ones((), requires_grad=True)
    assert "its argument 'scale' does not have one row" in RowArgs((inputs(2, 3),), {"scale": scale}).reason


def test_a_module_that_told_nothing_is_asked_again():
    torch.manual_seed(0)
    module, x = tiled(TokenShift()).eval(), inputs(2, 23)
    torch.nn.init.zeros_(module.down.weight)
    module(x)
    torch.nn.init.normal_(module.down.weight)
    assert torch.equal(module(x), TokenShift.forward(module, x))


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm])
def test_norms_are_tiled_in_float64_too(make, monkeypatch):
    """In the norm's own dtype: a sum of gradients in float32 would be 1e-7 off. (Llama's norm computes in float32.)"""
    torch.manual_seed(0)
    norm = make(H).double()
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight))
    plain, x, grad = copy.deepcopy(norm), *torch.randn(2, 2, 17, H, dtype=torch.float64)
    tile(norm, TiledModule, Chunking(MiniSequenceConfig(scope="tokens", chunk_size=5), H))
    rows, run = [], tiled_module.tile_rows
    monkeypatch.setattr(
        tiled_module, "tile_rows", lambda f, m, x, n, *a, **k: rows.append(n) or run(f, m, x, n, *a, **k)
    )
    results = []
    for module in (norm, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    assert rows == [5] and not whole_fallback_reason(norm)
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12 if make is not LlamaRMSNorm else 1e-6, atol=1e-12)
