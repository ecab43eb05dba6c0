"""An error, out of memory or Ctrl-C inside a chunk: what is left behind (nothing), and the next step (exact)."""

import copy
import gc
import weakref

import pytest
import torch
from models import add_lora, assert_same_tensors, assert_same_training, batch, build, checkpointed, loss_and_grads
from torch import nn

from ds_minis import convert_to_mini_sequence
from ds_minis.loss.heads.chunked_head import HEAD, DeferringHead
from ds_minis.tiling.modules.tiled_module import TiledModule

CHUNKS = {"chunk_size": 10, "loss_chunk_size": 8}
MLP_CHUNKS, HEAD_CHUNKS = 5, 6  # of the 46 rows of a batch
FAULTS = [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt]


class Fault:
    """Stands in a module's forward, and raises at one of its calls; remembers every tensor that went through."""

    def __init__(self, kind: type[BaseException]):
        self.kind, self.calls, self.at = kind, 0, None
        self.seen: list[weakref.ref] = []

    def put_into(self, module: nn.Module) -> None:
        own = type(module).forward

        def forward(x):
            y = own(module, x)
            if not x.numel():  # a head whose forward is on the instance is asked for its output's type
                return y
            self.seen += [weakref.ref(x), weakref.ref(y)]
            self.calls += 1
            if self.calls == self.at:
                raise self.kind("the fault of this test")
            return y

        module.forward = forward


def place(model, where: str) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"mlp": base.model.layers[1].mlp.act_fn, "head": base.lm_head}[where]


def state(model) -> dict:
    """What a fault may not change."""
    report = next(m for m in model.modules() if isinstance(m, TiledModule)).mini_sequence_chunking
    return {
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "forwards": [id(m.__dict__.get("forward")) for m in model.modules()],
        "parameters": [(name, id(p), p.requires_grad, p.is_leaf) for name, p in model.named_parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
        "chunking": (report.suspended, list(report.passes)),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": torch.is_grad_enabled(),
        "default_rng": torch.default_generator.initial_seed(),
    }


def assert_same_state(now: dict, before: dict) -> None:
    for name, value in before.items():
        if name == "values":
            assert all(torch.equal(old, new) for old, new in zip(value, now[name], strict=True))
        else:
            assert now[name] == value, name


def pair(lora: bool, checkpointing: str, scope: str = "layer"):
    model = build("llama")
    if lora:
        model = add_lora(model)
    if checkpointing != "off":
        checkpointed(model, use_reentrant=checkpointing == "reentrant")
    return convert_to_mini_sequence(copy.deepcopy(model), {**CHUNKS, "scope": scope}), model


def fail(model, inputs, fault: Fault) -> BaseException:
    """Runs the step that fails; the exception without its traceback, which would hold every frame's tensors."""
    try:
        model(**inputs).loss.backward()
    except BaseException as error:
        return error.with_traceback(None)
    raise AssertionError(f"{fault.calls} calls, and no fault")


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    ("where", "backward"), [("mlp", False), ("mlp", True), ("head", False)], ids=["mlp-forward", "mlp-backward", "head"]
)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_a_chunk(kind, where, backward, checkpointing, scope):
    model, twin = pair(where == "mlp", checkpointing, scope)
    fault, inputs = Fault(kind), batch(23)
    fault.put_into(place(model, where))
    model(**inputs)  # the first call of each module verifies it on some rows
    fault.calls = 0
    model(**inputs)
    in_forward = fault.calls
    assert in_forward in ({MLP_CHUNKS}, {HEAD_CHUNKS})[where == "head"]
    fault.calls, fault.at = 0, in_forward * backward + 3  # the third chunk
    if backward and checkpointing == "reentrant" and scope == "tokens":
        fault.at += in_forward  # the layer is run again first
    fault.seen.clear()
    before = state(model)
    error = fail(model, inputs, fault)
    assert type(error) is kind and fault.calls == fault.at

    assert error.args == ("the fault of this test",)
    hint = "\n".join(getattr(error, "__notes__", []))
    setting, rows = ("loss_chunk_size", "8 of 46") if where == "head" else ("chunk_size", "10 of 46")
    assert (f'"{setting}"' in hint and rows in hint) if kind is torch.OutOfMemoryError else not hint

    gc.collect()
    assert len(fault.seen) >= 6 and not [ref for ref in fault.seen if ref() is not None]
    assert_same_state(state(model), before)
    model.zero_grad()
    assert_same_training(model, twin, batch(29, seed=1))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_random_state_and_autocast(backward):
    """Backward runs chunks again with forward's random state, and must give the caller's back; so for autocast."""
    model, twin = pair(lora=False, checkpointing="off")
    fault = Fault(RuntimeError)
    fault.put_into(place(model, "mlp"))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(23))  # the first call of each module verifies it on some rows
    fault.calls, fault.at = 0, 3 + 5 * backward
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        _, expected = torch.rand(7), torch.rand(1)
        torch.manual_seed(0)
        with pytest.raises(RuntimeError, match="the fault of this test"):
            if not backward:
                torch.rand(7)
            loss = model(**batch(23)).loss
            torch.rand(7)  # between forward and backward
            loss.backward()
        assert torch.equal(torch.rand(1), expected)
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        model.zero_grad()
        # Shorter than a chunk: nothing is tiled, so that weights in autocast's cache would be found.
        _, grads = loss_and_grads(model, batch(4))
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = loss_and_grads(twin, batch(4))
    assert_same_tensors(grads, expected, rtol=1e-2)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_while_generating(kind):
    """Without labels and gradients tiling is suspended: a fault must not leave it so."""
    model, twin = pair(lora=False, checkpointing="off")
    fault = Fault(kind)
    fault.put_into(place(model, "mlp"))
    fault.at = 1
    before = state(model)
    with torch.no_grad(), pytest.raises(kind):
        model(input_ids=batch(23)["input_ids"])
    # Ctrl-C outside of a tiled operation: torch runs none of our code, so this is put right by the next forward pass.
    if kind is not KeyboardInterrupt:
        assert_same_state(state(model), before)
    assert_same_training(model, twin, batch(23))
    assert_same_state(state(model), before)


def test_an_interrupt_between_chunks_is_put_right_by_the_next_step():
    model, twin = pair(lora=False, checkpointing="off")
    interrupt = model.model.layers[0].self_attn.register_forward_pre_hook(_interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        model(**batch(23))
    interrupt.remove()
    assert_same_training(model, twin, batch(23))
    now = state(model)
    for kept in ("classes", "attributes", "chunking"):
        assert now[kept] == before[kept]


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault_at", [2, 6], ids=["while the module is verified", "in a chunk"])
def test_copies_and_saves_after_an_interrupt(tmp_path, fault_at):
    model, twin = pair(lora=False, checkpointing="off")
    fault = Fault(KeyboardInterrupt)
    fault.put_into(place(model, "mlp"))
    fault.at = fault_at
    with pytest.raises(KeyboardInterrupt):
        model(**batch(23))
    assert not isinstance(model.lm_head, DeferringHead) and HEAD not in model.lm_head.__dict__
    del place(model, "mlp").forward
    model.save_pretrained(tmp_path)
    assert_same_training(copy.deepcopy(model), twin, batch(23))
