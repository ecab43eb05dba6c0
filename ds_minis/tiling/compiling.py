"""What `torch.compile` leaves to Python, as a graph break.

Traced, a chunk loop would be unrolled and compiled anew for every number of chunks, and the deferred logits are no tensor
that a graph could hold.
"""

import torch

# `torch.compiler.disable` imports torch._dynamo at once, which takes a second; this one does when it is first called.
# DeepSpeed and torch itself use it for the same reason.
outside_of_graphs = torch._disable_dynamo
