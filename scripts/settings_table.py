"""Writes the table of settings into docs/settings.md, from the documentation of `MiniSequenceConfig`'s fields.

python scripts/settings_table.py            # rewrite docs/settings.md
python scripts/settings_table.py --check    # fail if it is out of date
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from made_blocks import make_block

from ds_minis import MiniSequenceConfig

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def table() -> str:
    rows, defaults = ["| key | default | meaning |", "|---|---|---|"], MiniSequenceConfig().to_dict()
    for spec in dataclasses.fields(MiniSequenceConfig):
        rows.append(f"| `{spec.name}` | `{json.dumps(defaults[spec.name])}` | {spec.metadata['doc']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    make_block(PAGE, "settings", table, __doc__)
