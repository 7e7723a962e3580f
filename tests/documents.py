"""The pages for users, taken apart: tests try what they say."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "docs/guide.md"
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"


def anchors(page: Path) -> set[str]:
    """Of its titles, as forges make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: Path, title: str) -> str:
    """What stands below a title, up to the next one of its level or above."""
    text = page.read_text("utf-8")
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found is not None, title
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest if end is None else rest[: end.start()]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables of a text, by cells; titles and rules left out."""
    found: list[list[str]] = []
    rule = re.compile(r"\|[-|]+\|")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_title = number + 1 < len(lines) and rule.fullmatch(lines[number + 1]) is not None
        if line.startswith("|") and not is_title and not rule.fullmatch(line):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def named_json(page: Path) -> dict[str, str]:
    """The content of each file that a page shows, by its name."""
    text = page.read_text("utf-8")
    found = re.findall(r"^`([\w-]+\.json)`\n\n```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == len({name for name, _ in found}), "two files of one name"
    return dict(found)


@dataclass(frozen=True, slots=True)
class Command:
    """A command line of ``xo-proxy``, without the program's name."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)}"


def commands(page: Path) -> list[Command]:
    """Those in blocks of shell, and those within sentences; ``…`` stands for words left out."""
    text = page.read_text("utf-8")
    lines: list[str] = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(xo-proxy [a-z-][^`]*)`", without_blocks)
    found: list[Command] = []
    for line in lines:
        command = re.fullmatch(r"\s*(?:\S*/)?xo-proxy (.*)", line, re.DOTALL)
        if command is not None:
            found.append(Command(page, tuple(_words(command[1]))))
    return found


def _words(line: str) -> list[str]:
    """Those before a pipe and the like."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split = True
    found: list[str] = []
    for word in lexer:
        if word[0] in "|<>;&":
            break
        found.append(word)
    return [word for word in found if word != "…"]
