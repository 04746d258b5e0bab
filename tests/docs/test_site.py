"""The sources of the documentation site: every page is there, and every link leads to one. `make docs` builds it."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from tree import ROOT

BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))  # a script, not a module of the project
PAGES = [page for section in BUILD["pages"](ROOT).values() for page in section]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("docs") / "pages"
    BUILD["stage"](ROOT, folder)
    return folder


def test_every_page_of_the_documentation_is_in_the_navigation(staged: Path) -> None:
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")} <= set(PAGES)
    project = tomllib.loads(BUILD["configuration"](ROOT))["project"]
    titles = [title for entry in project["nav"] for title in entry]
    assert titles == ["Home", "Examples", "Guide", "Benchmarks", "Project"]
    named = re.findall(r"'([^']+\.md)'", str(project["nav"]))
    assert len(named) == len(PAGES)
    assert [name for name in named if not (staged / name).exists()] == []
    assert all((staged / name).exists() for name in project["extra_css"])


def test_links_stay_inside_the_site(staged: Path) -> None:
    pages = [page for page in staged.rglob("*.md") if "source" not in page.parts]
    assert len(pages) == len(PAGES)
    links = [
        (page, link)
        for page in pages
        for text in BUILD["FENCED"].split(page.read_text())[::2]
        for _, link, _ in BUILD["LINK"].findall(text)
        if "://" not in link and not link.startswith("#")
    ]
    assert len(links) > 60
    lost = [(page, link) for page, link in links if not (page.parent / link.partition("#")[0]).is_file()]
    assert lost == []


def test_a_linked_source_file_is_shown_whole(staged: Path) -> None:
    assert (ROOT / "slime" / "loop.py").read_text() in (staged / "source" / "slime" / "loop.py.md").read_text()


def small(root: Path, text: str) -> None:
    """Make a project with one page that contains `text`."""
    for name in ("README.md", "examples/README.md", "docs/look.css", *BUILD["BENCHMARKS"], *BUILD["PROJECT"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# Title\n")
    (root / "docs" / "page.md").write_text(text)


def test_links_are_rewritten_in_text_and_not_in_code(tmp_path: Path) -> None:
    small(tmp_path, "[a](../README.md#title) ![b](c.svg) [d](#e) [f](https://g)\n```\n[a](../README.md)\n```\n")
    (tmp_path / "docs" / "c.svg").write_text("<svg/>")
    BUILD["stage"](tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "page.md").read_text()
    assert page == "[a](index.md#title) ![b](c.svg) [d](#e) [f](https://g)\n```\n[a](../README.md)\n```\n"
    assert (tmp_path / "out" / "c.svg").exists()


def test_a_dead_link_is_named(tmp_path: Path) -> None:
    small(tmp_path, "[a](../nothing.py)")
    with pytest.raises(ValueError, match=r"docs/page\.md: the link \.\./nothing\.py leads to no file"):
        BUILD["stage"](tmp_path, tmp_path / "out")
