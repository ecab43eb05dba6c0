"""Runs the core's tests with the oldest and the newest versions of other packages that ds_minis is to work with.

    python scripts/test_versions.py                 # both: two environments, about ten minutes on an idle machine
    python scripts/test_versions.py --only oldest -k "layer and not experts"

Each environment lies on top of this Python's packages, so what a set does not name (torch, say) is this Python's. What CI
runs is constraints.txt; docs/versions.md says what else was measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, CannotInstall, make, version

SETS = {"oldest": ("transformers==5.1.0", ()), "newest": ("transformers==5.24.0", ())}
NAMES = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed")
CORE = """
config/test_config.py convert/test_convert.py loss/test_deferred_logits.py layer/test_tiled_layer.py loss/test_tiled_loss.py
core/test_tiled_op.py modules/test_token_wise.py loss/test_module_borders.py convert/test_last_step.py
""".split()
# What the tests ask for and an old version does not have: models and implementations that came later.
NOT_THERE = {
    "oldest": "not gemma4_text and not batched_mm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "ds_minis_versions")
    parser.add_argument("-k", dest="expression", default="", help="of pytest: which tests")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        package, pins = SETS[name]
        place = args.environments.resolve() / package.replace("==", "-")
        try:
            python = make(place, package, pins, (), ())
        except CannotInstall as error:
            failed.append(name)
            print(f"{name}: {error}", flush=True)
            continue
        versions = ", ".join(f"{package} {version(python, package)}" for package in NAMES)
        print(f"{name}: {versions}", flush=True)
        wanted = " and ".join(f"({part})" for part in (args.expression, NOT_THERE.get(name, "")) if part)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-k", wanted] if wanted else [])]
        files = [str(ROOT / "tests" / part) for part in CORE]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if subprocess.run([*command, *files], cwd=ROOT, env=env).returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
