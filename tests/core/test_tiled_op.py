"""The tiling core on single modules, against a plain loop over the same chunks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ds_minis.config import MiniSequenceConfig
from ds_minis.tiling.core.tiled_op import tile_rows
from ds_minis.tiling.modules.state import Chunking
from ds_minis.tiling.modules.swap import tile, untile
from ds_minis.tiling.modules.tiled_module import TiledModule

H, I, CHUNK = 16, 24, 5


class MLP(nn.Module):
    """A gated feed-forward module, with everything that can go wrong as an option."""

    def __init__(self, dropout=0.0, bias=True, inplace=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias), nn.Linear(H, I, bias)
        self.down_proj = nn.Linear(I, H, bias)
        self.dropout, self.inplace = nn.Dropout(dropout), inplace

    def forward(self, x):
        y = self.down_proj(self.dropout(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x)))
        return y.tanh_() if self.inplace else y


def tiled(module, chunk_size=CHUNK):
    module = copy.deepcopy(module)
    tile(module, TiledModule, Chunking(MiniSequenceConfig(chunk_size=chunk_size), hidden_size=H))
    return module


def loop(module, x, chunk_size=CHUNK):
    """What the tiled module must equal, random numbers included."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat([module(chunk) for chunk in rows.split(chunk_size)]).view(*x.shape[:-1], -1)


def run(function, module, x, seed=0):
    """Output and gradients of input and parameters for a fixed, uneven incoming gradient."""
    x = x.clone().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    y = function(x)
    after = torch.rand(1)
    module.zero_grad()
    torch.manual_seed(seed + 1)
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype))
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [y.detach(), after, torch.rand(1), x.grad, *grads]


def assert_same(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, **tolerance)


def inputs(*shape, requires_grad=True):
    torch.manual_seed(3)
    return torch.randn(*shape, H).requires_grad_(requires_grad)


@pytest.mark.parametrize("shape", [(23,), (2, 11), (3, 5), (1, 20), (2, 3, 4), (1, 3)])
@pytest.mark.parametrize("kwargs", [{}, {"dropout": 0.4}, {"bias": False}, {"inplace": True}])
def test_equals_a_plain_loop_over_chunks(shape, kwargs):
    module = MLP(**kwargs)
    mini, x = tiled(module), inputs(*shape)
    assert_same(run(mini, mini, x), run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)


def test_transposed_input():
    module, x = MLP(), inputs(7, 3).transpose(0, 1)
    mini = tiled(module)
    assert_same(run(mini, mini, x)[:1], run(module, module, x)[:1])
    torch.testing.assert_close(mini(x), module(x))


