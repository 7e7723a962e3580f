"""VHD structures against worked examples, and against any bytes."""

from __future__ import annotations

from array import array
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt, Refused
from proxy.formats import vhd

MIB = 1024 * 1024
GIB = 1024 * MIB

# Bytes 0-83 of the footer of a dynamic disk of 10 MiB, as Xen Orchestra writes it.
FOOTER = bytes.fromhex(
    "636f6e6563746978 00000002 00010000 0000000000000200 65000000 786f2020 00000000 5769326b"
    "0000000000a00000 0000000000a00000 012e 04 11 00000003 fffff035"
    "00112233445566778899aabbccddeeff"
).ljust(512, b"\0")
# Bytes 0-39 of a header with five entries.
HEADER = bytes.fromhex(
    "6378737061727365 ffffffffffffffff 0000000000000600 00010000 00000005 00200000 fffff472"
).ljust(1024, b"\0")


def test_the_worked_footer() -> None:
    identity = UUID("00112233-4455-6677-8899-aabbccddeeff")
    footer = vhd.Footer.make(10 * MIB, vhd.DiskType.DYNAMIC, identity, timestamp=0x65000000)
    assert footer.pack() == FOOTER
    assert vhd.Footer.parse(FOOTER) == footer


def test_the_worked_header() -> None:
    header = vhd.Header(max_entries=5)
    assert header.pack() == HEADER
    assert vhd.Header.parse(HEADER) == header


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (34_816, (1, 4, 17)),
        (1 * MIB, (31, 4, 17)),
        (4 * MIB, (121, 4, 17)),
        (10 * MIB, (302, 4, 17)),
        (1 * GIB, (2081, 16, 63)),
        (8 * GIB, (16645, 16, 63)),
        (40 * GIB, (20561, 16, 255)),
        (128 * GIB, (65535, 16, 255)),
        (2040 * GIB, (65535, 16, 255)),
    ],
)
def test_the_geometry_of_known_sizes(size: int, expected: tuple[int, int, int]) -> None:
    assert vhd.geometry(size) == expected


@pytest.mark.parametrize(
    ("entries", "size"),
    [(0, 512), (1, 512), (128, 512), (129, 1024), (1024, 4096), (20_480, 81_920)],
)
def test_the_size_of_a_table(entries: int, size: int) -> None:
    assert vhd.table_size(entries) == size
    assert len(vhd.pack_table(vhd.empty_table(entries))) == size


def test_the_worked_table() -> None:
    table = vhd.empty_table(5)
    table[0], table[4] = 4, 0x1005
    packed = vhd.pack_table(table)
    assert packed == bytes.fromhex("00000004 ffffffff ffffffff ffffffff 00001005").ljust(
        512, b"\xff"
    )
    assert vhd.parse_table(packed, 5) == table
    assert vhd.stream_size(5, 2) == 4_197_888


def test_the_parents_name_is_utf16_of_the_other_end() -> None:
    raw = vhd.Header(max_entries=1, parent_name="1.vhd").pack()
    assert raw[64:74] == bytes.fromhex("0031 002e 0076 0068 0064")
    longest = "x" * vhd.LONGEST_NAME
    packed = vhd.Header(max_entries=1, parent_name=longest).pack()
    assert vhd.Header.parse(packed).parent_name == longest
    with pytest.raises(ValueError, match="too long"):
        vhd.Header(max_entries=1, parent_name=longest + "x").pack()


def test_reserved_bytes_survive() -> None:
    """Seen on Xen Orchestra: bytes from 0x80 on became zeros when a footer was packed again."""
    raw = bytearray(FOOTER)
    raw[84:512] = bytes(range(40, 256)) + bytes(range(212))
    raw[64:68] = vhd.checksum(bytes(raw), 64).to_bytes(4, "big")
    assert vhd.Footer.parse(bytes(raw)).pack() == bytes(raw)
    raw = bytearray(HEADER)
    raw[576:1024] = b"\xfe" * 448
    raw[36:40] = vhd.checksum(bytes(raw), 36).to_bytes(4, "big")
    assert vhd.Header.parse(bytes(raw)).pack() == bytes(raw)


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (0, b"x", "footer cookie"),
        (12, b"\0\2", "footer version"),
        (16, b"\xff" * 8, "footer data offset"),
        (60, b"\0\0\0\2", "disk type"),
        (40, b"\0\0\0\1\0\0\0\0", "disk size"),
    ],
)
def test_a_wrong_footer_says_what_and_where(at: int, value: bytes, what: str) -> None:
    raw = bytearray(FOOTER)
    raw[at : at + len(value)] = value
    raw[64:68] = vhd.checksum(bytes(raw), 64).to_bytes(4, "big")
    with pytest.raises(Corrupt) as caught:
        vhd.Footer.parse(bytes(raw), offset=1000)
    assert caught.value.data["what"] == what
    assert 1000 <= caught.value.data["offset"] < 1512


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (0, b"x", "header cookie"),
        (8, b"\0", "header data offset"),
        (16, bytes(8), "table offset"),
        (24, b"\0\2", "header version"),
        (28, b"\xff\xff\xff\xff", "table size"),
        (32, b"\0\x40\0\0", "block size"),
        (64, b"\xd8\0\0\0", "parent name"),
    ],
)
def test_a_wrong_header_says_what(at: int, value: bytes, what: str) -> None:
    raw = bytearray(HEADER)
    raw[at : at + len(value)] = value
    raw[36:40] = vhd.checksum(bytes(raw), 36).to_bytes(4, "big")
    with pytest.raises(Corrupt) as caught:
        vhd.Header.parse(bytes(raw))
    assert caught.value.data["what"] == what


