"""What is trained under the engines: settings, data and model of one training run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from models import add_lora, batch, build, checkpointed, quantized, with_dropout
from transformers.modeling_outputs import CausalLMOutput

STEPS, RANKS, NUM_LAYERS = 4, 2, 2
LEARNING_RATE = 0.2
CHUNKS_OF_RANKS = {"chunk_size": 24, "loss_chunk_size": 20}, {"chunk_size": 16, "loss_chunk_size": 12}
MIXED_BUDGET = 0.0004  # GiB: some calls of layers keep everything, some their attention's output, some nothing
ORDER = (2, 0, 3, 1)  # of lengths: some steps are longer than all before, which are analyzed anew, and some are not
COPIES = 8  # of each sequence where dropout is on: more masks in a step, less noise in its mean


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        scope: what is tiled.
        engine: "deepspeed", "ddp", "fsdp2", "fsdp1", "fsdp1_flat" (FSDP1 with use_orig_params=False), "fsdp1_peft"
            (the same, every adapter wrapped by PEFT's policy), "fsdp1_trainer" (FSDP1 by PEFT's policy, as accelerate makes
            of it), or "none" (one process, on the data of all ranks).
        zero_stage: DeepSpeed's ZeRO stage.
        offload: keep the optimizer on the CPU, and in stage 3 the parameters too.
        lora: train adapters only.
        lora_head: put an adapter on the LM head too.
        save_head: train the whole LM head beside the adapters (PEFT's `modules_to_save`).
        frozen_embeddings: train everything but the input embeddings.
        quantized: adapters on 4-bit weights (QLoRA).
        reentrant: the older kind of activation checkpointing.
        masked_rank: the rank whose labels are all masked, if any.
        accumulation: micro batches per step.
        forwards: forward passes before a backward, which is that of their mean loss.
        loss: who computes it: "model", "weight" (from hidden states and the LM head's weight, without calling the head, as
            Liger does), "module" (a submodule of the model), or "logits" (who called the model without labels: three
            functions of its logits).
        uneven: sequences of rank 0 that fit into one chunk, and long ones on rank 1.
        clip: the norm that gradients are clipped to; 0 for none.
        scaler: scale the loss by a `GradScaler` of torch.
        dropout: its probability, in the MLPs or (with `lora`) in the adapters.
        head_groups, offload_inputs: `head_groups` and `offload` ("cpu" or "") of the tiled layers.
        keep: `keep`, with torch's attention if it is given; the others' eager one saves too much for "attention".
            "mixed": "all" on one rank, and on the other what fits into a small budget. "free": what fits into free memory
            on each rank, and on one of them inputs in host memory as long as nothing is known.
        seeds: train that often, with other random numbers each time.
        replicas: how many batches a step has, each in processes of its own.
        sequence_parallel: processes that share the sequences of a replica; from 2 on with torch's attention, and without an
            unconverted run, which would have other batches in as many processes.
        mode: how the attention of these processes is computed.
    """

    family: str = "llama"
    scope: str = "layer"
    engine: str = "deepspeed"
    zero_stage: int | None = None
    offload: bool = False
    lora: bool = False
    lora_head: bool = False
    save_head: bool = False
    frozen_embeddings: bool = False
    quantized: bool = False
    checkpointing: bool = True
    reentrant: bool = False
    masked_rank: int | None = None
    dtype: str = "float32"
    accumulation: int = 2
    forwards: int = 1
    loss: str = "model"
    uneven: bool = False
    clip: float = 0.0
    scaler: bool = False
    dropout: float = 0.0
    head_groups: int | str = 1
    offload_inputs: str = ""
    keep: str = ""
    seeds: int = 0
    replicas: int = RANKS
    sequence_parallel: int = 1
    mode: str = "gather"

    @property
    def processes(self) -> int:
        return 1 if self.engine == "none" else self.replicas * self.sequence_parallel

    @property
    def kinds(self) -> tuple[str, ...]:
        """The runs of this case."""
        return ("plain", "converted") if self.sequence_parallel == 1 else ("converted",)

    @property
    def name(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return "-".join(f"{k}={v}" for k, v in settings.items() if v != defaults[k])


def micro_batch(case: Case, rank: int, step: int, micro: int) -> dict:
    """Another length for each rank (or replica) and at each step, prompts masked, one sequence padded."""
    length = 21 + 11 * rank + 5 * ORDER[step] - micro
    if case.uneven:
        length = 100 - 7 * step if rank else 5 - step
    prompt = length if case.masked_rank == rank else min(6 + rank, length - 2)
    padding = min(3, length - prompt - 1) if case.uneven else 3
    inputs = batch(length, seed=1000 * rank + 10 * step + micro, prompt=prompt, padding=padding)
    return {key: value.repeat(COPIES, 1) for key, value in inputs.items()} if case.dropout else inputs


def micro_loss(case: Case, model, rank: int, step: int, micro: int) -> torch.Tensor:
    """The loss of one micro batch, or the mean of that of several."""
    several = [micro_batch(case, rank, step, micro + case.accumulation * i) for i in range(case.forwards)]
    if case.loss == "logits":
        return sum(loss_of_logits(model, **inputs) for inputs in several) / case.forwards
    return sum(model(**inputs).loss for inputs in several) / case.forwards


def loss_of_logits(model, labels, **inputs) -> torch.Tensor:
    """A loss of somebody's own, of the logits of a model that is given no labels: three functions of one tensor."""
    logits = model(**inputs).logits[:, :-1]
    per_token = logits.float().log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    mask = (labels[:, 1:] != -100).float()
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    mean = (losses.sum() - (per_token * mask).sum()) / mask.sum().clamp(min=1)
    return mean + 1e-2 * (logits.logsumexp(-1) * mask).square().mean()


class SubmoduleLoss(torch.nn.Module):
    def forward(self, logits, labels, vocab_size, **_):
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def read_head_weight(model) -> None:
    """Has the model compute its loss with the LM head's weight, without calling the LM head."""

    def forward(labels, **inputs):
        hidden = model.model(**inputs).last_hidden_state[:, :-1]
        return CausalLMOutput(
            loss=F.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), labels[:, 1:].flatten())
        )

    model.forward = forward


