"""What `torch.compile` leaves to Python, as a graph break.

Traced, a chunk loop would be unrolled and compiled anew for every number of chunks, and the deferred logits are no tensor
that a graph could hold.
"""

import torch
from torch import nn

# `torch.compiler.disable` imports torch._dynamo at once, which takes a second; this one does when it is first called.
# DeepSpeed and torch itself use it for the same reason.
outside_of_graphs = torch._disable_dynamo


def compiled_inside(module: nn.Module) -> str:
    """Which part of a module is compiled by itself, in words; empty if none is.

    Such a graph would be compiled anew for each chunk of a layer, and for each time at which its attention is answered.
    """
    for name, part in module.named_modules():
        compiled = part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"
        if name and (compiled or hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")):
            return f"its part {name} is compiled by itself"
    return ""
