"""Links between the pages of the repository lead somewhere, and each page of docs is near the README."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from harness import ROOT

README = ROOT / "README.md"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """All pages that git has, and new ones that it does not ignore. (Advisories are the texts of others.)"""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", ":!tools/advisories"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).exists()]


@cache
def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> set[tuple[Path, str]]:
    """What a page links to in this repository: a file or folder, and an anchor or ''."""
    found = set()
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            found.add(((page.parent / path).resolve() if path else page, anchor))
    return found


def destination(target: Path) -> Path:
    """The page that a link to a file or folder shows."""
    return target / "README.md" if target.is_dir() else target


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {target}"
        if anchor and destination(target).suffix == ".md":
            assert anchor in headings(destination(target)), f"{page.name} links to {anchor} in {target}"


def test_pages_are_at_most_two_clicks_from_the_readme() -> None:
    near = {README}
    for _ in range(2):
        near |= {destination(target) for page in near if page.suffix == ".md" for target, _ in links(page)}
        near = {page for page in near if page.exists()}
    assert {page for page in pages() if page.is_relative_to(ROOT / "docs")} <= near


def test_readme_lists_each_page_of_docs() -> None:
    listed = {target for target, _ in links(README)}
    assert {page for page in pages() if page.parent == ROOT / "docs"} <= listed
