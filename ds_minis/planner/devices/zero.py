"""What DeepSpeed's ZeRO holds on each device, stage by stage.

Sources: DeepSpeed 0.19 `runtime/zero/stage_1_and_2.py`, `stage3.py`, `partitioned_param_coordinator.py`,
`runtime/fp16/unfused_optimizer.py`. Alignment and padding of flat buffers are left out.
"""

from __future__ import annotations

import numpy as np

from ds_minis.planner.devices.held import Counts, Held, Moment, Term, Varying, gradients, optimizer_states, weights
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.step.adapters import BYTES_OF_4_BIT
from ds_minis.planner.step.profile import BytesAt

# DeepSpeed's defaults, and the elements of one all-reduce of stage 0.
_SUB_GROUP, _REUSE_DISTANCE, _LIVE_PARAMETERS, _ALL_REDUCE = 1e9, 1e9, 1e9, 5e8


def zero(setup: Setup, counts: Counts) -> Held:
    return (_stage_0, _stage_1, _stage_2, _stage_3)[int(setup.engine[-1])](setup, counts)


def _stage_0(setup: Setup, counts: Counts) -> Held:
    """Nothing is partitioned; 16-bit weights have float32 copies (FP16_UnfusedOptimizer, for bfloat16 too)."""
    trained, item = counts.model["trained"], setup.itemsize
    terms = weights(setup, counts, item)
    if item == 2:
        why = f"float32 copies of {trained:,.0f} trained parameters, on each device"
        terms.append(Term("master weights", "optimizer", 4 * trained, False, why))
    terms.append(optimizer_states(setup, trained, 4.0))
    whole = Term("gradients", "gradients", trained * item, True, "of all parameters")
    reduced = min(trained, _ALL_REDUCE) * item
    why = "a copy of the gradients that are reduced at once, 500M elements"
    moments = [Moment("reduction", [whole, Term("input of the reduction", "engine", reduced, False, why)])]
    if item == 2:
        why = "of all parameters, for the optimizer's step"
        moments.append(Moment("optimizer", [whole, Term("gradients in float32", "gradients", 4 * trained, False, why)]))
    return Held(terms, [], [_whole_gradients(setup, trained * item)], moments)


def _whole_gradients(setup: Setup, nbytes: float) -> Varying:
    """Gradients of all parameters, of so many bytes, none of which is reduced before backward has ended."""
    if setup.accumulation > 1:
        why = "those of earlier steps of the accumulation exist from the start"
        return gradients(why, lambda where, sofar, layer: np.full_like(sofar, nbytes))
    return gradients("grow during backward", lambda where, sofar, layer: sofar)


def _master_weights(setup: Setup, counts: Counts, host: bool) -> list[Term]:
    """In stages 1 to 3 there are master weights in float32 too."""
    n, trained = setup.gpus, counts.model["trained"]
    why = f"float32 copies of {trained:,.0f} trained parameters / {n}"
    return [
        Term("master weights", "optimizer", 4 * trained / n, False, why, host),
        optimizer_states(setup, trained / n, 4.0, on_host=host),
    ]


def _bucket(setup: Setup, counts: Counts) -> float:
    """Elements of `reduce_bucket_size`; "auto" is a function of the hidden size under the HF Trainer."""
    return setup.bucket or counts.hidden_size**2


def _stage_1(setup: Setup, counts: Counts) -> Held:
    """Gradients are whole, and are reduced when backward has ended (without overlap_comm, as is the default)."""
    n, item, trained, host = setup.gpus, setup.itemsize, counts.model["trained"], setup.offload_optimizer
    terms = [*weights(setup, counts, item), *_master_weights(setup, counts, host)]
    bucket = _bucket(setup, counts)
    bucket = Term("gradient bucket", "engine", bucket * item, False, f"of {bucket:,.0f} elements")
    whole = Term("gradients", "gradients", trained * item, True, "of all parameters, which stage 1 keeps")
    why = f"{trained:,.0f} / {n}, in the computation's dtype"
    shards = Term("gradient shards", "gradients", trained * item / n, False, why, host)
    moments = [
        Moment("reduction", [whole, shards, bucket]),
        _optimizer_step(setup, trained * item / n, trained / n, host),
    ]
    return Held(terms, [], [_whole_gradients(setup, trained * item), _once_begun(bucket)], moments)


def _stage_2(setup: Setup, counts: Counts) -> Held:
    n, item, trained, host = setup.gpus, setup.itemsize, counts.model["trained"], setup.offload_optimizer
    terms = [*weights(setup, counts, item), *_master_weights(setup, counts, host)]
    bucket, shard = _bucket(setup, counts), trained * item / n
    why = f"two of {bucket:,.0f} elements: with overlap_comm one fills while the other is reduced"
    buckets = Term("gradient buckets", "engine", 2 * bucket * item, False, why)
    shards = Term(
        "gradient shards", "gradients", shard, False, f"{trained:,.0f} / {n}, in the computation's dtype", host
    )
    growing = gradients("one parameter's, until it is reduced", _one_parameter(setup, counts))
    varying = [growing, _once_begun(buckets), _once_begun(shards)]
    if setup.accumulation > 1:
        terms.append(Term("accumulated gradient shards", "gradients", shard, False, "of the steps before", host))
    return Held(terms, [], varying, [_optimizer_step(setup, shard, trained / n, host)])