def mini_sequence(case: Case, rank: int) -> dict:
    chunks = {
        key: size * (COPIES if case.dropout else 1)
        for key, size in CHUNKS_OF_RANKS[rank % len(CHUNKS_OF_RANKS)].items()
    }
    settings = {"head_groups": case.head_groups, "offload": case.offload_inputs or None}
    if case.sequence_parallel > 1:
        chunks = {key: size // case.sequence_parallel for key, size in chunks.items()}
        settings["sequence_parallel"] = {"size": case.sequence_parallel, "mode": case.mode}
    keep = {"keep": case.keep} if case.keep else {}
    if case.keep == "mixed":  # other decisions on each rank
        keep = {"memory_budget": MIXED_BUDGET} if rank else {"keep": "all"}
    if case.keep == "free":
        keep = {"memory_budget": "auto"}
        settings |= {"offload": "auto"} if rank else {}
    return {"scope": case.scope, **keep, **chunks, **settings}


def make_model(case: Case, seed: int | None = None):
    """The model; `seed` is for the random numbers of its training, the weights are always the same."""
    model = build(case.family, attention="sdpa" if case.keep or case.sequence_parallel > 1 else "eager")
    if case.loss == "weight":
        read_head_weight(model)
    elif case.loss == "module":
        model._loss_function = SubmoduleLoss()
    if case.quantized:
        model = quantized(model)
    if case.lora:
        settings = {"lora_dropout": case.dropout}
        if case.lora_head:
            settings["target_modules"] = ["lm_head", "q_proj", "up_proj"]
        if case.save_head:
            settings["modules_to_save"] = ["lm_head"]
        model = add_lora(model, **settings)
    elif case.dropout:
        with_dropout(model, case.dropout)
    if case.frozen_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if case.checkpointing:
        checkpointed(model, use_reentrant=case.reentrant)
    if not case.quantized:
        model.to(getattr(torch, case.dtype))
    if seed is not None:
        torch.manual_seed(seed)
    return model


def deepspeed_config(case: Case) -> dict:
    zero = {"stage": case.zero_stage, "stage3_param_persistence_threshold": 0}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if case.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,  # the default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled first
        "bf16": {"enabled": case.dtype == "bfloat16"},
    }
