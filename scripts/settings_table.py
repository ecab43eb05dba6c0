"""Writes the table of settings into docs/settings.md, from the documentation of `MiniSequenceConfig`'s fields.

python scripts/settings_table.py            # rewrite docs/settings.md
python scripts/settings_table.py --check    # fail if it is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

from ds_minis import MiniSequenceConfig

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
BLOCK = re.compile(r"(<!-- settings: [^\n]*-->\n).*?(<!-- end of settings -->)", re.DOTALL)


def table() -> str:
    rows, defaults = ["| key | default | meaning |", "|---|---|---|"], MiniSequenceConfig().to_dict()
    for spec in dataclasses.fields(MiniSequenceConfig):
        rows.append(f"| `{spec.name}` | `{json.dumps(defaults[spec.name])}` | {spec.metadata['doc']} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda block: block[1] + table() + block[2], old)
    if check and new != old:
        sys.exit("docs/settings.md: the table of settings is out of date; run python scripts/settings_table.py")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
