"""Trains every engine with every way to train, converted and unconverted, and prints what came of it as a table.

    python scripts/parity_matrix.py                                  # all cells: real engines in 2 processes, on the CPU
    python scripts/parity_matrix.py --rows ZeRO-3 --columns full bf16
    python scripts/parity_matrix.py --write                          # and docs/parity_matrix.md with it
    python scripts/parity_matrix.py --write --resume matrix.json     # goes on after the rows that the file has
    python scripts/parity_matrix.py --keep mixed                     # the same cells where layers keep more than their inputs

Its exit status is 0 when every cell is exact, or refused by the engine for the unconverted model too.
"""

from __future__ import annotations

import dataclasses
import os
import sys

from matrix import ROOT, as_page, finish, make_parser, run

PAGE = ROOT / "docs" / "parity_matrix.md"
EXPLANATION = """\
Rows are engines, columns are ways to train. In every cell a small Llama is trained for 4 steps with SGD, converted and
unconverted, from the same weights and on the same data: in 2 processes over gloo (the first row: in one), with other
sequence lengths and other numbers of chunks on each rank, prompts masked, one sequence padded.

- **exact**: the parameters after these steps are the unconverted model's under the same engine, *and* those of one process
  without an engine on the data of both ranks. The figure is the largest difference in a tensor, relative to its largest
  entry; allowed is 1e-5.
- bf16: the difference from the unconverted bf16 run (allowed: 2e-2, since bf16 rounds to 4e-3 and chunks round in another
  order) and, in brackets, how far from float32 the converted run is, of the unconverted one's distance (allowed: 1.1x).
- dropout: chunks draw other random numbers, so {seeds} runs of each kind are compared: the distance of the mean parameters
  beside that of the same runs divided by lot, and the difference of the runs' spread, in standard errors (allowed:
  {errors:.0f}). `tests/engines/test_matrix.py` shows that this finds dropout left out, applied twice or scaled wrongly, and
  another mask in backward than in forward.
- **refused**: the engine refuses the unconverted model too, with the same words.

Columns: uneven lengths are 5 tokens on one rank and 100 on the other; QLoRA is 4-bit NF4 with double quantization; gradients
are clipped to a sixth of their norm; dropout is in the MLPs; checkpointing is on and non-reentrant but where the column says
otherwise; "two forwards" come before one backward; a loss that reads the head's weight computes its logits from hidden states
as TRL and Liger do, without calling the head. The engines are torch's and DeepSpeed's own, with a decoder layer as the unit
of FSDP.
"""


HEAD = """\
# Every engine, every way to train

<!-- made by scripts/parity_matrix.py --write -->

"""


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from parity import COLUMNS, MAX_STANDARD_ERRORS, ROWS, SEEDS, cell

    parser = make_parser(__doc__, list(ROWS), list(COLUMNS), PAGE)
    parser.add_argument(
        "--keep",
        choices=("", "attention", "matmuls", "all", "mixed", "free"),
        default="",
        help='"keep" of the converted model; mixed: everything on one rank, some of each level on the other; free: '
        '"memory_budget": "auto"',
    )
    args = parser.parse_args()
    if args.write and (args.rows != list(ROWS) or args.columns != list(COLUMNS) or args.keep):
        parser.error("--write is for the whole matrix: leave --rows, --columns and --keep out")
    done = run(args, lambda row, column: dataclasses.replace(cell(row, column), keep=args.keep))
    head = HEAD + EXPLANATION.format(seeds=SEEDS, errors=MAX_STANDARD_ERRORS)
    return finish(as_page(head, done, args.rows, args.columns), PAGE, args.write, done, args.rows)


if __name__ == "__main__":
    sys.exit(main())
