"""The planner's stand-ins for the attention kernel and the loss."""

from ds_minis.planner.step.stubs import ATTENTION, FLOPS, HostCopies, LossStandIn, no_mask, register

__all__ = ["ATTENTION", "FLOPS", "HostCopies", "LossStandIn", "no_mask", "register"]