def test_dropout_is_replayed_under_checkpointing():
    module, x = MLP(dropout=0.5), inputs(2, 11)
    mini = tiled(module)
    actual = run(lambda x: checkpoint(mini, x, use_reentrant=False), mini, x)
    assert_same(actual, run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    module, x = MLP(dropout=0.5).train(), inputs(2, 11)
    mini = tiled(module)

    def evaluated_between(x):
        y = mini(x)
        mini.eval()
        return y

    actual = run(evaluated_between, mini, x)
    assert not mini.dropout.training
    assert_same(actual, run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)


def test_a_module_that_is_set_anew_for_each_use_is_run_again_as_it_was():
    """As one that layers share, with a scale for each."""

    class Scaled(MLP):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    module, x = Scaled(), inputs(23)
    module.scale = 1.0
    mini = tiled(module)

    def twice(m):
        y = torch.zeros_like(x)
        for scale in (2.0, -3.0):
            m.scale = scale
            y = y + m(x)
        return y

    actual, expected = run(lambda _: twice(mini), mini, x), run(lambda _: twice(module), module, x)
    assert mini.scale == -3.0
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_residual_is_part_of_the_incoming_one():
    """As in Bloom, whose MLP is given the residual: written over too early, the incoming gradient would be lost for it."""

    class AddsResidual(MLP):
        def forward(self, x, residual):
            return super().forward(x) + residual

    module, x, residual = AddsResidual(), inputs(2, 11), inputs(2, 11).detach().clone().requires_grad_()
    mini = tiled(module)
    grads = []
    for m in (mini, module):
        (m(x * 1, residual * 1) * torch.linspace(-1, 2, H)).sum().backward()
        grads.append([t.grad.clone() for t in (x, residual, *m.parameters())])
        x.grad = residual.grad = None
    assert_same(*grads, rtol=1e-5, atol=1e-6)


def test_each_parameter_gets_one_gradient_per_backward():
    mini, counts = tiled(MLP()), {}
    for name, param in mini.named_parameters():
        param.register_hook(lambda grad, name=name: counts.update({name: counts.get(name, 0) + 1}))
    mini(inputs(23)).sum().backward()
    assert counts == {name: 1 for name, _ in mini.named_parameters()}


def matmul_flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_no_flop_more_than_activation_checkpointing():
    module, x = MLP(), inputs(2, 50)
    mini = tiled(module)

    def step(m):
        return lambda: checkpoint(m, x, use_reentrant=False).sum().backward()

    mini(x)  # the first call verifies that the module is token-wise
    plain = matmul_flops(step(module))
    assert plain == (3 + 2 + 6) * 2 * 100 * H * I  # forward, recomputation up to the last projection, backward
    assert matmul_flops(step(mini)) == plain


def test_frozen_parameters_get_no_gradient_and_no_work():
    module, x = MLP().requires_grad_(False), inputs(2, 50)
    module.up_proj.weight.requires_grad_(True)
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)
    # forward, recomputation without the last projection, gradients of x (three products) and of one weight
    assert matmul_flops(lambda: mini(x).sum().backward()) == (3 + 2 + 3 + 1) * 2 * 100 * H * I


def test_input_without_gradient():
    module, x = MLP(), inputs(23, requires_grad=False)
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["no_grad", "nothing requires it"])
def test_without_need_of_gradients_nothing_is_saved(mode):
    mini, x, saved = tiled(MLP()), inputs(23), []
    if mode == "nothing requires it":
        mini.requires_grad_(False)
        x = x.detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.set_grad_enabled(mode != "no_grad"):
            y = mini(x)
    assert not saved and not y.requires_grad


def test_only_the_input_and_the_weights_are_saved():
    mini, x, saved = tiled(MLP()), inputs(23), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mini(x)
    own = {p.data_ptr() for p in mini.parameters()} | {x.data_ptr()}
    assert {t.data_ptr() for t in saved} == own


def test_double_use_in_one_backward():
    module, x = MLP(), inputs(23)
    mini = tiled(module)
    assert_same(
        run(lambda x: mini(mini(x)), mini, x), run(lambda x: module(module(x)), module, x), rtol=1e-5, atol=1e-6
    )


def test_weight_used_twice_inside_one_module():
    class Tied(MLP):
        def __init__(self):
            super().__init__()
            self.up_proj.weight = self.gate_proj.weight

    module, x = Tied(), inputs(23)
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(module, module, x), rtol=1e-5, atol=1e-6)


def test_last_linear_that_is_used_before_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(H, H)

        def forward(self, x):
            return self.linear(torch.sigmoid(self.linear(x)))

    module, x = Twice(), inputs(23)
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(module, module, x), rtol=1e-5, atol=1e-6)


def test_two_biases_that_share_one_gradient_tensor():
    class Biases(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H))

        def forward(self, x):
            return x * 2 + (self.a + self.b)

    module, x = Biases(), inputs(23)
    for chunk in (1, CHUNK):
        mini = tiled(module, chunk)
        assert_same(run(mini, mini, x), run(module, module, x), rtol=1e-5, atol=1e-5)


def test_parameters_that_take_no_part():
    class Unused(MLP):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.randn(H))

    module, x = Unused(), inputs(23)
    mini = tiled(module)
    actual = run(mini, mini, x)
    assert_same(actual, run(lambda x: loop(module, x), module, x), rtol=1e-5, atol=1e-6)
    assert mini.unused.grad is None


