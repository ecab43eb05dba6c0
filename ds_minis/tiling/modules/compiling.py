"""Keeps chunk loops out of `torch.compile`, by a graph break.

A traced chunk loop would be unrolled and recompiled for every number of chunks. Deferred logits cannot be held by a graph.
"""

import torch
from torch import nn

# `torch.compiler.disable` imports torch._dynamo immediately, which takes a second; this one imports it at the first call.
# DeepSpeed and torch itself use it for the same reason.
outside_of_graphs = torch._disable_dynamo


def compiled_inside(module: nn.Module) -> str:
    """Names a submodule that is compiled by itself; empty if none is.

    Its graph would be recompiled for each chunk of a layer, and for each handler of its attention.
    """
    for name, part in module.named_modules():
        compiled = part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"
        if name and (compiled or hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")):
            return f"its part {name} is compiled by itself"
    return ""
