"""Changes a model's RoPE for long sequences, before it is loaded or after, and computes it exactly there.

Two things go wrong without a word at long lengths:

- `model.to(torch.bfloat16)`, DeepSpeed's bf16 and FSDP's buffer dtype round `inv_freq`. The angle at position p is then off
  by up to p * inv_freq / 512: a cosine at 1M tokens is wrong by up to 1.95.
- In float32 an angle of 1M radians is a multiple of 1/16. transformers multiplies positions and frequencies in float32, so a
  cosine is off by up to 0.06 at 1M tokens even where nothing was rounded.

`exact_rope` swaps the class of the rotary embeddings: their own forward then runs in float64, from frequencies that no cast
reaches, and its result is rounded once. At short positions it is what transformers computes, to float32's rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel

# Frequencies of these are functions of the configuration alone. The others' depend on the length of each call ("dynamic",
# "longrope"), or are not of one axis ("axial").
TYPES = ("default", "linear", "yarn", "llama3", "proportional")
_LOCAL = ("sliding", "chunked", "local")  # layer types that see a window: a longer sequence changes nothing for them
_EXACT = "ds_minis_exact_rope"


def with_rope(config: PreTrainedConfig, *, theta: float, length: int) -> PreTrainedConfig:
    """A copy of a model's configuration with another RoPE base and room for `length` positions.

    Give it to `from_pretrained(..., config=...)`: what is changed after a model was made is ignored by it.

    A type with a scaling ("linear", "yarn", "llama3") keeps it, with the lengths it was made for; layers that see a window
    keep their base.

    Raises:
        ValueError: the model has no RoPE, or one of a type that cannot be changed so.
    """
    config = copy.deepcopy(config)
    _set_rope(config, theta, length)
    return config


def change_rope(model: PreTrainedModel, *, theta: float, length: int) -> PreTrainedModel:
    """The same for a model that is there: changes its configuration and its rotary embeddings, which are exact from then on.

    Raises:
        ValueError: as `with_rope`.
    """
    rotary = _require_rotary(model)
    configs = {id(config): config for config in (model.config, *(module.config for _, module in rotary))}
    for config in configs.values():
        _set_rope(config, theta, length)
    for _, module in rotary:
        fresh = plain_class(module)(module.config)
        for key, buffer in fresh.named_buffers():
            module.register_buffer(key, buffer.to(getattr(module, key).device, torch.float32), persistent=False)
        module.__dict__.pop(_EXACT, None)
    return exact_rope(model)


def exact_rope(model: PreTrainedModel) -> PreTrainedModel:
    """Has the model's rotary embeddings compute angles in float64, whatever the model is cast to; returns the model.

    Raises:
        ValueError: the model has no RoPE, one whose frequencies depend on the length of a call, or one that is not what the
            model's configuration says.
    """
    for name, module in _require_rotary(model):
        if _EXACT in module.__dict__:
            continue
        exact = _float64_copy(module)
        for key, frequencies in _frequencies(module):
            _require_same(f"{name}.{key}", frequencies, dict(_frequencies(exact))[key])
        # Not a submodule: `.to()`, engines and checkpoints must not find it.
        module.__dict__[_EXACT] = exact
        module.__class__ = _exact_class(plain_class(module))
        module._apply(lambda tensor: tensor)
    return model


def rope_error(model: PreTrainedModel, length: int) -> float:
    """The largest difference between the model's cosines and sines and float64's, at three of `length` positions."""
    return max(_error(module, length) for _, module in _require_rotary(model))


def check_rope(model: PreTrainedModel, length: int, tolerance: float = 1e-5) -> None:
    """Asserts, once an engine has cast the model, that its RoPE is still right at `length` tokens.

    Raises:
        ValueError: it is not; with the dtype of the frequencies and the size of the error.
    """
    for name, module in _require_rotary(model):
        error = _error(module, length)
        if error <= tolerance:
            continue
        dtypes = {str(frequencies.dtype).removeprefix("torch.") for _, frequencies in _frequencies(module)}
        raise ValueError(
            f"{name}: cosines and sines at position {length - 1:,} are wrong by {error:.2g} (frequencies in "
            f"{', '.join(sorted(dtypes))}). Call ds_minis.context.rope.exact_rope(model) before the model is cast"
        )


def rope_theta_of(config: PreTrainedConfig) -> float:
    """The base that a configuration has now (of the layers that see the whole sequence).

    Raises:
        ValueError: it has no RoPE.
    """
    return float(_parameters(config.get_text_config())[0]["rope_theta"])


def rope_type_of(config: PreTrainedConfig) -> str:
    """RoPE's type in a configuration (of the layers that see the whole sequence).

    Raises:
        ValueError: it has no RoPE.
    """
    return _parameters(config.get_text_config())[0].get("rope_type", "default")


class _ExactRope(nn.Module):
    """Mixin of the classes that `exact_rope` swaps in."""

    @torch.compiler.disable  # the function mode below is no operation that could be compiled
    @torch.no_grad()
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the class's own forward gives; computed in float64, rounded to its dtypes once.

        Args:
            x: (..., hidden size); only its device and dtype are read.
        """
        exact = self.__dict__[_EXACT]
        if next(exact.buffers()).device != x.device:
            exact.to(x.device)
        with _Float64():
            outputs = plain_class(self).forward(exact, x, *args, **kwargs)
        return outputs if x.dtype == torch.float64 else tree_map(_to_single, outputs)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        exact = dict(_frequencies(self.__dict__[_EXACT]))
        for key, frequencies in _frequencies(self):
            if not frequencies.is_meta:
                self._buffers[key] = exact[key].to(frequencies.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "angles in float64")))

    def __reduce_ex__(self, protocol):
        # The class is made at run time: copies and pickles refer to the one it was made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_exact, (plain_class(self),), *state


