"""What it costs to find out whether a decoder layer can be tiled: time, matrix products and memory.

python scripts/bench/verification.py                 # half a minute on 2 CPU cores

A Llama layer is analyzed at its first call, on a few tokens and on detached weights. Its costs are compared with the layer's
own forward and backward for all tokens of the call, without checkpointing, and with the bytes of its weights. Memory is
counted as live bytes of tensors above those that were there before, without tensors on the meta device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from unittest import mock

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_minis import convert_to_mini_sequence
from ds_minis.layer.tiled import tiled_layer
from ds_minis.tiling.verify import side_effects

CASES = {
    "full, float32": {},
    "full, bfloat16": {"dtype": torch.bfloat16},
    "LoRA, float32": {"lora": True},
}


class Layer:
    """One decoder layer of a model that has no other, and its call for some tokens."""

    def __init__(self, hidden: int, tokens: int, lora: bool = False, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=1,
            num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), attn_implementation="sdpa",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        self.model = model
        if lora:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                model, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False
            )
        self.module: nn.Module = model.model.layers[0]
        self._x = torch.randn(1, tokens, hidden, dtype=dtype, requires_grad=True)
        self._positions = model.model.rotary_emb(self._x, torch.arange(tokens)[None])
        self.inputs = self._x.detach(), *self._positions

    def forward(self) -> Tensor:
        return self.module(self._x, position_embeddings=self._positions, attention_mask=None)

    def step(self) -> None:
        self.forward().sum().backward()
        self.module.zero_grad(set_to_none=True)
        self._x.grad = None

    def analyze(self, around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> str:
        """Calls the layer as if for the first time, its analysis inside of a context; returns why it is run as a whole."""
        self.module.mini_sequence_analyses.clear()
        analyze = tiled_layer.analyze_layer

        def analyze_inside(*args, **kwargs):
            with around():
                return analyze(*args, **kwargs)

        with mock.patch.object(tiled_layer, "analyze_layer", analyze_inside):
            self.forward()
        (analysis,) = self.module.mini_sequence_analyses.values()
        return analysis.reason


def measure(hidden: int, tokens: int, chunk: int, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """Seconds and FLOPs of an analysis over those of the layer's forward and backward; its peak of bytes over its weights'.

    The layer is asserted to be tiled: an analysis that ends early costs little.
    """
    layer = Layer(hidden, tokens, lora, dtype)
    weights = [p.detach() for p in layer.module.parameters()]
    layer.step()
    own_seconds = min(_seconds(layer.step) for _ in range(3))
    with LiveBytes() as own:
        layer.step()
    with contextlib.redirect_stdout(io.StringIO()):
        convert_to_mini_sequence(layer.model, {"chunk_size": chunk, "loss": False})
    seconds: list[float] = []

    @contextlib.contextmanager
    def timed():
        start = time.process_time()
        yield
        seconds.append(time.process_time() - start)

    reasons = [layer.analyze(timed) for _ in range(3)]
    # Its runs turn dispatch modes off, so that they leave no trace.
    live = LiveBytes(apart=[*weights, *layer.inputs], with_meta=False)
    with mock.patch.object(side_effects, "_disable_current_modes", contextlib.nullcontext):
        reasons.append(layer.analyze(lambda: live))
    assert not any(reasons), reasons
    return {
        "seconds": min(seconds) / own_seconds,
        "flops": live.matmul_flops / own.matmul_flops,
        "bytes": live.peak / sum(p.nbytes for p in weights),
    }


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one layer, hidden size {args.hidden}, {args.tokens:,} tokens in chunks of {args.chunk}")
    for title, settings in CASES.items():
        row = measure(args.hidden, args.tokens, args.chunk, **settings)
        print(
            f"  {title:16} {row['seconds']:.2f}x the time and {row['flops']:.2f}x the matrix products of its forward and "
            f"backward, {row['bytes']:.2f}x the bytes of its weights"
        )


if __name__ == "__main__":
    main()
