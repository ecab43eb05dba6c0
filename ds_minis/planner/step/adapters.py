"""LoRA and 4-bit weights as a traced step has them: PEFT's operations, without the seconds that importing PEFT takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A linear layer with an adapter, as PEFT's `lora.Linear` computes it: `base(x) + B(A(dropout(x))) * scale`."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, base.out_features, **like)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def weight(self) -> Tensor:
        """The base's, as PEFT gives it: some models hand a projection's weight to a kernel."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        dtype = result.dtype
        result = result + self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))) * 2.0
        return result.to(dtype)


class FourBitLinear(nn.Linear):
    """A linear layer with 4-bit weights, as ds_minis sees bitsandbytes': it does not run `nn.Linear.forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def add_lora(model: nn.Module, rank: int, dropout: float = 0.0, four_bits: bool = False) -> None:
    """Adapters on all linear layers but the LM head ("all-linear"); nothing else is trained.

    Args:
        four_bits: the layers have 4-bit weights.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if type(child) is nn.Linear and child is not head  # a router is a subclass that gives a tuple
    ]
    for owner, name, child in found:
        if four_bits:
            child.__class__ = FourBitLinear
        setattr(owner, name, LoraLinear(child, rank, dropout))

    def require(module, args, output):
        output.requires_grad_(True)

    # As PEFT has it under gradient checkpointing: else nothing that is trained would be reached.
    model.get_input_embeddings().register_forward_hook(require)


# bitsandbytes NF4: half a byte, and for each 64 weights a scale of one byte, and for each 256 scales a float32.
BYTES_OF_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


def dtype_named(name: str) -> torch.dtype:
    return getattr(torch, name)