class _Float64(TorchFunctionMode):
    """Inside, what is asked to be float32 is float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_to_double, args), **{key: _to_double(value) for key, value in (kwargs or {}).items()})


def _to_double(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _to_single(output: Any) -> Any:
    single = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    return output.to(single.get(output.dtype, output.dtype)) if isinstance(output, torch.Tensor) else output


@functools.cache
def _exact_class(base: type[nn.Module]) -> type[nn.Module]:
    """The exact subclass of a class of rotary embeddings, with its name: engines find modules by name."""
    own = {"__module__": base.__module__, "__qualname__": f"ExactRope[{base.__qualname__}]"}
    return type(base.__name__, (_ExactRope, base), own)


def plain_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__mro__[cls.__mro__.index(_ExactRope) + 1] if issubclass(cls, _ExactRope) else cls


def _new_exact(base: type[nn.Module]) -> nn.Module:
    cls = _exact_class(base)
    return cls.__new__(cls)


def _float64_copy(module: nn.Module) -> nn.Module:
    """A rotary embedding of the same class and configuration, whose frequencies were computed in float64."""
    with torch.device("cpu"), _Float64():
        return plain_class(module)(module.config)


def _require_rotary(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The rotary embeddings of the language model, with their names.

    Raises:
        ValueError: there are none, or one is of a type that is not in `TYPES`.
    """
    kind = type(model.config.get_text_config())
    rotary = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "rope_type")
        and isinstance(getattr(module, "config", None), kind)
        and any(_frequencies(module))
    ]
    if not rotary:
        raise ValueError(
            f"{type(model).__name__} has no rotary embedding that is made from its configuration: its positions cannot be "
            "changed. Leave --rope_theta out"
        )
    for name, module in rotary:
        types = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
        for rope_type in types:
            _require_type(rope_type, name)
    return rotary


def _require_type(rope_type: str | None, where: str) -> None:
    if rope_type is not None and rope_type not in TYPES:
        raise ValueError(
            f"{where}: RoPE of type {rope_type!r} has frequencies that depend on more than its base. One of "
            f"{', '.join(TYPES)} is allowed: set rope_type in the configuration's rope_parameters"
        )


def _frequencies(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((key, buffer) for key, buffer in module.named_buffers(recurse=False) if key.endswith("inv_freq"))


def _require_same(name: str, frequencies: torch.Tensor, exact: torch.Tensor) -> None:
    """Raises if a module's frequencies are not those of its configuration, but for the rounding of their dtype."""
    if frequencies.is_meta:
        return
    exact = exact.to(frequencies.device)
    rounding = 4 * torch.finfo(frequencies.dtype).eps
    close = frequencies.shape == exact.shape and torch.allclose(frequencies.double(), exact, rtol=rounding, atol=0)
    if not close:
        raise ValueError(
            f"{name} is not what the model's configuration says: rope_parameters were changed after the model was made, "
            "which does nothing. Load it with config=with_rope(...), or call change_rope(model, ...)"
        )


@torch.no_grad()
def _error(module: nn.Module, length: int) -> float:
    exact = _float64_copy(module)
    device = next(module.buffers()).device
    positions = torch.tensor([[0, length // 2, length - 1]], device=device)
    layer_types = list(module.rope_type) if isinstance(module.rope_type, dict) else [None]
    worst = 0.0
    for layer_type in layer_types:
        which = {} if layer_type is None else {"layer_type": layer_type}
        x = torch.zeros(1, 3, 1, device=device)
        got = module(x, positions, **which)
        with _Float64():
            right = plain_class(module).forward(exact.to(device), x.double(), positions, **which)
        pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (got, right)), strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


def _parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parts of `rope_parameters` of the layers that see the whole sequence.

    Raises:
        ValueError: there are none.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    wide = [value for key, value in nested.items() if not any(word in key for word in _LOCAL)]
    found = wide if nested else [parameters] if "rope_theta" in parameters else []
    if not found:
        raise ValueError(
            f"a {config.model_type} model has no rope_theta in its configuration (rope_parameters: {parameters or 'none'}): "
            "its positions cannot be changed. Leave --rope_theta out"
        )
    return found


def _set_rope(config: PreTrainedConfig, theta: float, length: int) -> PreTrainedConfig:
    """Changes a configuration in place; returns its part of the language model."""
    if not theta > 1:
        raise ValueError(f"theta: more than 1 is allowed, got {theta}")
    text = config.get_text_config()
    before = getattr(text, "max_position_embeddings", None)
    for parameters in _parameters(text):
        rope_type = parameters.get("rope_type", "default")
        _require_type(rope_type, f"a {text.model_type} model")
        if rope_type in ("yarn", "llama3") and before is not None:
            # Both would follow max_position_embeddings otherwise, and with them the scaling that the model was trained with.
            original = parameters.setdefault("original_max_position_embeddings", before)
            if parameters.get("factor") is None:
                parameters["factor"] = before / original
        parameters["rope_theta"] = float(theta)
    if hasattr(text, "rope_theta"):  # beside the parameters, in configurations of older models' code
        text.rope_theta = float(theta)
    if before is not None:
        text.max_position_embeddings = max(length, before)
    return text
