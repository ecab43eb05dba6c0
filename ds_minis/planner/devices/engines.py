"""What an engine and an optimizer hold on each device beside the traced step, term by term; ZeRO's are in `zero`.

Sources: the engines' own code (torch 2.13 `torch/distributed/fsdp/_fully_shard`, `nn/parallel/distributed.py`; accelerate
1.15 `utils/fsdp_utils.py`). Tests compare each with two real processes (tests/planner/test_planner_engines.py).
"""

from __future__ import annotations

import numpy as np

from ds_minis.planner.devices.held import Counts, Held, Moment, Term, Varying, gradients, optimizer_states, weights
from ds_minis.planner.devices.zero import zero
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.step.adapters import BYTES_OF_4_BIT


def held_by(setup: Setup, counts: Counts) -> Held:
    """All that the engine and the optimizer hold."""
    if setup.engine in ("single", "ddp"):
        return _replicated(setup, counts)
    if setup.engine == "fsdp2":
        return _fsdp2(setup, counts)
    return zero(setup, counts)


def _replicated(setup: Setup, counts: Counts) -> Held:
    trained = counts.model["trained"]
    size = 4 if setup.master_weights else setup.itemsize
    terms = [*weights(setup, counts, size), optimizer_states(setup, trained, size)]
    scale = size / setup.itemsize  # gradients have the weights' dtype; the trace has the computation's
    if setup.engine == "ddp":
        why = "DDP copies gradients into buckets and back (gradient_as_bucket_view is off by default)"
        terms.append(Term("gradient buckets", "engine", trained * size, False, why))
    if setup.master_weights:
        why = "autocast keeps a copy of each weight in the computation's dtype until the forward's end"
        terms.append(Term("weights cast by autocast", "engine", trained * setup.itemsize, False, why))
    if setup.optimizer_in_backward:
        return Held(terms)
    why, all_of_them = "grow during backward", Term("gradients", "gradients", trained * size, True, "of all parameters")
    at_step = [Moment("optimizer", [all_of_them])]
    if setup.accumulation > 1:
        why = "those of earlier steps of the accumulation exist from the start"
        return Held(
            terms, [], [gradients(why, lambda where, sofar, layer: np.full_like(sofar, trained * size))], at_step
        )
    return Held(terms, [], [gradients(why, lambda where, sofar, layer: sofar * scale)], at_step)


def _fsdp2(setup: Setup, counts: Counts) -> Held:
    """Units are the decoder layers and the rest of the model, weights and gradient shards are float32."""
    n, layer, item, trained = setup.gpus, counts.layer, setup.itemsize, counts.model["trained"]
    terms = [
        *weights(setup, counts, 4.0, n),
        optimizer_states(setup, trained / n, 4.0, on_host=setup.offload_param),
    ]
    why = "embeddings, norm and LM head are one unit, gathered from the forward's start to the backward's end"
    root = Term("gathered root unit", "engine", counts.outside * item, False, why)
    scale = BYTES_OF_4_BIT / item if setup.train == "qlora" else 1
    one_layer, whole = layer["all"] * item * scale, layer["trained"] * item

    def gathered(where, sofar, since_layer):
        """At the loss what the last layer was gathered into is still there; in backward the first layer has none ahead."""
        alone = (where == "loss") | (counts.layers_done(sofar, item) >= counts.num_layers - 1)
        return np.where(alone, 1, 2) * one_layer

    def unreduced(where, sofar, since_layer):
        return sofar - counts.layers_done(sofar, item) * whole

    def input_of_reduction(where, sofar, since_layer):
        return whole * (counts.layers_done(sofar, item) >= 1)

    def shards(where, sofar, since_layer):
        if setup.accumulation > 1:
            return np.full_like(sofar, trained * 4 / n)
        return np.maximum(sofar - unreduced(where, sofar, since_layer), 0) / item * 4 / n

    why = "the running decoder layer and the next one"
    varying = [Varying(Term("gathered layers", "engine", 0.0, False, why), gathered)]
    varying.append(gradients("the running layer's, and the LM head's until backward ends", unreduced))
    why = "a copy of one layer's gradients, of which the next one's backward begins"
    varying.append(Varying(Term("input of the reduction", "engine", 0.0, False, why), input_of_reduction))
    why = f"float32, / {n}: of the layers that have been reduced"
    varying.append(Varying(Term("gradient shards", "gradients", 0.0, False, why, setup.offload_param), shards))
    outside = 2 * counts.trained_outside * item
    all_shards = Term("gradient shards", "gradients", trained * 4 / n, False, f"float32, / {n}", setup.offload_param)
    why = "the root unit's gradients, and a copy of them to be reduced"
    end = Moment(
        "end of backward", [root, all_shards, Term("the root unit's gradients", "gradients", outside, False, why)]
    )
    return Held(terms, [root], varying, [end])
