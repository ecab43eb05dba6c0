"""What `ds-minis plan` prints: a table of the ways to train, the memory of the advised one by part, a sentence of advice."""

from __future__ import annotations

from typing import Any

from ds_minis.cli.show import Part, Table, as_lines

_GIB = 2**30
_PARTS = "parameters", "gradients", "optimizer", "engine", "layer inputs", "transient", "fixed"


def as_text(plan: Any) -> str:
    """The plan as plain text."""
    return as_lines(as_parts(plan))


def as_parts(plan: Any) -> list[Part]:
    """The plan for people."""
    lines: list[Part] = [*_head(plan), "", _table(plan)]
    row = plan.best or _least(plan)
    if row is not None:
        lines += ["", *_breakdown(plan, row)]
    lines += ["", _kept(plan)] if any(plan.kept.values()) else []
    lines += ["", advice(plan)]
    warned = [row for row in plan.rows if row.overflow and (row is plan.best or plan.tokens is not None)]
    for text in dict.fromkeys(row.overflow for row in warned):
        names = "; ".join(row.candidate.name for row in warned if row.overflow == text)
        lines.append(f"warning ({names}): {text}")
    lines += [f"note: {note}" for note in plan.notes]
    failures = dict.fromkeys(row.failure for row in plan.rows if row.failure)
    lines += [f"not planned: {failure}" for failure in failures]
    return lines


def _head(plan: Any) -> list[str]:
    setup, text = plan.setup, plan.planner.text
    profile = next(iter(plan.planner.profiles.values()))
    rank, memory = f"rank {setup.lora_rank}", f"{plan.gpu_memory:g} GB"
    trained = {"full": "full fine-tuning", "lora": f"LoRA, {rank}", "qlora": f"QLoRA, {rank}"}
    engine = f"{setup.gpus} x {memory}" if setup.gpus > 1 else f"one {memory} card"
    engine = engine if setup.engine == "single" else f"{setup.engine}, {engine}"
    return [
        f"{plan.model}: {profile.parameters['all'] / 1e9:.2f}B parameters, {text.num_hidden_layers} layers; "
        f"{trained[setup.train]}, {setup.dtype}, {setup.optimizer}, batch {setup.batch}; {engine}, "
        f"{plan.host_capacity(setup.gpus) / _GIB:.0f} GiB of host memory for each process",
    ]


def _table(plan: Any) -> Table:
    asked = plan.tokens is not None
    heads = ["", "longest that fits", "GiB per GPU", "host GiB per process", "s per step"]
    if asked:
        heads[1:2] = [f"{plan.tokens:,} tokens", "longest that fits"]
    rows = []
    for row in plan.rows:
        if row.failure:
            rows.append([row.candidate.name, "not planned", *[""] * (len(heads) - 2)])
            continue
        estimate = row.estimate
        cells = [f"{row.longest:,}" if row.longest else "none", f"{estimate.device / _GIB:.1f}"]
        cells += [f"{estimate.host / _GIB:.1f}" if estimate.host else "", _seconds(row.time.seconds)]
        rows.append([row.candidate.name, *([row.verdict] if asked else []), *cells])
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    plain = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in [heads, *rows]
    ]
    return Table(heads, rows, plain, numbers=1)


def _breakdown(plan: Any, row: Any) -> list[Part]:
    estimate = row.estimate
    head = f"Memory of one GPU: {row.candidate.name}, {estimate.tokens:,} tokens, in GiB (peak in the {estimate.where})"
    terms = sorted(
        estimate.terms, key=lambda term: (term.on_host, _PARTS.index(term.part) if term.part in _PARTS else 9)
    )
    rows, lines = [], []
    for term in terms:
        if term.nbytes < 0.005 * _GIB:
            continue
        kind = "counted" if term.measured else "modelled"
        place = " (host)" if term.on_host else ""
        rows.append([f"{term.nbytes / _GIB:.2f}", term.name + place, kind, term.why])
        lines.append(f"  {term.nbytes / _GIB:8.2f}  {term.name + place:34} {kind:9} {term.why}")
    card = f"{plan.capacity / _GIB:.1f} that a process may have ({plan.gpu_memory:g} GB x 0.985)"
    sums = [(estimate.device, f"on the GPU, of {card}")]
    sums += [(term.nbytes, f"slack: {term.name}, {term.why}") for term in estimate.slack]
    table = Table(["GiB", "", "how", "why"], rows, lines)
    return [head, table, *(f"  {nbytes / _GIB:8.2f}  {text}" for nbytes, text in sums)]


