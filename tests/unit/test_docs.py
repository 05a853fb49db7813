"""Everything that the documents point to exists: links, headings and paths of the source."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "models" / "README.md",
        ROOT / "bench" / "results" / "README.md",
    ]
)
FOLDERS = (
    *("bench", "checkpoint", "cluster", "deploy", "docs", "echelon", "gateway", "kernels", "models", "protos"),
    *("scheduler", "tests", "workers"),
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
SOURCE_FILE = re.compile(r"[\w./-]+\.(?:py|proto|md|yaml|jsonl|sh|toml)")


def prose(page: Path) -> str:
    """The page without its fenced blocks, which show the reader's own files and commands."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            yield link


def is_of_ours(name: str) -> bool:
    """Whether the words in backticks name a file or folder of the repository."""
    top, slash, _ = name.partition("/")
    return bool(slash) and top in FOLDERS and (name.endswith("/") or SOURCE_FILE.fullmatch(name) is not None)


def missing_paths(page: Path) -> Iterator[str]:
    for name in CODE.findall(prose(page)):
        if is_of_ours(name) and not (ROOT / name).exists():
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_in_pages_exist(page: Path) -> None:
    assert list(broken_links(page)) == []
    assert list(missing_paths(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_conflict_of_a_merge_is_left(page: Path) -> None:
    assert not re.search(r"^(<<<<<<< |=======$|>>>>>>> )", page.read_text(), flags=re.MULTILINE)


def test_a_wrong_link_and_a_wrong_path_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[a](#a-page) [b](#b-page) [c](gone.md) `scheduler/gone.py` `cluster/` `cluster/x.py`\n")
    assert list(broken_links(page)) == ["#b-page", "gone.md"]
    assert list(missing_paths(page)) == ["scheduler/gone.py", "cluster/x.py"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in linked and page.suffix == ".md":
            linked.add(page)
            waiting += [
                (page.parent / link.partition("#")[0]).resolve()
                for link in LINK.findall(prose(page))
                if "://" not in link and not link.startswith("#")
            ]
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked
