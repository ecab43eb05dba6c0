"""Runs what reads deferred logits chunk by chunk, as one autograd node of the head that is trained.

Shapes: leading dimensions `*L` (R rows when flattened), C rows of one chunk, V vocabulary, K any width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_minis.loss.heads.chunked_head import ChunkedHead
from ds_minis.loss.heads.one_factor import Labelled
from ds_minis.loss.logits.expression import Evaluation, Expression, HeadRows

_SECOND_HEAD = "several LM heads that are trained, or held in parts, at once"


def by_chunks(expression: Expression, function: Callable[..., Tensor], aligned_R: Sequence[Tensor]) -> Tensor:
    """`function(value_CV, *aligned_C)` of each chunk of rows, concatenated: `(R, ...)`, one result per row."""
    return _run(expression, function, aligned_R, lambda head, *run: head.tile(*run))


def columns_by_chunks(
    expression: Expression, function: Callable[..., Tensor], aligned_R: Sequence[Tensor], labelled: Labelled | None
) -> tuple[Tensor, ...]:
    """The columns of a `function` that gives `(C, N)`, N tensors `(R,)`; see `row_columns.row_columns`."""
    return _run(
        expression,
        function,
        aligned_R,
        lambda head, on_rows, sample, *rows: head.columns(on_rows, sample, labelled, *rows),
    )


def sum_by_chunks(
    expression: Expression, function: Callable[..., Tensor], expected: Tensor, aligned_R: Sequence[Tensor]
) -> Tensor:
    """The sum of these results over all rows; `expected` is its probable incoming gradient, see `tiled_sum.sum_rows`."""
    return _run(
        expression, function, aligned_R, lambda head, on_rows, sample, *rows: head.sum(on_rows, sample, expected, *rows)
    )


def _run(expression: Expression, function: Callable[..., Tensor], aligned_R: Sequence[Tensor], run: Callable) -> Any:
    """`run(head, function of rows, sample_0V, *rows)`, with the head whose module is called."""
    expression.require_unwritten()
    node, leaves = expression.node, dict(expression.leaves)
    own = _main(expression)
    in_full = set(_in_full(expression, own))
    for other in node.heads():
        if other.head in in_full and leaves[other.key] is expression.leaves[other.key]:
            other.head.warn_materialized(_SECOND_HEAD)
            leaves[other.key] = _all_logits(other, leaves[other.key], expression.grad)
        elif other.head is not own.head:
            other.head.require_readable()
    keys = [own.key, *(key for key in leaves if key is not own.key)]

    def logits_of(head: ChunkedHead, rows_CK: Tensor) -> Tensor:
        return rows_CK if head in in_full else head.of_chunk(rows_CK)

    def on_rows(*rows: Tensor, **options) -> Tensor:
        values = dict(zip(keys, rows, strict=False))
        return function(Evaluation(node, values, logits_of).value(node), *rows[len(keys) :], **options)

    rows = [leaves[key].reshape(-1, leaves[key].shape[-1]) for key in keys]
    with torch.set_grad_enabled(expression.grad and torch.is_grad_enabled()):
        return run(own.head, on_rows, expression.sample_0V, *rows, *aligned_R)


def _main(expression: Expression) -> HeadRows:
    """The head whose module is called, with its engine's hooks: one that is trained, if there is any."""
    heads = list(expression.node.heads())
    return next((own for own in heads if _has_grad(own, expression)), heads[0])


def _has_grad(own: HeadRows, expression: Expression) -> bool:
    return own.grad and (expression.leaves[own.key].requires_grad or own.head.is_trained())


def _in_full(expression: Expression, main: HeadRows) -> Iterator[ChunkedHead]:
    """The heads whose logits are computed in full: an autograd node can train, and gather the weights of, one module only."""
    for own in expression.node.heads():
        apart = own.head.sharded or (expression.grad and _has_grad(own, expression))
        if apart and own.head.module is not main.head.module:
            yield own.head


def _all_logits(own: HeadRows, hidden_LH: Tensor, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return own.rows(Evaluation(own, {own.key: hidden_LH}, ChunkedHead.logits))
