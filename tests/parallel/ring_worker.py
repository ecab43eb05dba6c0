"""Ring attention on four gloo processes, all cases in one start; run by test_ring.py.

python ring_worker.py CASES.json OUTPUT_FOLDER

Torch is imported once and the ranks are forked, as imports would take most of the time. Rank r writes r.json: for each case
the largest difference from plain attention in float64, relative to the largest value, of the output and each gradient.
"""

import hashlib
import json
import sys
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from support.forked import fork_ranks

from ds_minis.parallel.attention import ring
from ds_minis.parallel.attention.block_kernels import MATH
from ds_minis.parallel.attention.ring import ring_attention

RANKS = 4


def allowed(length: int, window: int | None, documents: torch.Tensor | None) -> torch.Tensor:
    """Which token sees which: (B or 1, 1, S, S)."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    mask = (j <= i) & (i - j < (window or length))
    if documents is None:
        return mask[None, None]
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])


def plain_attention(q, k, v, scale, mask):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def zigzag(x: torch.Tensor, rank: int, size: int, dim: int) -> torch.Tensor:
    parts = x.chunk(2 * size, dim)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim)


def difference(actual: torch.Tensor, exact: torch.Tensor, whole: torch.Tensor) -> float:
    assert actual.shape == exact.shape
    largest = whole.abs().max().item() or 1.0  # of queries that see themselves alone the gradient is 0
    return (actual.double() - exact).abs().max().item() / largest


def run(case: dict, group: dist.ProcessGroup) -> dict:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, width, value_width, dtype = case["batch"], case["width"], case["value_width"], getattr(torch, case["dtype"])
    length, scale = 2 * size * case["part"], 0.7 * width**-0.5
    generator = torch.Generator().manual_seed(len(case["name"]))
    shapes = [(case["heads"], width), (case["kv_heads"], width), (case["kv_heads"], value_width)]
    # As attention gets them in a model: views of (B, S, heads * width).
    whole = [torch.randn(batch, length, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    grad_out = torch.randn(batch, length, case["heads"], value_width, generator=generator, dtype=torch.float64).to(
        dtype
    )
    documents = None if case["documents"] is None else torch.tensor(case["documents"])

    exact = [x.double().transpose(1, 2).requires_grad_() for x in whole]
    exact_out = plain_attention(*exact, scale, allowed(length, case["window"], documents))
    grads = torch.autograd.grad(exact_out, exact, grad_out.double())
    own = [zigzag(x, rank, size, 1).transpose(1, 2).requires_grad_() for x in whole]
    kept: list[torch.Tensor] = []
    kwargs = {"group": group, "scale": scale, "window": case["window"], "documents": documents}
    bits = []
    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = ring_attention(*own, **kwargs)
        own_grads = torch.autograd.grad(out, own, zigzag(grad_out, rank, size, 1))
        bits.append([hashlib.sha256(x.float().numpy().tobytes()).hexdigest() for x in (out.detach(), *own_grads)])
    assert out.dtype == dtype and out.is_contiguous() and all(x.dtype == dtype for x in own_grads)
    exact_out = exact_out.detach()
    result = {"out": difference(out.detach(), zigzag(exact_out, rank, size, 1), exact_out)}
    for name, grad, whole_grad in zip(("dq", "dk", "dv"), own_grads, grads, strict=True):
        result[name] = difference(grad, zigzag(whole_grad, rank, size, 2), whole_grad)
    same = {x.untyped_storage().data_ptr() for x in (*own, out)}
    return result | {
        "again": bits[0] == bits[1],
        "kept": [list(x.shape) for x in kept],
        "copies": sum(x.untyped_storage().data_ptr() not in same for x in kept),
    }


def sent_bytes(group: dist.ProcessGroup) -> list[int]:
    """What this rank sends in a forward, and in a backward, of the shapes that test_ring.py knows."""
    counts, operation = [0, 0], dist.P2POp

    def counted(op, tensor, *args):
        if op is dist.isend:
            counts[backward] += tensor.nbytes
        return operation(op, tensor, *args)

    q, k, v = (torch.randn(1, heads, 8, 4, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    ring.dist.P2POp, backward = counted, 0
    try:
        out = ring_attention(q, k, v, group=group, scale=1.0)
        backward = 1
        out.sum().backward()
    finally:
        ring.dist.P2POp = operation
    return counts


def order_of_events(group: dist.ProcessGroup) -> tuple[list[list[str]], list[int]]:
    """When exchanges begin and are waited for, and when blocks are computed, in a forward and in a backward.

    Also how many of the tensors that arrived, or are to arrive, there are when an exchange has begun, at most.
    """
    events, hop, kernel_for = [[], []], ring.Hop, ring.kernel_for
    arrivals, held = [], [0, 0]

    class Hop(hop):
        def __init__(self, tensors, group, tag):
            self.name = {ring.KEYS: "keys", ring.GRADS: "grads"}[tag]
            events[backward].append(f"send {self.name}")
            super().__init__(tensors, group, tag)
            arrivals.extend(weakref.ref(x) for x in self.received)
            held[backward] = max(held[backward], sum(x() is not None for x in arrivals))

        def wait(self):
            events[backward].append(f"wait {self.name}")
            return super().wait()

    def noted(function):
        return lambda *args: events[backward].append("compute") or function(*args)

    def noted_kernel(*args):
        kernel = kernel_for(*args)
        return kernel._replace(forward=noted(kernel.forward), backward=noted(kernel.backward))

    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    ring.Hop, ring.kernel_for, backward = Hop, noted_kernel, 0
    try:
        out = ring_attention(q, k, v, group=group, scale=1.0)
        backward = 1
        out.sum().backward()
    finally:
        ring.Hop, ring.kernel_for = hop, kernel_for
    return events, held


def under_autocast(group: dist.ProcessGroup) -> tuple[list[str], bool]:
    """Dtypes of output and gradients, for queries in float32 and values in bfloat16; and whether autocast changes the kernel
    that is made of products of matrices, given bfloat16.
    """
    dtypes = torch.float32, torch.float32, torch.bfloat16
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=dtype, requires_grad=True) for dtype in dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(q, k, v, group=group, scale=1.0)
        out.sum().backward()
    narrow, results, kernel_for = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)], [], ring.kernel_for
    ring.kernel_for = lambda *args: MATH
    try:
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                narrow_out = ring_attention(*narrow, group=group, scale=1.0)
                results.append([narrow_out, *torch.autograd.grad(narrow_out.sum(), narrow)])
    finally:
        ring.kernel_for = kernel_for
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return [str(x.dtype) for x in (out, q.grad, k.grad, v.grad)], same


def main(rank: int, cases: list[dict], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([r]) for r in range(RANKS)]
    groups = {1: alone[rank], 2: halves[rank // 2], 4: None}
    results = {case["name"]: run(case, groups[case["size"]]) for case in cases}
    facts = {"sent": sent_bytes(None), "autocast": under_autocast(groups[2]), "events": order_of_events(None)}
    (folder / f"{rank}.json").write_text(json.dumps({"results": results, "facts": facts}))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    engines = [name for name in ("transformers", "accelerate", "deepspeed") if name in sys.modules]
    assert not engines, f"ring attention needs torch alone, and imported {engines}"
    sys.exit(fork_ranks(RANKS, lambda rank: main(rank, cases, folder)))
