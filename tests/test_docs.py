"""What the documents name is there, and what the code can answer is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_are_named_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    named = set(re.findall(r"`((?:tests|scripts|benchmarks|etc)/[\w./-]+)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_code_that_is_answered_is_documented() -> None:
    """Clients decide by the codes, operators look them up."""
    found: set[str] = set()
    for file in (ROOT / "proxy").rglob("*.py"):
        if not {"simulator", "cli", "config"} & set(file.parts):
            text = file.read_text("utf-8")
            found |= set(re.findall(r'\bcode="([A-Z][A-Z_]+)"', text))
            found |= set(re.findall(r'default_code.* = "([A-Z_]+)"', text))
    page = (ROOT / "docs/api.md").read_text("utf-8")
    assert found
    assert {code for code in found if f"`{code}`" not in page} == set()
