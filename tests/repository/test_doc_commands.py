"""The commands of README and docs are ones that the programs take: each is parsed, and its flags are those of the script."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support import warm

from ds_minis.cli.command import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md")]
TORCH = {"--nproc_per_node", "--standalone"}  # torchrun's


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks of shell, continued lines joined, without comments."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


OURS = sorted({line for page in PAGES for line in commands(page) if line.startswith("ds-minis ")})
SCRIPTS = sorted(
    {line for page in PAGES for line in commands(page) if re.search(r"\bscripts/[\w/]+\.py\b", line)}
    | {f"python {text}" for page in PAGES for text in re.findall(r"`python (scripts/[^`]+)`", page.read_text())}
)


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_ds_minis_is_parsed(line):
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    try:
        args = make_parser().parse_args(words)
    except SystemExit as error:
        assert words[-1] in ("--help", "--version") and error.code == 0, line
    else:
        assert callable(args.run)


@pytest.mark.parametrize("script", sorted({re.search(r"scripts/[\w/]+\.py", line)[0] for line in SCRIPTS}))
def test_a_script_has_the_flags_that_are_named(script):
    done = subprocess.run(
        ["python", script, "--help"], cwd=ROOT, env=warm.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line in SCRIPTS:
        if script in line:
            flags = {word.split("=")[0] for word in shlex.split(line, comments=True) if word.startswith("--")}
            missing = {flag for flag in flags - TORCH if flag not in done.stdout}
            assert not missing, (line, missing)
