"""Attention over the tokens of all ranks: the model's own mask rule, the ring, and its kernels."""
