"""The ways to compute the loss of an LM head that `loss_head.py` compares: each a function of the same three tensors.

`make(problem)` gives `loss(hidden_RH, weight_VH, labels_R)`, the mean over all labels that are not -100, or raises `Skip`.
Ways for TRL's DPO are of one pair, two sequences of half the tokens: those of the second have the other sign (`signs_of`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_minis import convert_to_mini_sequence
from ds_minis.loss.heads.one_factor import Labelled
from ds_minis.loss.kernels import cross_entropy
from ds_minis.loss.kernels.token_statistics import token_statistics

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
FROZEN = ", frozen head"  # ends the names of ways that do not train the head
DPO = "DPO"  # is in the names of ways that are for it
OF_SFT, OF_DPO = ("log_probs", "entropy", "is_top1"), ("log_probs",)  # what TRL's trainers ask for


class Skip(Exception):
    """Why a way is not measured here."""


@dataclass(frozen=True)
class Problem:
    """What is measured.

    Attributes:
        num_chunks: what ours cuts the tokens into; given to whoever leaves the number to its user.
    """

    device: torch.device
    num_chunks: int

    def require_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Skip("needs a CUDA device")


def signs_of(labels: Tensor, of_pair: bool) -> Tensor:
    """What each token's loss is multiplied with: 1, or -1 for the second sequence of a pair."""
    signs = torch.ones_like(labels, dtype=torch.float32)
    signs[len(labels) // 2 :] *= -1 if of_pair else 1
    return signs


def _loss(log_probs: Tensor, labels: Tensor, of_pair: bool) -> Tensor:
    mask = labels != -100
    return -(log_probs * mask * signs_of(labels, of_pair)).sum() / mask.sum().clamp(min=1)


def plain(problem: Problem) -> Loss:
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


class _Head(nn.Module):
    """As much of a language model as ds_minis asks for: the loss as transformers computes it."""

    def __init__(self, weight_VH: Tensor):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=weight_VH.shape[1])
        self.lm_head = nn.Linear(*weight_VH.shape[::-1], bias=False, device="meta")
        self.lm_head.weight = weight_VH

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.lm_head(hidden_states).float()
        return logits if labels is None else F.cross_entropy(logits, labels)


def _ours(kernel: bool) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        if kernel:
            problem.require_cuda()
            if cross_entropy.kernel()[0] is None:
                raise Skip("Triton is not installed")
        models: dict[int, nn.Module] = {}

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            if id(weight) not in models:
                with contextlib.redirect_stdout(None):
                    models[id(weight)] = convert_to_mini_sequence(_Head(weight))
            with contextlib.nullcontext() if kernel else mock.patch.object(cross_entropy, "kernel", lambda: (None, "")):
                return models[id(weight)](hidden, labels=labels)

        return loss

    return make


def _ours_per_token(
    log_probs_of: Callable[[Tensor, Tensor, Tensor], Tensor], of_pair: bool = False
) -> Callable[[Problem], Loss]:
    """A loss of log-probabilities, of a model without labels: of TRL's trainers, and of a loop of one's own."""

    def make(problem: Problem) -> Loss:
        models: dict[int, nn.Module] = {}

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            if id(weight) not in models:
                with contextlib.redirect_stdout(None):
                    models[id(weight)] = convert_to_mini_sequence(_Head(weight))
            mask = labels != -100
            return _loss(log_probs_of(models[id(weight)](hidden), labels.clamp(min=0), mask), labels, of_pair)

        return loss

    return make


