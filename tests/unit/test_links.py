"""The relative links of every Markdown page lead to an existing file and heading."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_tools.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    """The targets of the page's links and pictures within this repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return (link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_source_file_that_a_page_names_exists(page):
    """A path may start at the root, `tools` or `clip_tools`. Paths with a placeholder such as NAME are skipped."""
    named = set(re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|c|cu|pbtxt|sh|ya?ml|md))`", prose(page)))
    tops = (ROOT, ROOT / "tools", ROOT / "tools" / "clip_tools")
    named = {path for path in named if not re.search("NAME|MODEL|BACKEND", path)}
    assert [path for path in named if not any((top / path).is_file() for top in tops)] == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Two words, `code`\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#two-words-code) [b](other.md#three) ![c](none.png) [d](#none) [e](https://x.y)\n")
    assert broken_links(page) == ["other.md#three", "none.png", "#none"]


def test_the_index_names_every_page():
    listed = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed
