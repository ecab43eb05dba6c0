"""Stands in for logits that cannot be computed after the forward pass."""

from __future__ import annotations


def unreadable_error(reason: str) -> str:
    """The error for logits that cannot be computed, for the given reason."""
    return (
        f"the model's logits cannot be computed any more: {reason}. With labels, ds_minis computes them only as far as the "
        'loss needs them; "return_logits": true in the mini-sequence configuration gives all of them'
    )


class UnreadableLogits:
    """Replaces logits that cannot be computed after the forward pass; any use raises RuntimeError with the reason."""

    def __init__(self, reason: str):
        self.__dict__["reason"] = reason

    def __repr__(self) -> str:
        return f"UnreadableLogits({self.reason!r})"

    def __getattr__(self, name: str):
        if name.startswith("__") and name.endswith("__"):  # copy, pickle and traversals of outputs probe these
            raise AttributeError(name)
        raise RuntimeError(self.reason)

    def _refuse(self, *_, **__):
        raise RuntimeError(self.reason)

    __getitem__ = __len__ = __iter__ = __float__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __matmul__ = _refuse

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        next(v for v in values if isinstance(v, cls))._refuse()
