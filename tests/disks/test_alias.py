"""Aliases: what they may say, and that nobody else is believed."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.disks.alias import data_path, is_alias, parse_alias, read_alias, write_alias
from proxy.errors import Conflict, Corrupt, NotFound, Refused
from tests.disks.directories import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes import Remote

FOLDER = "xo-vm-backups/vm/vdis/job/vdi"
ALIAS = f"{FOLDER}/20260101T000000Z.alias.vhd"
RECORDED = Path(__file__).parents[1] / "fixtures" / "disks" / "recorded-directories"


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Remote]:
    async with opened(tmp_path) as faults:
        yield faults


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.alias.vhd", True),
        ("/d/20260101T000000Z.alias.vhd", True),
        ("alias.vhd", False),
        ("d/.alias.vhd", False),
        ("d/a.vhd", False),
        ("a.alias.vhd/b.vhd", False),
        ("a.ALIAS.VHD", False),
    ],
)
def test_what_an_alias_is_named(path: str, *, expected: bool) -> None:
    assert is_alias(path) is expected


def test_where_the_data_of_an_alias_is() -> None:
    assert data_path(f"/{ALIAS}") == f"{FOLDER}/data/20260101T000000Z.vhd"
    with pytest.raises(Refused, match="is named"):
        data_path(f"{FOLDER}/x.vhd")


@pytest.mark.parametrize("alias", sorted(RECORDED.glob("*.alias.vhd")), ids=lambda path: path.name)
def test_aliases_that_xen_orchestra_wrote(alias: Path) -> None:
    target = parse_alias(f"/d/{alias.name}", alias.read_bytes())
    assert target == data_path(f"d/{alias.name}")
    assert (RECORDED / posixpath.relpath(target, "d")).is_dir()


@pytest.mark.parametrize(
    ("content", "target"),
    [
        (b"data/x.vhd", f"{FOLDER}/data/x.vhd"),
        (b" data/x.vhd\n", f"{FOLDER}/data/x.vhd"),
        (b"./data/../data//x.vhd", f"{FOLDER}/data/x.vhd"),
        (f"/{FOLDER}/data/x.vhd".encode(), f"{FOLDER}/data/x.vhd"),
        ("data/é.vhd".encode(), f"{FOLDER}/data/é.vhd"),
        (b"flat.vhd", f"{FOLDER}/flat.vhd"),
        (b"data/" + b"x" * 1015 + b".vhd", f"{FOLDER}/data/{'x' * 1015}.vhd"),
    ],
)
def test_what_an_alias_may_say(content: bytes, target: str) -> None:
    assert parse_alias(ALIAS, content) == target


WRONG = [
    b"",
    b" \n",
    b".",
    b"..",
    b"data",
    b"data/",
    b"data/..",
    b"data/.",
    b"/",
    b"../vdi",
    b"../other/data/x.vhd",
    b"../../../../../../../../etc/x.vhd",
    b"/etc/x.vhd",
    b"../vdi2.vhd",
    b"data/x",
    b"data/x.vhd/",
    b"data/x.vhd/..",
    b"data/20260102T000000Z.alias.vhd",
    b"20260101T000000Z.alias.vhd",
    b"data/x.vhd\0",
    b"data/x\ny.vhd",
    b"data/\xff.vhd",
    b"data/" + b"x" * 1016 + b".vhd",
]


@pytest.mark.parametrize("content", WRONG)
def test_what_an_alias_must_not_say(content: bytes) -> None:
    with pytest.raises(Corrupt, match="20260101T000000Z") as caught:
        parse_alias(ALIAS, content)
    assert caught.value.data["what"] == "alias"
    assert len(caught.value.message) < 300


@given(st.binary(max_size=60) | st.text("./abdt vh\n", max_size=30).map(str.encode))
def test_whatever_it_says_it_names_a_disk_strictly_below_its_folder(content: bytes) -> None:
    for alias in (ALIAS, "top.alias.vhd"):
        try:
            target = parse_alias(alias, content)
        except Corrupt:
            continue
        folder = posixpath.dirname(alias)
        assert target == posixpath.normpath(target)
        assert target.startswith(f"{folder}/" if folder else "")
        assert not target.startswith(("..", "/"))
        assert target.endswith(".vhd")
        assert not is_alias(target)


async def test_an_alias_reads_back_and_can_be_pointed_elsewhere(
    remote: Remote, tmp_path: Path
) -> None:
    await write_alias(remote, f"/{ALIAS}", data_path(ALIAS))
    assert (tmp_path / ALIAS).read_bytes() == b"data/20260101T000000Z.vhd"
    assert await read_alias(remote, ALIAS) == data_path(ALIAS)
    await write_alias(remote, ALIAS, f"{FOLDER}/data/older.vhd")
    assert await read_alias(remote, ALIAS) == f"{FOLDER}/data/older.vhd"
    with pytest.raises(Conflict):
        await write_alias(remote, ALIAS, data_path(ALIAS), exclusive=True)
    assert await read_alias(remote, ALIAS) == f"{FOLDER}/data/older.vhd"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (ALIAS, FOLDER),
        (ALIAS, f"{FOLDER}/data"),
        (ALIAS, "xo-vm-backups/vm/vdis/job/other/data/x.vhd"),
        (ALIAS, ALIAS),
        (ALIAS, f"{FOLDER}/data/{'x' * 1020}.vhd"),
        (f"{FOLDER}/x.vhd", f"{FOLDER}/data/x.vhd"),
    ],
)
async def test_an_alias_that_nobody_would_believe_is_not_written(
    remote: Remote, tmp_path: Path, path: str, target: str
) -> None:
    with pytest.raises(Refused) as caught:
        await write_alias(remote, path, target)
    assert caught.value.code == "EINVAL"
    assert list(tmp_path.iterdir()) == []


async def test_a_missing_and_a_huge_alias(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await read_alias(remote, "a.alias.vhd")
    (tmp_path / "a.alias.vhd").write_bytes(b"x" * 2_000_000)
    with pytest.raises(Corrupt, match="larger than"):
        await read_alias(remote, "a.alias.vhd")
