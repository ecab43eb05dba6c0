"""Token-wise modules (feed-forward, norms) over chunks of tokens, by a class swap in place.

`module.__class__ = tiled_class(type(module))` keeps parameter names, hooks, `isinstance`, copies and adapter injection
as they were, and one assignment undoes it.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ds_minis.tiling.chunking import Chunking
from ds_minis.tiling.rows import tile_rows


class TiledModule(nn.Module):
    """Mixed into a token-wise module's class by `tiled_class`; runs that class's own forward over chunks.

    Attributes:
        mini_sequence_chunking: the chunk sizes; None (as on a module built from this class directly) means untiled.
    """

    mini_sequence_chunking: Chunking | None = None

    def forward(self, *args, **kwargs):
        forward, chunking = super().forward, self.mini_sequence_chunking
        inputs = [*args, *kwargs.values()]
        one_tensor = len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].dim() >= 2
        if not one_tensor or chunking is None or chunking.suspended:
            return forward(*args, **kwargs)
        (x,) = inputs
        width = x.shape[-1]
        x_RH = x.reshape(-1, width)
        chunk_rows = chunking.module_rows(x_RH.shape[0], width)
        if x_RH.shape[0] <= chunk_rows:
            return forward(*args, **kwargs)
        _require_weights(self)
        chunk_shape = [1] * (x.dim() - 2)

        def run(x_CH: Tensor) -> Tensor:
            y = forward(x_CH.view(*chunk_shape, *x_CH.shape))
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"{type(self).__name__} gives a {type(y).__name__}, and only modules that give one tensor can be tiled: "
                    'leave it out with "exclude" in the mini-sequence configuration'
                )
            return y.flatten(0, -2)

        guard = functools.partial(chunking.guarded, "chunk_size", chunk_rows, x_RH.shape[0])
        y = tile_rows(run, self, [x_RH], chunk_rows, guard)
        return y.view(*x.shape[:-1], y.shape[-1])

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the class it was made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_tiled, (untiled_class(type(self)),), *state


@functools.cache
def tiled_class(base: type[nn.Module]) -> type[nn.Module]:
    """The tiled subclass of a module class; the same one each time."""
    return type(f"MiniSequence{base.__name__}", (TiledModule, base), {"__module__": base.__module__})


def untiled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a tiled class was made from."""
    return cls.__mro__[cls.__mro__.index(TiledModule) + 1]


def tile_module(module: nn.Module, chunking: Chunking) -> None:
    """Makes a module run over chunks from now on. `module` must be token-wise."""
    module.__class__ = tiled_class(type(module))
    module.mini_sequence_chunking = chunking


def untile_module(module: nn.Module) -> None:
    """Undoes `tile_module`.

    Raises:
        RuntimeError: an engine has put a class of its own on top since.
    """
    cls = type(module)
    if TiledModule not in cls.__bases__:
        raise RuntimeError(
            f"cannot revert a {cls.__name__}: an engine (FSDP2 wraps by class too) was applied after the conversion. "
            "Revert before the engine wraps the model"
        )
    module.__class__ = untiled_class(cls)
    del module.mini_sequence_chunking


def _new_tiled(base: type[nn.Module]) -> nn.Module:
    cls = tiled_class(base)
    return cls.__new__(cls)


def _require_weights(module: nn.Module) -> None:
    """Refuses weights that an engine would gather inside, once per chunk: ranks that differ in length would hang."""
    for name, child in module.named_modules():
        if child is not module and any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise RuntimeError(
                f"fully_shard was applied to {name} inside of a tiled {type(module).__name__}, so every chunk would gather "
                "its weights on its own (and hang where ranks differ in length). Apply it to the decoder layer, or to the "
                'whole module, or leave the module out with "exclude" in the mini-sequence configuration'
            )
    for name, param in module.named_parameters():
        if param.numel() == 0 and hasattr(param, "ds_shape"):
            raise RuntimeError(
                f"{type(module).__name__}.{name} is partitioned by ZeRO-3 inside of a tiled module, so every chunk would "
                "gather it on its own (and hang where ranks differ in length). Convert the model before "
                "deepspeed.initialize, with ds_minis attached to DeepSpeed: do not set DS_MINIS_AUTOLOAD=0, or call "
                "ds_minis.register() first"
            )