def _kept(plan: Any) -> str:
    words = {
        "all": "everything",
        "matmuls": "the results of its matrix products",
        "attention": "the attention's output",
    }
    reached = [f"{words[level]} up to {tokens:,} tokens" for level, tokens in plan.kept.items() if tokens]
    return f"Memory that is free is used (keep: auto): each layer keeps {', '.join(reached)}, and above that some layers do."


def advice(plan: Any) -> str:
    """One sentence: what to set, what it reaches, what it costs."""
    row, asked = plan.best, plan.tokens
    if row is None:
        return _no_way(plan)
    named, host = _settings(row), _host(row)
    costs = f" (it costs: {row.candidate.costs})" if row.candidate.costs else ""
    if asked is not None:
        word = "fit" if row.verdict == "fits" else "may fit (within the listed slack)"
        reached = f", up to {row.longest:,}" if row.longest > asked else ""
        return f"Advice: {asked:,} tokens {word} with {named}{reached}{host}{costs}."
    if not row.longest:
        return f"Advice: {row.estimate.tokens:,} tokens may fit (within the listed slack) with {named}{host}{costs}."
    plain = next((r for r in plan.rows if r.candidate.name == "plain + checkpointing"), None)
    times = ""
    if plain and plain.longest and row is not plain:
        times = f", {row.longest / plain.longest:.1f} times plain checkpointing"
    return f"Advice: with {named} you reach {row.longest:,} tokens{times}{host}{costs}."


def _host(row: Any) -> str:
    host = row.estimate.host / _GIB
    return f"; each process then needs {host:.0f} GiB of host memory" if host > 1 else ""


def _no_way(plan: Any) -> str:
    if plan.gpus_needed is not None:
        (gpus, row), own = plan.gpus_needed, plan.setup.gpus
        return (
            f"Advice: {row.estimate.tokens:,} tokens do not fit on {own} GPU{'s'[: own > 1]}; they do on {gpus} with "
            f"{row.candidate.setup.engine} and {_settings(row)}{_host(row)}."
        )
    shorter = max((row.longest for row in plan.rows), default=0)
    reached = f"; the longest that fits is {shorter:,}" if shorter else ""
    fewer = {"full": "--lora, --qlora, ", "lora": "--qlora, ", "qlora": ""}[plan.setup.train]
    return f"Advice: nothing fits as asked{reached}. What needs less: {fewer}a smaller model, or larger cards."


def _settings(row: Any) -> str:
    settings = row.candidate.setup.settings
    if settings is None:
        return row.candidate.name
    words = ", ".join(f"`{key}: {value}`" for key, value in settings.items())
    return words or "ds_minis's defaults"


def _least(plan: Any) -> Any:
    rows = [row for row in plan.rows if row.estimate]
    return min(rows, key=lambda row: row.estimate.device, default=None)


def _seconds(value: float) -> str:
    return f"~{value:.0f}" if value >= 10 else f"~{value:.1f}"


def as_data(plan: Any) -> dict[str, Any]:
    """The plan as plain JSON types; bytes everywhere."""
    return {
        "model": plan.model,
        "gpu_memory_gb": plan.gpu_memory,
        "capacity_bytes": plan.capacity,
        "gpus": plan.setup.gpus,
        "engine": plan.setup.engine,
        "train": plan.setup.train,
        "tokens": plan.tokens,
        "verdict": plan.verdict,
        "advice": advice(plan),
        "best": plan.best.candidate.name if plan.best else None,
        "gpus_needed": plan.gpus_needed[0] if plan.gpus_needed else None,
        "kept_up_to": plan.kept,
        "rows": [_row_data(row) for row in plan.rows],
    }


def _row_data(row: Any) -> dict[str, Any]:
    if row.failure:
        return {"name": row.candidate.name, "failure": row.failure}
    return {
        "name": row.candidate.name,
        "settings": row.candidate.setup.settings,
        "longest": row.longest,
        "verdict": row.verdict,
        "tokens": row.estimate.tokens,
        "device_bytes": row.estimate.device,
        "allocated_bytes": row.estimate.allocated,
        "host_bytes": row.estimate.host,
        "slack_bytes": sum(term.nbytes for term in row.estimate.slack),
        "peak_in": row.estimate.where,
        "terms": [
            {
                "name": t.name,
                "part": t.part,
                "bytes": t.nbytes,
                "measured": t.measured,
                "on_host": t.on_host,
                "why": t.why,
            }
            for t in row.estimate.terms
        ],
        "modelled_seconds": row.time.seconds,
        "overflow": row.overflow or None,
    }