def test_chunks_that_need_no_gradient_although_weights_are_trainable():
    class Frozen(MLP):
        def forward(self, x):
            return super().forward(x).detach()

    mini = tiled(Frozen())
    mini(inputs(23, requires_grad=False)).sum().backward()
    assert all(p.grad is None for p in mini.parameters())
    x = inputs(23)
    mini(x).sum().backward()
    assert x.grad.eq(0).all()


def test_trainable_tensors_outside_of_the_parameters():
    """As FSDP1 with use_orig_params=False and nn.DataParallel's replicas hold them."""
    module, x = MLP(), inputs(23)
    mini, weight = tiled(module), module.up_proj.weight.detach().clone().requires_grad_()
    del mini.up_proj._parameters["weight"]
    mini.up_proj.__dict__["weight"] = weight
    y = mini(x)
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    expected = run(lambda x: loop(module, x), module, x.detach().requires_grad_())
    torch.testing.assert_close(weight.grad, expected[4:][list(dict(module.named_parameters())).index("up_proj.weight")])


def test_trainable_tensors_that_move_between_forward_and_backward():
    """As FSDP1 with use_orig_params=True moves them, from `__dict__` to `_parameters`."""
    module, x = MLP(), inputs(23)
    mini = tiled(module)
    weight = mini.up_proj._parameters.pop("weight")
    mini.up_proj.__dict__["weight"] = weight
    y = mini(x)
    mini.up_proj._parameters["weight"] = mini.up_proj.__dict__.pop("weight")
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    module(x).backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    torch.testing.assert_close(weight.grad, module.up_proj.weight.grad)
    assert mini.up_proj.weight is weight and "weight" not in mini.up_proj.__dict__


