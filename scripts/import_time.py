"""Measures what an installed ds_minis adds to `import torch`.

python scripts/import_time.py               # 20 fresh processes, minimum and median

torch loads the entry points of the group `torch.backends` at the end of its import. Each process imports torch without
that, and then times the loading and calling of ds_minis's: nothing else about the import differs. The time is the
processor's, so that other work on the machine does not count, and of compiled files, as pip leaves them: the first
process compiles those of a checkout, also where `PYTHONDONTWRITEBYTECODE` is set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

MEASURE = """
import time, importlib.metadata, torch
(entry,) = importlib.metadata.entry_points(group="torch.backends", name="ds_minis")
start = time.process_time()
entry.load()()
print(1e3 * (time.process_time() - start))
"""


def milliseconds(processes: int) -> list[float]:
    """The cost in each of so many fresh processes; more than one, as the first one compiles."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", MEASURE]
    return [float(subprocess.check_output(command, env=environment, text=True)) for _ in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=20)
    found = milliseconds(parser.parse_args().processes)
    print(
        f"import torch costs {statistics.median(found):.2f} ms more (minimum {min(found):.2f}, {len(found)} processes)"
    )


if __name__ == "__main__":
    main()
