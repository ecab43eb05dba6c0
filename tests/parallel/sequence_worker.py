"""Models with their sequences on 2 or 4 of four gloo processes, all cases in one start; run by test_sequence_parallel.py.

python sequence_worker.py CASES.json OUTPUT_FOLDER

Torch is imported once and the ranks are forked. With groups of 2, the two groups are given other batches, as two replicas
are. Rank r writes r.json: the differences of each case from the unconverted model in one process on all batches.
"""

import importlib.util
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from models import CONFIGS, add_lora
from support.forked import fork_ranks
from transformers import AutoModelForCausalLM

from ds_minis import convert_to_mini_sequence, mini_sequence_report
from ds_minis.loss.forward import fused_outputs
from ds_minis.loss.kernels.token_statistics import token_statistics

if importlib.util.find_spec("trl"):
    from trl.trainer.utils import add_fused_lm_head  # before the ranks are forked

RANKS, VOCAB = 4, 131


def make_model(case: dict):
    torch.manual_seed(0)
    config = CONFIGS[case["family"]]()
    if case["family"] in ("llama", "mistral"):
        config.num_hidden_layers = 1  # half of the time; others have two, and so has every model under an engine
    for name, value in case.get("config", {}).items():
        setattr(config, name, value)
    attention = "eager" if case["family"] == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if case.get("lora"):
        model = add_lora(model)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.get("own_loss"):
        model.loss_function = own_loss
    return model


