"""Long context: how RoPE's base grows with the sequence, and the stages in which a model is taken there.

`schedule` is plain data and arithmetic, and imports nothing heavy. `rope` changes a model.
"""

from ds_minis.context.schedule import SEED_STAGES, Stage, rope_theta_for, stages_for

__all__ = ["SEED_STAGES", "Stage", "rope_theta_for", "stages_for"]
