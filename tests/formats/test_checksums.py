"""The file of checksums: what is written is read, and nothing else is."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.checksums import (
    LONGEST,
    MOST_BLOCKS,
    BlockSums,
    Checksums,
    Place,
    block_digest,
)

U64 = st.integers(0, 2**64 - 1)


def sums_of(count: int, digests: dict[int, int]) -> BlockSums:
    sums = BlockSums(count)
    for index, digest in digests.items():
        sums[index] = digest
    return sums


def as_dict(sums: BlockSums) -> dict[int, int]:
    return {index: sums.get(index) or 0 for index in sums}


@st.composite
def checksums(draw: st.DrawFn) -> Checksums:
    count = draw(st.integers(0, 200))
    digests = draw(st.dictionaries(st.integers(0, count - 1), U64)) if count else {}
    places = draw(st.lists(st.tuples(U64, U64), min_size=1, max_size=2))
    return Checksums(
        draw(st.uuids()), tuple(Place(*each) for each in places), sums_of(count, digests)
    )


@given(checksums())
def test_what_is_written_is_read(value: Checksums) -> None:
    raw = value.encode()
    assert Checksums.decode(raw) == value
    assert len(raw) <= LONGEST


def test_the_layout_is_the_one_that_is_written_down() -> None:
    uuid = UUID("01234567-89ab-cdef-0123-456789abcdef")
    value = Checksums(uuid, (Place(7, 9),), sums_of(6, {1: 11, 4: 44}))
    body = b"xo-xxh3\0" + struct.pack("<HH", 1, 1) + uuid.bytes + struct.pack("<II4x", 6, 2)
    body += struct.pack("<QQ", 7, 9) + struct.pack("<II", 1, 4) + struct.pack("<QQ", 11, 44)
    assert value.encode() == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    assert len(body) == 40 + 16 + 2 * 12


def test_a_digest_is_xxh3_of_the_data() -> None:
    """Of the algorithm's own test vectors: no input, seed 0."""
    assert block_digest(memoryview(b"")) == 0x2D06800538D394C2


@given(checksums(), st.data())
def test_a_wrong_byte_or_a_cut_is_corrupt(value: Checksums, data: st.DataObject) -> None:
    raw = value.encode()
    position = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[position] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(changed), raw[:position], raw + b"\0"):
        with pytest.raises(Corrupt):
            Checksums.decode(damaged)


@given(st.binary(max_size=200))
def test_other_bytes_are_corrupt(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        Checksums.decode(raw)


@pytest.mark.parametrize(
    ("blocks", "indexes", "entries"),
    [
        (MOST_BLOCKS + 1, [], 0),
        (2, [0, 0], 2),
        (4, [3, 1], 2),
        (4, [4], 1),
        (1, [0, 1], 2),
        (10, [1], 2**32 - 1),
    ],
)
def test_what_nobody_writes_is_refused_though_its_own_checksum_is_right(
    blocks: int, indexes: list[int], entries: int
) -> None:
    body = b"xo-xxh3\0" + struct.pack("<HH", 1, 1) + bytes(16)
    body += struct.pack("<II4x", blocks, entries) + bytes(16)
    body += struct.pack(f"<{len(indexes)}I", *indexes) + bytes(8 * len(indexes))
    with pytest.raises(Corrupt):
        Checksums.decode(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)))


@given(st.integers(0, 30), st.integers(0, 30), st.data())
def test_the_newer_block_wins(old_count: int, new_count: int, data: st.DataObject) -> None:
    def some(count: int) -> dict[int, int]:
        return data.draw(st.dictionaries(st.integers(0, count - 1), U64)) if count else {}

    older, newer = some(old_count), some(new_count)
    merged = sums_of(old_count, older).under(sums_of(new_count, newer))
    wanted = {key: value for key, value in {**older, **newer}.items() if key < new_count}
    assert merged.count == new_count
    assert as_dict(merged) == wanted
    assert merged.flags.count(1) == len(merged) == len(wanted)
    assert merged.get(-1) is merged.get(new_count) is None
