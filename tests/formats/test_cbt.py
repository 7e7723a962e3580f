"""The bitmap of changed blocks, against a reading of it bit by bit."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.cbt import GRAIN, changed_flags

BLOCK = 2 * 1024 * 1024


def encoded(*grains: int, count: int) -> str:
    """The bitmap of ``count`` bytes in which these grains changed, made as hosts make it."""
    bits = "".join("1" if grain in grains else "0" for grain in range(count * 8))
    return base64.b64encode(int(bits or "0", 2).to_bytes(count)).decode()


def test_a_bitmap_that_a_host_made() -> None:
    # 8 MiB; SM sets the bits of 64 KiB grains 0, 33 and 127.
    assert changed_flags("gAAAAEAAAAAAAAAAAAAAAQ==", 4 * BLOCK) == b"\1\1\0\1"
    assert encoded(0, 33, 127, count=16) == "gAAAAEAAAAAAAAAAAAAAAQ=="


@pytest.mark.parametrize("length", [1, 3, 5, 7])
def test_a_length_that_is_no_multiple_of_four(length: int) -> None:
    grains = length * 8
    size = grains * GRAIN
    nothing = encoded(count=length)
    blocks = -(-size // BLOCK)
    assert changed_flags(nothing, size) == bytes(blocks)
    assert changed_flags(encoded(grains - 1, count=length), size) == bytes(blocks - 1) + b"\1"


def test_what_the_bitmap_does_not_cover_counts_as_changed() -> None:
    assert changed_flags("", 2 * BLOCK) == b"\1\1"
    assert changed_flags(encoded(count=4), 3 * BLOCK) == b"\0\1\1"
    assert changed_flags(encoded(count=7), 2 * BLOCK) == b"\0\1"
    # hosts round the number of bits down
    assert changed_flags(encoded(count=8), 2 * BLOCK + 512) == b"\0\0\1"
    assert changed_flags(encoded(count=9), 2 * BLOCK + GRAIN + 512) == b"\0\0\1"


def test_what_lies_behind_the_end_is_ignored() -> None:
    assert changed_flags(encoded(40, 63, count=8), BLOCK) == b"\0"
    assert changed_flags(encoded(8, count=4), 8 * GRAIN) == b"\0"
    assert changed_flags(encoded(count=4), 0) == b""


@pytest.mark.parametrize("text", ["a", "ab=c", "????", "é" * 8, "\0\0\0\0"])
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(Corrupt):
        changed_flags(text, 64 * BLOCK)


@pytest.mark.parametrize("size", [2**63, -BLOCK])
def test_a_size_that_no_disk_has(size: int) -> None:
    with pytest.raises(Corrupt):
        changed_flags("", size)


@given(bitmap=st.binary(max_size=40), sectors=st.integers(0, 40 * 8 * 128))
def test_no_change_is_missed(bitmap: bytes, sectors: int) -> None:
    size = sectors * 512
    flags = changed_flags(base64.b64encode(bitmap).decode(), size)
    assert len(flags) == -(-size // BLOCK)
    bits = "".join(f"{byte:08b}" for byte in bitmap)
    for index, flag in enumerate(flags):
        start, end = index * 32, min((index + 1) * 32, -(-size // GRAIN))
        if len(bits) < end or "1" in bits[start:end]:
            assert flag
        if len(bits) >= end and not int(bits[start : -(-end // 8) * 8], 2) and not size % GRAIN:
            assert not flag


@given(text=st.text(max_size=64), size=st.integers(0, 2**30))
def test_whatever_the_text(text: str, size: int) -> None:
    try:
        flags = changed_flags(text, size)
    except Corrupt:
        return
    assert set(flags) <= {0, 1}