def _once_begun(term: Term) -> Varying:
    """A buffer that the first gradient of a backward brings into being; the shards first on the rank of the last layers."""
    return Varying(term, lambda where, sofar, since_layer: term.nbytes * (sofar > 0))


def _one_parameter(setup: Setup, counts: Counts) -> BytesAt:
    """Bytes of the gradient that waits to be reduced; one that fits into the bucket is copied there and freed at once."""
    item, bucket = setup.itemsize, _bucket(setup, counts)
    head, largest = counts.trained_head, counts.model["largest_in_layer"]
    of_head, of_layer = (elements * item * (elements > bucket) for elements in (head, largest))

    def bytes_at(where, sofar, since_layer):
        return np.minimum(sofar, of_head) if where == "loss" else np.minimum(since_layer, of_layer)

    return bytes_at


def _optimizer_step(setup: Setup, shard: float, elements: float, host: bool) -> Moment:
    """Gradients of a shard when the optimizer steps: as they were reduced, as one flat tensor, and in float32."""
    in_float32 = 4 * elements if setup.itemsize == 2 else 0
    why = "the shard's gradients as one flat tensor" + (", and that in float32" if in_float32 else "")
    flat = 0 if host else elements * setup.itemsize + in_float32
    terms = [Term("gradient shards", "gradients", shard, False, "as they were reduced", host)] if shard else []
    return Moment("optimizer", [*terms, Term("optimizer's step", "transient", flat, False, why)])


def _stage_3(setup: Setup, counts: Counts) -> Held:
    n, item, trained = setup.gpus, setup.itemsize, counts.model["trained"]
    host = setup.offload_optimizer
    terms = [*weights(setup, counts, item, n), *_master_weights(setup, counts, host)]
    why = f"{trained:,.0f} / {n}, in the computation's dtype"
    shard = trained * item / n
    terms.append(Term("gradient shards", "gradients", shard, False, why, host))
    bucket = _bucket(setup, counts)
    why = f"of {bucket:,.0f} elements"
    terms.append(Term("gradient bucket", "engine", bucket * item, False, why))
    why = (
        "the running decoder layer and the next one, the LM head, and what is used again within "
        f"{_reuse_distance(setup):,.0f} elements (stage3_max_reuse_distance)"
        if setup.settings is not None
        else f"what is fetched ahead, up to {_live_parameters(setup):,.0f} elements (stage3_max_live_parameters)"
    )
    varying = [Varying(Term("gathered weights", "engine", 0.0, False, why), _gathered(setup, counts))]
    varying.append(gradients("one parameter's, until it is reduced", _one_parameter(setup, counts)))
    return Held(terms, [], varying, [_optimizer_step(setup, 0.0, min(trained / n, _SUB_GROUP), host)])


def _reuse_distance(setup: Setup) -> float:
    return _REUSE_DISTANCE if setup.reuse_distance is None else setup.reuse_distance


def _live_parameters(setup: Setup) -> float:
    return _LIVE_PARAMETERS if setup.live_parameters is None else setup.live_parameters


def _gathered(setup: Setup, counts: Counts) -> BytesAt:
    """Bytes of weights that are there as a whole, by where the step is."""
    return _gathered_leaves(setup, counts) if setup.settings is not None else _gathered_linears(setup, counts)


def _gathered_leaves(setup: Setup, counts: Counts) -> BytesAt:
    """With tiled layers, which are leaf modules.

    The coordinator keeps what it meets again among the modules of the next `stage3_max_reuse_distance` elements: every layer
    in the whole model's backward, where backward begins. The LM head, gathered for the loss, stays.
    """
    layer, item, num_layers = counts.layer["all"], setup.itemsize, counts.num_layers
    largest = counts.model["largest_embedding"]
    tied = counts.model["embeddings"] == largest
    head = largest if tied else counts.model["embeddings"] - largest
    distance = _reuse_distance(setup)
    kept = min(max(np.ceil((distance - head) / max(layer, 1)), 0), num_layers)
    embedding = 0.0 if tied or 2 * head >= distance else largest
    scale = _scale(setup)

    def bytes_at(where, sofar, since_layer):
        done = counts.layers_done(sofar, item) if where == "backward" else np.zeros_like(sofar)
        running = np.maximum(kept - done, where != "loss")
        ahead = (where != "loss") & (running < num_layers - done)  # the next layer
        return ((running + ahead) * layer * scale + embedding + head * (where != "forward")) * item

    return bytes_at


def _gathered_linears(setup: Setup, counts: Counts) -> BytesAt:
    """With linear layers gathered one by one: what is fetched ahead stays, up to `stage3_max_live_parameters`."""
    in_layers, scale = counts.layer["all"] * counts.num_layers, _scale(setup)
    most = max(_live_parameters(setup), counts.model["largest_embedding"], counts.model["largest_linear"])

    def bytes_at(where, sofar, since_layer):
        done = counts.layers_done(sofar, setup.itemsize) * (where == "backward")
        left = counts.outside + (in_layers - done * counts.layer["all"]) * scale
        return np.minimum(left, most) * setup.itemsize

    return bytes_at


def _scale(setup: Setup) -> float:
    """Bytes of a layer's weight, of those of one that is not in 4 bits."""
    return BYTES_OF_4_BIT / setup.itemsize if setup.train == "qlora" else 1.0
