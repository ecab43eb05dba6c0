"""Sequence parallelism: one sequence on several ranks. Needs torch.distributed, and no training engine."""
