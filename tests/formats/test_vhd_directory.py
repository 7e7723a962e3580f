"""The files of a VHD directory, against the specification's bytes and recorded ones."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Corrupt, Refused
from proxy.formats import vhd
from proxy.formats.vhd_directory import (
    Compression,
    block_path,
    compress,
    compress_block,
    decompress,
    pack_filters,
    pack_table,
    parse_filters,
    parse_table,
)

RECORDED = Path(__file__).parents[1] / "fixtures" / "disks" / "recorded-directories" / "data"
COMPRESSED = [Compression.BROTLI, Compression.GZIP]


def flags(indexes: list[int], count: int) -> bytes:
    return bytes(index in indexes for index in range(count))


@pytest.mark.parametrize(
    ("indexes", "count", "packed"),
    [
        ([0, 1], 2, "c000"),
        ([1, 3], 4, "50000000"),
        ([], 3, "000000"),
        ([8], 9, "0080" + "00" * 7),
        ([], 0, ""),
    ],
)
def test_the_table_has_one_bit_a_block_in_as_many_bytes_as_blocks(
    indexes: list[int], count: int, packed: str
) -> None:
    assert pack_table(flags(indexes, count), count).hex() == packed
    assert parse_table(bytes.fromhex(packed), count) == flags(indexes, count)


@given(st.binary(max_size=40), st.integers(0, 300))
def test_a_table_of_any_length_is_read_and_a_missing_byte_means_absent(
    data: bytes, count: int
) -> None:
    expected = bytes(
        index >> 3 < len(data) and data[index >> 3] & 0x80 >> (index & 7) != 0
        for index in range(count)
    )
    assert parse_table(data, count) == expected
    packed = pack_table(expected, count)
    assert len(packed) == count
    assert parse_table(packed, count) == expected


@pytest.mark.parametrize(
    ("index", "path"),
    [(0, "blocks/0/0"), (5, "blocks/0/5"), (999, "blocks/0/999"), (1234, "blocks/1/234")],
)
def test_where_a_block_is(index: int, path: str) -> None:
    assert block_path(index) == path


def test_the_list_of_filters() -> None:
    assert parse_filters(None) is Compression.NONE
    assert parse_filters(b"[]") is Compression.NONE
    assert parse_filters(b' [ "gzip", "anything" ]\n') is Compression.GZIP
    assert pack_filters(Compression.BROTLI) == b'["brotli"]'
    assert pack_filters(Compression.GZIP) == b'["gzip"]'
    assert pack_filters(Compression.NONE) is None


@pytest.mark.parametrize("name", ["zstd", "none", "", "BROTLI", "x" * 5000])
def test_an_unknown_compression_is_not_taken_for_damage(name: str) -> None:
    with pytest.raises(Refused, match="compressed by") as caught:
        parse_filters(json.dumps([name]).encode())
    assert caught.value.code == "ENOTSUP"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'"brotli"', b"[1]", b'["brotli"', b"[" * 60000, b'["\xff"]', b"null"]
)
def test_filters_that_are_no_list_of_names(data: bytes) -> None:
    with pytest.raises(Corrupt) as caught:
        parse_filters(data)
    assert caught.value.data["what"] == "filters"


@given(st.binary(max_size=30))
def test_no_bytes_break_the_reader_of_filters(data: bytes) -> None:
    with contextlib.suppress(Corrupt, Refused):
        parse_filters(data)


@pytest.mark.parametrize("name", ["header", "footer", "bat"])
@pytest.mark.parametrize("disk", sorted(path.name for path in RECORDED.iterdir()))
def test_small_chunks_are_byte_for_byte_those_of_xen_orchestra(disk: str, name: str) -> None:
    recorded = (RECORDED / disk / name).read_bytes()
    content = decompress(Compression.BROTLI, recorded, longest=1024)
    assert compress(Compression.BROTLI, content) == recorded
    if name == "header":
        assert vhd.Header.parse(content).pack() == content
    elif name == "footer":
        assert vhd.Footer.parse(content).pack() == content


def block(data: bytes) -> memoryview:
    whole = vhd.FULL_BITMAP + data * (vhd.BLOCK_SIZE // len(data))
    assert len(whole) == vhd.STORED_BLOCK
    return memoryview(bytearray(whole))


@pytest.mark.parametrize("content", [b"\0" * 512, b"\0" * 511 + b"\1", bytes(range(256))])
def test_blocks_are_read_by_other_decoders(content: bytes) -> None:
    stored = block(content)
    assert brotli.decompress(bytes(compress_block(Compression.BROTLI, stored))) == stored
    assert gzip.decompress(compress_block(Compression.GZIP, stored)) == stored
    assert compress_block(Compression.NONE, stored) is stored


@pytest.mark.parametrize("change", [0, 511, 512, vhd.STORED_BLOCK - 1])
def test_one_byte_more_than_zeros_is_not_taken_for_zeros(change: int) -> None:
    stored = block(b"\0")
    zeros = compress_block(Compression.BROTLI, stored)
    assert compress_block(Compression.BROTLI, stored) is zeros, "zeros are compressed once"
    stored[change] ^= 1
    assert brotli.decompress(bytes(compress_block(Compression.BROTLI, stored))) == stored


def noise(size: int) -> bytes:
    return random.Random(1).randbytes(size)


def test_what_cannot_be_compressed_is_stored_as_it_is() -> None:
    stored = block(noise(vhd.BLOCK_SIZE))
    data = bytes(compress_block(Compression.BROTLI, stored))
    assert len(data) < vhd.STORED_BLOCK + 10
    assert bytes(stored) in data
    assert brotli.decompress(data) == stored
    assert decompress(Compression.BROTLI, data, longest=vhd.STORED_BLOCK) == stored
    for damaged in (data[:-1], data[:-2] + data[-1:], data + b"\0", b"\1" + data[1:]):
        with pytest.raises(Corrupt):
            decompress(Compression.BROTLI, damaged, longest=vhd.STORED_BLOCK)


def test_a_block_of_which_a_part_can_be_compressed_is_compressed() -> None:
    stored = block(noise(7 * vhd.BLOCK_SIZE // 8).ljust(vhd.BLOCK_SIZE, b"x"))
    data = bytes(compress_block(Compression.BROTLI, stored))
    assert len(data) < 0.9 * vhd.STORED_BLOCK
    assert brotli.decompress(data) == stored


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_chunk_is_whole_or_corrupt(compression: Compression) -> None:
    content = bytes(range(256)) * 40
    stored = compress(compression, content)
    assert decompress(compression, stored, longest=len(content)) == content
    for damaged in (b"", stored[:-1], stored[: len(stored) // 2], stored + b"\0", stored + stored):
        with pytest.raises(Corrupt):
            decompress(compression, damaged, longest=len(content))
    with pytest.raises(Corrupt, match="more than"):
        decompress(compression, stored, longest=len(content) - 1)


def test_an_uncompressed_chunk_has_a_longest_too() -> None:
    assert decompress(Compression.NONE, b"abc", longest=3) == b"abc"
    with pytest.raises(Corrupt, match="more than"):
        decompress(Compression.NONE, b"abcd", longest=3)


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_bomb_costs_no_more_memory_than_a_block(compression: Compression) -> None:
    bomb = compress(compression, bytes(64 * 1024 * 1024))
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match="more than"):
            decompress(compression, bomb, longest=vhd.STORED_BLOCK)
        assert tracemalloc.get_traced_memory()[1] < 5 * vhd.STORED_BLOCK
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.data(), st.sampled_from(COMPRESSED), st.binary(min_size=1, max_size=400))
def test_damage_never_gives_anything_but_corrupt_or_bounded_bytes(
    data: st.DataObject, compression: Compression, content: bytes
) -> None:
    stored = bytearray(compress(compression, content))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decompress(compression, bytes(stored), longest=1000)
    except Corrupt:
        return
    assert len(found) <= 1000
    if compression is Compression.GZIP and at >= 10:
        assert found == content, "its checksum knows"
