"""Bytes of a hostile server; what a real one sends is in the other modules."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.remotes.smb import wire
from proxy.remotes.smb.names import Place
from proxy.remotes.smb.wire import Access, Disposition, Options

PARSERS: list[Callable[[bytes], Any]] = [
    wire.parse_created,
    wire.parse_closed,
    wire.parse_data,
    wire.parse_written,
    wire.parse_directory,
    wire.parse_number,
    wire.parse_modified,
    wire.parse_space,
    lambda body: wire.parse_header(bytearray(body), 0),
]


@pytest.mark.parametrize("parse", PARSERS)
@given(body=st.binary(max_size=300))
def test_any_bytes_are_understood_or_refused(parse: Callable[[bytes], Any], body: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse(body)


def entry(name: str, *, following: int = 0, attributes: int = 0x80) -> bytes:
    text = name.encode("utf-16-le")
    head = struct.pack("<IIQQQQQQII", following, 0, 0, 0, 0, 0, 5, 8, attributes, len(text))
    return (head + text).ljust(following, b"\0")


def listing(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return struct.pack("<HHI", 9, 72, len(content)) + content


def test_a_directory_is_read_entry_by_entry() -> None:
    body = listing(
        entry(".", following=72),
        entry("a", following=72, attributes=0x10),
        entry("link", following=80, attributes=0x410),
        entry("b"),
    )
    found = wire.parse_directory(body)
    assert [(item.name, item.is_dir, item.size) for item in found] == [
        ("a", True, 5),
        ("link", False, 5),
        ("b", False, 5),
    ]


@pytest.mark.parametrize(
    "body",
    [
        listing(entry("a/b")),
        listing(entry("a\\b")),
        listing(entry("..\\x")),
        listing(entry("a\0b")),
        listing(entry("")),
        listing(entry("a", following=8)),
        listing(entry("a", following=4096)),
        listing(entry("abc"))[:-2],
        struct.pack("<HHI", 9, 10, 100) + bytes(100),
        struct.pack("<HHI", 9, 72, 1 << 31),
        listing(),
    ],
)
def test_an_impossible_directory_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        wire.parse_directory(body)


def test_a_compound_is_aligned_and_chained() -> None:
    messages = [
        wire.create("abc", Access.READ, Disposition.OPEN, Options.NOT_A_DIRECTORY),
        wire.write(0, memoryview(b"x" * 70_000)),
        wire.close(),
    ]
    buffer, places = wire.packed(
        messages, first_id=7, charges=[1, 2, 1], sign=False, session_id=1, tree_id=2
    )
    assert [number for number, _, _ in places] == [7, 8, 10]
    start = 0
    for (number, begin, end), message in zip(places, messages, strict=True):
        assert (begin, begin % 8) == (start, 0)
        header = wire.parse_header(buffer, begin)
        assert (header.message_id, header.command) == (number, message.command)
        assert header.end == end
        start = end
    assert start == len(buffer)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("a/b:c", "b:c"),
        ("a\\b", "a\\b"),
        ("x/con*", "con*"),
        ("d/name.", "name."),
        ("d /f", "d "),
        ("d/\udcff", "\udcff"),
        ("d/a\nb", "a\nb"),
    ],
)
def test_a_name_that_no_share_holds_is_named(path: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        Place("").name(path)
    assert caught.value.code == "EINVAL"
    assert caught.value.data["part"] == repr(part)


@given(st.text(max_size=40))
def test_no_path_leaves_its_place(path: str) -> None:
    place = Place("\\dir/sub\\")
    with contextlib.suppress(Refused):
        name = place.name(path)
        assert name == "dir\\sub" or name.startswith("dir\\sub\\")
        assert ".." not in name.split("\\")
        assert "/" not in name