def test_a_table_that_is_too_small_for_the_disk() -> None:
    footer = vhd.Footer.parse(FOOTER)
    vhd.check(footer, vhd.Header(max_entries=5))
    with pytest.raises(Corrupt) as caught:
        vhd.check(footer, vhd.Header(max_entries=4))
    assert caught.value.data["what"] == "table size"


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_of_a_footer_is_noticed(at: int, change: int) -> None:
    raw = bytearray(FOOTER)
    raw[at] ^= change
    with pytest.raises(Corrupt):
        vhd.Footer.parse(bytes(raw))


@given(st.binary(max_size=1200))
def test_no_bytes_raise_anything_but_corrupt(data: bytes) -> None:
    for parse in (vhd.Footer.parse, vhd.Header.parse):
        with pytest.raises(Corrupt):
            parse(data)


@given(st.lists(st.integers(0, 0xFFFFFFFF), max_size=300))
def test_tables_come_back(entries: list[int]) -> None:
    table = array("I", entries)
    packed = vhd.pack_table(table)
    assert vhd.parse_table(packed, len(entries)) == table
    with pytest.raises(Corrupt):
        vhd.parse_table(packed[: 4 * len(entries)], len(entries) + 1)


@given(
    st.lists(st.sampled_from([vhd.UNUSED, 0, 0xFFFFFF00, 0x00FFFFFF, 0xFFFF00FF, 4]), max_size=99)
)
def test_which_blocks_are_there(entries: list[int]) -> None:
    table = array("I", entries)
    expected = bytes(entry != vhd.UNUSED for entry in entries)
    assert vhd.present_flags(table) == expected


def test_which_blocks_of_a_table_of_several_pieces_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vhd, "_PER_PIECE", 4)
    table = vhd.empty_table(11)
    table[3] = table[4] = table[10] = 7
    assert vhd.present_flags(table) == b"\0\0\0\1\1\0\0\0\0\0\1"


def test_blocks_stand_in_the_order_that_is_given() -> None:
    assert list(vhd.sequential_table([0, 4], 5)) == [4, *3 * [vhd.UNUSED], 0x1005]
    assert list(vhd.sequential_table([4, 0], 5)) == [0x1005, *3 * [vhd.UNUSED], 4]
    assert vhd.sequential_table([], 3) == vhd.empty_table(3)
    assert vhd.sequential_table([128], 129)[128] == 5  # its table has two sectors


@pytest.mark.parametrize("order", [[0, 0], [1, 2, 1], [3], [-1]])
def test_no_block_stands_twice_or_outside(order: list[int]) -> None:
    with pytest.raises(ValueError, match="comes twice, or is none"):
        vhd.sequential_table(order, 3)


def test_more_than_a_table_can_place_is_refused() -> None:
    """Seen on Xen Orchestra: a number out of range, in the middle of the transfer."""
    count = vhd.MAX_BLOCKS
    with pytest.raises(Refused) as caught:
        vhd.sequential_table(range(count), count)
    assert caught.value.code == "EFBIG"
    fits = count - 3  # less what the table itself takes
    assert vhd.sequential_table(range(fits), count)[fits - 1] < vhd.UNUSED


def test_the_identity_of_a_disk_is_any_uuid() -> None:
    """Seen on Xen Orchestra: a uuid of an unknown version made it ignore the disk's parent."""
    odd = UUID("ffffffff-ffff-ffff-ffff-fffffffffff0")
    footer = vhd.Footer.make(MIB, vhd.DiskType.DYNAMIC, odd, timestamp=1)
    assert vhd.Footer.parse(footer.pack()).uuid == odd
