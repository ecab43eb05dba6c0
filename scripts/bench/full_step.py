"""A full training step, optimizer included, as the largest lengths are searched with; on a device, or on meta tensors.

- full: every parameter is trained in bfloat16 with AdamW, whose two moments are bfloat16 too (torch's, fused). The optimizer
  runs in backward: as soon as a parameter has its gradient it is stepped and the gradient freed, as in the benchmark of the
  paper's authors. So weights and moments take 6 bytes per parameter, and gradients next to nothing.
- lora: PEFT's LoRA, rank 16 on all linear layers of the decoder, adapters in bfloat16; AdamW after backward.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from variants import Unavailable, Variant

SETTINGS = "full", "lora"
LORA_RANK = 16


class FullStep:
    """A model made ready for steps: converted by the variant, with an optimizer.

    Args:
        model: a model with gradient checkpointing on; for "lora", from `with_lora`.
        setting: one of `SETTINGS`.
        variant: changes the model.
        optimizer: makes something with `step()` for a list of parameters.
    """

    def __init__(self, model: nn.Module, setting: str, variant: Variant, optimizer: Callable[[list], object]):
        self.model = model
        self.note = variant.apply(self.model)
        self.optimizer_steps: Counter[Tensor] = Counter()
        self._variant, self._after = variant, []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if setting == "full":
            for parameter in trained:
                step = functools.partial(self._step_one, optimizer([parameter]))
                parameter.register_post_accumulate_grad_hook(step)
        else:
            self._after = [(optimizer(trained), trained)]

    def __call__(self, input_ids: Tensor, **inputs) -> Tensor:
        """The loss of a step on these tokens; all of it is done when this returns."""
        self.optimizer_steps.clear()
        with self._variant.around():
            loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False, **inputs).loss
            loss.backward()
        for optimizer, trained in self._after:
            optimizer.step()
            for parameter in trained:
                parameter.grad = None
        return loss.detach()

    def _step_one(self, optimizer, parameter: Tensor) -> None:
        optimizer.step()
        parameter.grad = None
        self.optimizer_steps[parameter] += 1


def with_lora(model: PreTrainedModel) -> nn.Module:
    """The model with adapters on all linear layers of its decoder, the only ones to be trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable(f"LoRA needs PEFT ({error})") from None
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


class AdamWBytes:
    """Has the memory of `adamw`, which cannot run on meta tensors: two moments for each parameter, and nothing besides."""

    def __init__(self, parameters: list[Tensor]):
        self.moments = [torch.zeros_like(p, requires_grad=False) for p in parameters for _ in range(2)]

    def step(self) -> None:
        """Writes in place."""
