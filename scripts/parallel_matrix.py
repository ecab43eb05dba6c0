"""Trains every engine with groups of ranks that share sequences, in every mode, and prints what came of it as a table.

    python scripts/parallel_matrix.py                          # all cells: real engines in 2 and in 4 processes, on the CPU
    python scripts/parallel_matrix.py --rows "ZeRO-3, 4 ranks" --columns "ring, layer, full"
    python scripts/parallel_matrix.py --write --resume m.json  # and docs/sequence_parallel_matrix.md with all that m.json has

Its exit status is 0 when no cell that was run is wrong. The page says of the others that they were not run.
"""

from __future__ import annotations

import os
import sys

from matrix import ROOT, as_page, finish, make_parser, run

PAGE = ROOT / "docs" / "sequence_parallel_matrix.md"
HEAD = """\
# Sequence parallelism under every engine

<!-- made by scripts/parallel_matrix.py --write -->

Rows are engines and how ranks are grouped: "2 ranks" and "4 ranks" are one group that shares every sequence, "2 x 2 ranks"
are two groups of two, each with batches of its own. Columns are the mode of attention, the scope of the tiling, and what is
trained.

In every cell a small Llama (2 layers, 4 heads, 2 KV heads) is converted and trained for 4 steps of two micro batches with SGD
at a learning rate of 0.2, in real processes over gloo, under the engine itself, with non-reentrant checkpointing. Lengths are
21 to 48 tokens, others at each step and in each group, and most of them cannot be divided by the number of ranks; prompts are
masked, a row is padded on the right, the ranks of a group have other chunk sizes.

- **exact**: the parameters after these steps, and the losses of the first group, are those of one process without an engine
  and without conversion that is given the batches of all groups. The figure is the largest difference in a tensor,
  relative to its largest entry; allowed is 1e-5. The cell also asserts the engine's class, the ZeRO stage, the number of
  processes, that all was tiled that the scope says, and that every attention ran in the mode that was asked for.
- **FAILED**: anything else; no cell may be refused.
- **not run**: nothing is known of it.

FSDP1 is with use_orig_params=True; a decoder layer is the unit of FSDP. A part of the table is run in CI
(`tests/parallel/test_engines_parallel.py`).
"""


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from parity import PARALLEL_COLUMNS, PARALLEL_ROWS, parallel_cell

    rows, columns = list(PARALLEL_ROWS), list(PARALLEL_COLUMNS)
    args = make_parser(__doc__, rows, columns, PAGE).parse_args()
    done = run(args, parallel_cell)
    shown = (rows, columns) if args.write else (args.rows, args.columns)
    return finish(as_page(HEAD, done, *shown), PAGE, args.write, done, shown[0])


if __name__ == "__main__":
    sys.exit(main())
