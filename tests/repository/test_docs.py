"""What the documentation says exists, and is up to date."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parity import COLUMNS, PARALLEL_COLUMNS, PARALLEL_ROWS, ROWS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(p for p in ROOT.glob("*.md")),
    *(p for p in ROOT.glob("*/README.md")),
    *(p for p in ROOT.glob("docs/*.md")),
    *(p for p in ROOT.glob("examples/**/README.md")),
]


@pytest.mark.parametrize("script", ["settings_table.py", "messages.py", "picture.py"])
def test_what_is_made_by_a_script_is_up_to_date(script):
    subprocess.run([sys.executable, ROOT / "scripts" / script, "--check"], check=True)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert text.index("```sh") < 2600, "one screen to the first command"


def test_the_site_is_built_without_a_warning(tmp_path):
    """Links, anchors and the pages of the navigation; a link to nothing fails it."""
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site"), "--config-file"]
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    built = run([*build, str(ROOT / "mkdocs.yml")])
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in ("index.html", "settings/index.html", "benchmarks/index.html", "CONTRIBUTING/index.html"):
        assert (tmp_path / "site" / page).exists()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nothing](nothing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\nstrict: true\n")
    assert run([*build, str(tmp_path / "mkdocs.yml")]).returncode != 0


def test_the_matrix_has_all_cells_and_none_failed():
    table = [
        line.split(" | ") for line in (ROOT / "docs" / "parity_matrix.md").read_text().splitlines() if line[:2] == "| "
    ]
    assert table[0] == ["|", *COLUMNS][:-1] + [f"{list(COLUMNS)[-1]} |"]
    assert [line[0].removeprefix("| ") for line in table[1:]] == list(ROWS)
    for line in table[1:]:
        assert len(line) == len(COLUMNS) + 1 and all(text.startswith(("exact ", "refused [")) for text in line[1:]), (
            line
        )


def test_the_matrix_of_sequence_parallelism_has_all_cells_and_none_failed():
    """A cell that was not run says so; those of whole layers were all run."""
    page = (ROOT / "docs" / "sequence_parallel_matrix.md").read_text()
    names, _, *lines = [
        [text.strip() for text in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    assert names == ["", *PARALLEL_COLUMNS] and [line[0] for line in lines] == list(PARALLEL_ROWS)
    for row, *texts in lines:
        for column, text in zip(PARALLEL_COLUMNS, texts, strict=True):
            allowed = ("exact ",) if ", layer, " in column else ("exact ", "not run")
            assert text.startswith(allowed), (row, column, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"(?:sh|python) ((?:[\w.]+/)*[\w.]+\.(?:sh|py))", text)
    for link in links:
        assert (page.parent / link.split("#")[0]).exists(), link
    for path in paths:
        assert (ROOT / path).exists() or (page.parent / path).exists(), path
