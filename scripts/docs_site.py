"""mkdocs' hooks: pages of the repository that are not in docs/, and links that fit both GitHub and the site.

README.md is the site's first page; CONTRIBUTING.md and the READMEs beside code are pages under their own names. A link to
another file of the repository, which the site does not have, becomes its text; a link to what does not exist stays, and fails
the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "deepspeed_configs/README.md",
    "examples/**/README.md",
)
PICTURES = ("benchmarks/*.png",)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for pattern in (*PAGES, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()

    def changed(match: re.Match) -> str:
        mark, words, link, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in link:
            return match[0]
        path = posixpath.normpath(posixpath.join(source, link))  # in the repository
        target = "index.md" if path == "README.md" else path.removeprefix("docs/")
        if files.get_file_from_path(target) is not None:
            return f"{mark}[{words}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"
        return words if (ROOT / path).exists() else match[0]

    return LINK.sub(changed, markdown)