def own_loss(logits, labels, vocab_size, **_):
    """Label smoothing, of which transformers' loss knows nothing."""
    logits, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def make_batch(case: dict, replica: int) -> dict:
    length = case["length"] + (7 * replica if case["length"] > 1 else 0)
    generator = torch.Generator().manual_seed(100 + replica)
    ids = torch.randint(1, VOCAB, (2, length), generator=generator)
    labels = ids.clone()
    labels[:, : min(5 + 3 * replica, length - 2)] = -100
    batch = {"input_ids": ids, "labels": labels}
    match case.get("rows", ""):
        case "packed":
            lengths = [length // 3, length // 2, length - length // 3 - length // 2]
            batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].repeat(2, 1)
            batch["use_cache"] = False
        case "left" | "right" as side:
            mask = torch.ones_like(ids)
            place = slice(0, 9) if side == "left" else slice(-9, None)
            mask[0, place] = 0
            labels[0, place] = -100
            batch["attention_mask"] = mask
        case "a shard without labels":
            labels[:, length // 4 :] = -100
            labels[:, 1] = ids[:, 1]
        case "a group without labels":
            if replica == 1:
                labels[:] = -100
            batch["num_items_in_batch"] = torch.tensor(17)
        case "shift_labels":
            batch["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=7)[:, 1:].contiguous()
        case "no labels anywhere":
            labels[:] = -100
        case "num_items_in_batch":
            batch["num_items_in_batch"] = torch.tensor(23)
    return batch


def losses_of(case: dict, model, batch: dict) -> torch.Tensor:
    """The loss, as the model or as a trainer computes it."""
    if case.get("fused"):
        return fused_loss(model(**batch, fused_lm_head=True))
    if not case.get("trainer"):
        return model(**batch).loss
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )


def fused_loss(output) -> torch.Tensor:
    """Of all that TRL's trainers read of a call with `fused_lm_head=True` and that has a gradient."""
    weights = torch.linspace(-1, 2, output.log_probs.numel()).view_as(output.log_probs)
    return output.loss + (weights * output.log_probs).mean() + 0.3 * output.entropy.square().mean()


def counting_rows(counts: list[int]):
    """Inside, the rows of logits whose statistics are computed are counted."""

    def counted(logits, *args):
        counts.append(len(logits))
        return token_statistics(logits, *args)

    return mock.patch.object(fused_outputs, "token_statistics", counted)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; none between two NaNs, as of losses without labels, infinite between a NaN and a number."""
    if torch.equal(a.isnan(), b.isnan()) and a.isnan().all():
        return 0.0
    return (a - b).abs().nan_to_num(torch.inf).max().item()


def run(case: dict) -> dict:
    size, rank = case["size"], dist.get_rank()
    replicas = RANKS // size
    plain, model = make_model(case), make_model(case)
    settings = {"chunk_size": 8, "loss_chunk_size": 10, **case.get("settings", {})}
    settings["sequence_parallel"] = {"size": size, "mode": case["mode"]}
    convert_to_mini_sequence(model, settings)
    if case.get("fused"):
        for m in (plain, model):
            add_fused_lm_head(m, temperature=0.7, outputs=("log_probs", "entropy"))
    if case["length"] == 1:  # a layer that has seen more tokens is analyzed in a fraction of the time
        losses_of(case, model, make_batch(case | {"length": 38}, 0))
    expected = []
    for replica in range(replicas):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)):
            loss = losses_of(case, plain, make_batch(case, replica))
        (loss / replicas).backward()
        expected.append(loss.detach())
    batch = make_batch(case, rank // size)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False))
    with autocast, counting_rows(rows := []):
        loss = losses_of(case, model, batch)
    loss.backward()
    wrong = {"loss": difference(loss.detach(), expected[rank // size])}
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None), name
        if other.grad is not None:
            dist.all_reduce(param.grad)
            largest = other.grad.abs().max().item()
            # Zero but for rounding (queries of one token): so is the other one.
            scale = largest if largest > 1e-6 else 0.1
            wrong[name] = difference(param.grad / RANKS, other.grad) / scale
    result = {"wrong": max(wrong.values()), "where": max(wrong, key=wrong.get)}
    result["report"] = str(mini_sequence_report(model))
    result["rows"] = sum(rows) / batch["input_ids"].numel()
    model.eval(), plain.eval()
    batch.pop("num_items_in_batch", None)
    with torch.no_grad():
        if not case.get("trainer"):
            asked = {"fused_lm_head": True} if case.get("fused") else {}
            evaluated, true = (m(**batch, **asked, output_hidden_states=True) for m in (model, plain))
            result["evaluation"] = difference(evaluated.loss, true.loss)
            if not asked:
                pairs = zip(evaluated.hidden_states, true.hidden_states, strict=True)
                real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                result["hidden_states"] = max(difference(a[real], b[real]) for a, b in pairs)
        batch.pop("labels")
        if batch.pop("shift_labels", None) is not None:  # they are labels: such a pass is divided
            shifted = {"shift_labels": batch["input_ids"].roll(-1, -1)}
            result["shifted"] = (model(**batch, **shifted).logits - plain(**batch).logits).abs().max().item()
        result["whole"] = (model(**batch).logits - plain(**batch).logits).abs().max().item()
    return result


def refused(case: dict) -> str:
    """The words with which a case is refused, in conversion or in its first forward."""
    model = make_model(case)
    batch = make_batch(case, 0)
    if case.get("other_batches"):
        batch["input_ids"] = batch["input_ids"] + dist.get_rank() % 2
    if case.get("other_labels"):
        batch["labels"][0, -1] += dist.get_rank() % 2
    if case.get("rows_swapped") and dist.get_rank() % 2:
        batch = {name: rows.flip(0) for name, rows in batch.items()}
    if case.get("four_dimensions"):
        length = batch["input_ids"].shape[1]
        batch["attention_mask"] = torch.ones(1, 1, length, length).tril()
    batch |= case.get("arguments", {})
    if case.get("packed_with_cache"):
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None] % 7
    if case.get("mixing"):
        layer = model.model.layers[-1]
        layer.mlp.forward = mixing(layer.mlp.forward)
    try:
        convert_to_mini_sequence(
            model, {"chunk_size": 8, "sequence_parallel": case["size"], **case.get("settings", {})}
        )
        model(**batch)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mixing(forward):
    """An MLP that looks at the token before."""
    return lambda x: forward(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, -1)))


def main(rank: int, cases: list[dict], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results = {}
    for case in cases:
        try:
            results[case["name"]] = refused(case) if case.get("refused") else run(case)
        except Exception as error:  # of all ranks alike, or the barrier times out
            results[case["name"]] = {"error": "".join(traceback.format_exception(error)[-3:])}
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.exit(fork_ranks(RANKS, lambda rank: main(rank, cases, folder)))