def _as_sft(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """As a call with `fused_lm_head=True` is answered for TRL's SFTTrainer, which logs entropy and accuracy."""
    return _statistics(logits, targets, mask, OF_SFT)


def _as_dpo(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """As it is answered for TRL's DPOTrainer."""
    return _statistics(logits, targets, mask, OF_DPO)


def _statistics(logits: Tensor, targets: Tensor, mask: Tensor, names: tuple[str, ...]) -> Tensor:
    def of_rows(logits_CV: Tensor, target_C: Tensor, expected: Tensor | None = None) -> Tensor:
        return token_statistics(logits_CV, target_C, 1.0, names, expected)

    rows = logits.derived(logits.expression().before_upcast())
    return rows.columns_by_chunks(of_rows, targets, labelled=Labelled("fused_lm_head", mask))[0]


def _torch_chunked(policy: str) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        options = getattr(nn, "LinearCrossEntropyOptions", None)
        if options is None:
            raise Skip(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
        return lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, ignore_index=-100, options=options(acc_policy=policy)
        )

    return make


def _trl_fused_head(names: tuple[str, ...]) -> Callable[[Problem], Loss]:
    """The function behind `trl.trainer.utils.add_fused_lm_head`, called as the forward of TRL's trainers calls it."""

    def make(problem: Problem) -> Loss:
        try:
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction
        except ImportError as error:
            raise Skip(f"TRL with a fused LM head is not installed ({error})") from error

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            mask = labels != -100
            targets = labels.clamp(min=0)
            if hidden.is_cuda:
                hidden, targets = hidden[mask], targets[mask]
            log_probs, *_ = _ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, names
            )
            if hidden.is_cuda:
                log_probs = torch.zeros_like(mask, dtype=log_probs.dtype).masked_scatter(mask, log_probs)
            return _loss(log_probs, labels, names is OF_DPO)

        return loss

    return make


def _frozen(make: Callable[[Problem], Loss]) -> Callable[[Problem], Loss]:
    """The same with an LM head that is not trained, as beside LoRA adapters."""

    def make_frozen(problem: Problem) -> Loss:
        loss, frozen = make(problem), {}

        def of_frozen(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            if id(weight) not in frozen:
                frozen[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
            return loss(hidden, frozen[id(weight)], labels)

        return of_frozen

    return make_frozen


def _liger(accum_dtype: torch.dtype | None) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        problem.require_cuda()
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError as error:
            raise Skip(f"liger_kernel is not installed ({error})") from error

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            result = liger_fused_linear_cross_entropy(hidden, weight, labels, accum_dtype=accum_dtype)
            return result[0] if isinstance(result, tuple) else result

        return loss

    return make


def apple_cce(problem: Problem) -> Loss:
    """Exact: nothing is left out of the gradient, however small."""
    problem.require_cuda()
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Skip(f"cut_cross_entropy is not installed ({error})") from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        try:
            return linear_cross_entropy(hidden, weight, labels, impl="cce_exact")
        except (NotImplementedError, ValueError, KeyError):  # releases before the preset
            return linear_cross_entropy(hidden, weight, labels, impl="cce", filter_eps=None)

    return loss


def deepspeed_tiled(problem: Problem) -> Loss:
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    except ImportError as error:
        raise Skip(f"DeepSpeed with TiledFusedLogitsLoss is not installed ({error})") from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        count = (labels != -100).sum()

        def of_a_shard(_, hidden: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum") / count

        return TiledFusedLogitsLoss.apply(
            of_a_shard, None, hidden[None], labels[None], None, problem.num_chunks, [weight], "sum"
        )

    return loss


WAYS: dict[str, Callable[[Problem], Loss]] = {
    "plain": plain,
    "ds_minis, torch path": _ours(kernel=False),
    "ds_minis, kernel": _ours(kernel=True),
    "ds_minis, for TRL's SFT": _ours_per_token(_as_sft),
    "ds_minis, for TRL's DPO": _ours_per_token(_as_dpo, of_pair=True),
    "ds_minis, log_softmax and gather": _ours_per_token(lambda x, y, _: x.log_softmax(-1).gather(-1, y[:, None])[:, 0]),
    "torch linear_cross_entropy, auto": _torch_chunked("auto"),
    "torch linear_cross_entropy, accurate": _torch_chunked("accurate"),
    "TRL fused LM head, SFT": _trl_fused_head(OF_SFT),
    "TRL fused LM head, DPO": _trl_fused_head(OF_DPO),
    "Liger FLCE": _liger(None),
    "Liger FLCE, float32 sums": _liger(torch.float32),
    "Apple CCE, exact": apple_cce,
    "DeepSpeed TiledFusedLogitsLoss": deepspeed_tiled,
}
_OF_ADAPTERS = (
    *("plain", "ds_minis, torch path", "ds_minis, for TRL's SFT", "ds_minis, for TRL's DPO"),
    *("TRL fused LM head, SFT", "TRL fused LM head, DPO"),
)
WAYS |= {f"{name}{FROZEN}": _frozen(WAYS[name]) for name in _OF_ADAPTERS}
