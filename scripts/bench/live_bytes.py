"""Counts the bytes of all tensors that are alive, and the matrix products, of whatever runs inside; on meta tensors too."""

from __future__ import annotations

import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_MATMULS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}


@dataclass(frozen=True)
class Live:
    """One storage that is alive: its size, and the operation and tensor that it was first seen as."""

    nbytes: int
    made_by: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside (or given to `hold`) and not yet freed, now and at their peak.

    A storage counts once, whatever views there are of it, from the operation that makes it until nothing holds it, or until
    it is resized to nothing, as FSDP2 does with gathered weights. Of a DTensor its shard counts. Storages on the CPU count
    apart, as the host's, where `device` is another device.

    Args:
        apart: tensors that are not counted, nor what is seen through them.
        with_meta: count tensors on the meta device, which stand for others in a simulation, but take no memory.
        flops_of: of other operations than matrix products, given their arguments.

    Attributes:
        now, peak: bytes on the device.
        at_peak: what was alive at the peak.
        host_peak: bytes on the host at their own peak.
        matmul_flops: of mm, addmm, bmm and baddbmm: 2 x rows x columns x inner.
        other_flops: of the operations of `flops_of`.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        trace: bool = False,
        apart: Iterable[Tensor] = (),
        with_meta: bool = True,
        flops_of: Mapping[object, Callable[[tuple], int]] | None = None,
    ):
        super().__init__()
        self.now = self.peak = self.host_now = self.host_peak = self.matmul_flops = self.other_flops = 0
        self.at_peak: list[Live] = []
        self._device, self._trace, self._flops_of = device, trace, flops_of or {}
        self._with_meta = with_meta
        self._live: dict[int, tuple[Live, bool]] = {}
        self._apart = [tensor.untyped_storage() for tensor in apart]  # held, or their addresses might be given again
        self._keys_apart = {storage._cdata for storage in self._apart}

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self._flops_of:
            self.other_flops += self._flops_of[func.overloadpacket](args)
        operands = _MATMULS.get(func.overloadpacket)
        if operands:
            a, b = (args[i] for i in operands)
            self.matmul_flops += 2 * math.prod(a.shape) * b.shape[-1]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor, str(func))
        return out

    def hold(self, tensor: Tensor, made_by: str) -> None:
        if is_traceable_wrapper_subclass(tensor):
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            for part in parts:
                if isinstance(part, Tensor):  # a DTensor has its mesh there too
                    self.hold(part, made_by)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._keys_apart or (tensor.is_meta and not self._with_meta):
            return
        on_host = self._device != "cpu" and tensor.device.type == "cpu"
        live = Live(storage.nbytes(), made_by, tuple(tensor.shape), tensor.dtype, _where() if self._trace else "")
        self._live[key] = live, on_host
        weakref.finalize(storage, self._free, key)
        self._add(live.nbytes, on_host)

    def _add(self, nbytes: int, on_host: bool) -> None:
        if on_host:
            self.host_now += nbytes
            self.host_peak = max(self.host_peak, self.host_now)
            return
        self.now += nbytes
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = [entry for entry, host in self._live.values() if not host]

    def _free(self, key: int) -> None:
        live, on_host = self._live.pop(key)
        self._add(-live.nbytes, on_host)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        out = self._resize(storage, size)
        if storage._cdata in self._live:
            live, on_host = self._live[storage._cdata]
            self._live[storage._cdata] = replace(live, nbytes=size), on_host
            self._add(size - live.nbytes, on_host)
        return out

    def summary(self, count: int = 40) -> str:
        """The largest entries of what was alive at the peak, equal ones together."""
        sizes, numbers = Counter(), Counter()
        for live in self.at_peak:
            key = live.made_by, live.shape, live.dtype, live.where
            sizes[key] += live.nbytes
            numbers[key] += 1
        lines = []
        for (made_by, shape, dtype, where), nbytes in sizes.most_common(count):
            number = numbers[made_by, shape, dtype, where]
            lines.append(f"{nbytes / 2**30:9.3f} GiB = {number} x {list(shape)} {str(dtype)[6:]} {made_by}{where}")
        return "\n".join(lines)


def _where() -> str:
    """The last calls of code that is neither torch's nor a benchmark's."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/bench/" not in f.filename]
    return "".join(f"\n              {f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames[-6:])