def test_weight_gradients_are_summed_in_float32():
    torch.manual_seed(0)
    module, x = nn.Linear(H, H, bias=False), torch.randn(128 * 32, H)
    grad = torch.randn(128 * 32, H)
    exact = (grad.double().t() @ x.double()).float()
    mini = tiled(nn.Sequential(module), 32).to(torch.bfloat16)
    mini(x.bfloat16().requires_grad_()).backward(grad.bfloat16())
    error = (next(mini.parameters()).grad.float() - exact).norm() / exact.norm()
    assert error < 0.009, error  # summed in bfloat16: over 0.02


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_state_is_replayed(enabled):
    seen = []
    note = seen.append  # a list that the forward itself names would be state that it keeps

    class Spy(MLP):
        def forward(self, x):
            note((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(x)

    def autocast(function):
        def call(x):
            with torch.autocast("cpu", torch.float16, enabled=enabled):
                return function(x)

        return call

    module, x = Spy(), inputs(23)
    mini = tiled(module)
    expected = run(autocast(lambda x: loop(module, x)), module, x)
    autocast(mini)(x)  # the first call verifies that the module is token-wise
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):  # whatever is on when backward runs
        actual = run(autocast(mini), mini, x)
    assert len(seen) == 10 and {state[1:] for state in seen} == {(enabled, torch.float16)}
    assert actual[0].dtype == expected[0].dtype
    assert_same(actual, expected, rtol=1e-2, atol=1e-2)


def test_autocast_does_not_keep_weights_that_were_cast_without_a_graph():
    module = MLP()
    mini = tiled(module)
    with torch.autocast("cpu", torch.bfloat16):
        mini(inputs(23))
        mini.up_proj(inputs(3)).sum().backward()
    assert mini.up_proj.weight.grad is not None


def test_error_inside_a_chunk_restores_the_module():
    class Fails(MLP):
        fail = False

        def forward(self, x):
            if self.fail and torch.is_grad_enabled():
                raise RuntimeError("inside")
            return super().forward(x)

    mini, x = tiled(Fails()), inputs(23)
    params, state = list(mini.parameters()), torch.get_rng_state()
    y = mini(x)
    mini.fail = True
    with pytest.raises(RuntimeError, match="inside"):
        y.sum().backward()
    assert all(a is b for a, b in zip(params, mini.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all("forward" not in m.__dict__ for m in mini.modules())
    mini.fail = False
    mini(x).sum().backward()


def test_backward_twice_with_retain_graph():
    mini, x = tiled(MLP()), inputs(23)
    y = mini(x).sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in mini.parameters()]
    y.backward()
    for param, grad in zip(mini.parameters(), once, strict=True):
        torch.testing.assert_close(param.grad, 2 * grad)


def test_function_that_mixes_rows_is_noticed():
    with pytest.raises(AssertionError, match="not a function of rows"):
        tile_rows(lambda x: x.mean(0, keepdim=True), nn.Identity(), [inputs(23)], CHUNK)


def test_weights_that_zero3_has_partitioned_are_refused():
    mini = tiled(MLP())
    mini.up_proj.weight = nn.Parameter(torch.empty(0))
    mini.up_proj.weight.ds_shape = (I, H)
    with pytest.raises(RuntimeError, match="up_proj.weight is partitioned by ZeRO-3"):
        mini(inputs(23))


def test_fully_shard_inside_a_tiled_module_is_refused():
    class FSDPModule:
        pass

    mini = tiled(MLP())
    mini.up_proj.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    with pytest.raises(RuntimeError, match="fully_shard was applied to up_proj"):
        mini(inputs(23))


def test_revert_under_an_engines_class_is_refused():
    mini = tiled(MLP())
    mini.__class__ = type("FSDPMLP", (type(mini),), {})
    with pytest.raises(RuntimeError, match="Revert before the engine"):
        untile(mini)


def test_result_that_is_a_part_of_the_last_linear():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(H, I)

        def forward(self, x):
            return self.linear(input=x)[..., :H]

    module, x = Part(), inputs(23)
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(module, module, x), rtol=1e-5, atol=1e-6)


def test_hook_on_the_last_linear_sees_its_output():
    module, x = MLP(), inputs(23)
    module.down_proj.register_forward_hook(lambda m, args, out: out.square())
    mini = tiled(module)
    assert_same(run(mini, mini, x), run(module, module, x), rtol=1e-4, atol=1e-5)


def test_gradient_of_a_part_of_the_inputs_costs_only_that():
    mini, x = tiled(MLP()), inputs(2, 50)
    y = mini(x)
    flops = matmul_flops(lambda: torch.autograd.grad(y.sum(), mini.down_proj.weight))
    assert flops < matmul_flops(lambda: mini(x).sum().backward())
    torch.testing.assert_close(
        torch.autograd.grad(mini(x).sum(), mini.up_proj.bias)[0],
        torch.autograd.grad(loop(mini, x).sum(), mini.up_proj.bias)[0],
    )


def test_class_swap_is_undone():
    module = MLP()
    before = module.__dict__.keys()
    tile(module, TiledModule, Chunking(MiniSequenceConfig(), H))
    assert isinstance(module, MLP) and isinstance(module, TiledModule)
    untile(module)
    assert type(module) is MLP and module.__dict__.keys() == before


@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))

        def forward(self, x):
            return x * self.weight

    module = Double()
    tile(module, TiledModule, Chunking(MiniSequenceConfig(chunk_size=65536), hidden_size=4096))
    rows = 2**31 // 4096 + 8
    x = torch.zeros(1, rows, 4096, dtype=torch.bfloat16)
    x[0, -1], x[0, 0] = 3, 1
    x.requires_grad_()
    y = module(x)
    assert y[0, -1].eq(3).all() and y[0, -2].eq(0).all() and y[0, 0].eq(1).all()
    # Zero everywhere but in the last row: cheap to make, and only right if the last row is found.
    grad = torch.zeros((), dtype=torch.bfloat16).expand(1, rows - 1, 4096)
    grad = torch.cat([grad, torch.full((1, 1, 4096), 2.0, dtype=torch.bfloat16)], dim=1)
    del y
    torch.autograd.backward(module(x), grad)
    assert x.grad[0, -1].eq(2).all() and x.grad[0, -2].eq(0).all()
    assert module.weight.grad.eq(6).all()
