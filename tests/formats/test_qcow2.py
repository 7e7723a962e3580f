"""qcow2 structures against qemu-img, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.qcow2 import (
    HEADER_SIZE,
    ClusterMap,
    Header,
    Placement,
    Span,
    parse_l1,
    parse_l2,
)
from proxy.formats.qcow2_layout import Layout, image_size
from tests.disks.qcow2_images import COPIED, checked, image, qemu_img, words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

MIB = 1024 * 1024
CLUSTER = 65536
DATA = 0x100000


def header(size: int = 4 * MIB, *, bits: int = 16, version: int = 3) -> Header:
    return Header(
        size=size,
        l1_size=1,
        l1_offset=3 * CLUSTER,
        refcount_offset=CLUSTER,
        refcount_clusters=1,
        version=version,
        cluster_bits=bits,
    )


def patched(at: int, value: int, length: int, *, version: int = 3) -> bytes:
    data = bytearray(image(10 * MIB, {0: b"x"}, version=version)[:HEADER_SIZE])
    data[at : at + length] = value.to_bytes(length, "big")
    return bytes(data)


def refusal(data: bytes) -> tuple[str, int]:
    with pytest.raises(Corrupt) as caught:
        Header.parse(data)
    return caught.value.data["what"], caught.value.data["offset"]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("compat=0.10", "10M"),
        ("compat=1.1", "3T"),
        ("compat=1.1,cluster_size=512,refcount_bits=1", "100M"),
        ("compat=1.1,cluster_size=2M,refcount_bits=64", "16T"),
        ("compat=1.1,lazy_refcounts=on,compression_type=zstd", "512"),
    ],
)
def test_headers_that_qemu_wrote(options: str, size: str, tmp_path: Path) -> None:
    made = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, made, size)
    told = json.loads(qemu_img("info", "--output=json", made))
    found = Header.parse(made.read_bytes()[:HEADER_SIZE])
    assert found.size == told["virtual-size"]
    assert found.cluster_size == told["cluster-size"]
    more = told["format-specific"]["data"]
    assert found.version == (2 if more["compat"] == "0.10" else 3)
    assert 1 << found.refcount_order == more["refcount-bits"]
    assert found.backing_offset == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["encrypt.format=aes,encrypt.key-secret=s"], "encryption"),
        (["data_file=data.raw"], "external data"),
        (["extended_l2=on"], "extended L2"),
    ],
)
def test_images_of_other_kinds(
    options: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = ["--object", "secret,id=s,data=abcdef"] if "encrypt" in options[0] else []
    qemu_img("create", *secret, "-f", "qcow2", "-o", *options, "a.qcow2", "10M")
    assert refusal((tmp_path / "a.qcow2").read_bytes())[0] == what


def test_compressed_clusters(tmp_path: Path) -> None:
    raw, made = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"compressible " * 100_000 + bytes(48))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, made)
    data = made.read_bytes()
    found = Header.parse(data)
    l1 = parse_l1(data[found.l1_offset : found.l1_offset + 8 * found.tables], found)
    with pytest.raises(Corrupt, match="compressed") as caught:
        parse_l2(data[l1[0] : l1[0] + CLUSTER], found, 0, l1[0])
    assert caught.value.data == {"what": "compressed cluster", "offset": l1[0]}


@pytest.mark.parametrize(
    ("at", "length", "value", "what"),
    [
        (0, 4, 0x51464900, "magic"),
        (4, 4, 1, "version"),
        (4, 4, 4, "version"),
        (8, 16, (200 << 64) + (1024 << 32) + 16, "backing file"),
        (20, 4, 8, "cluster size"),
        (20, 4, 22, "cluster size"),
        (20, 4, 0xFFFFFFFF, "cluster size"),
        (24, 8, 10 * MIB + 1, "disk size"),
        (24, 8, (64 << 40) + 512, "disk size"),
        (24, 8, 2**64 - 512, "disk size"),
        (32, 4, 1, "encryption"),
        (36, 4, 0, "L1 size"),
        (36, 4, 4 * MIB + 1, "L1 size"),
        (40, 8, 0, "L1 offset"),
        (40, 8, 3 * CLUSTER + 512, "L1 offset"),
        (40, 8, 2**63, "L1 offset"),
        (72, 8, 1 << 1, "corrupt bit"),
        (72, 8, 1 << 2, "external data"),
        (72, 8, 1 << 4, "extended L2"),
        (72, 8, 1 << 5, "features"),
        (72, 8, 1 << 63, "features"),
        (96, 4, 7, "refcount order"),
        (100, 4, 96, "header length"),
        (100, 4, 108, "header length"),
        (100, 4, CLUSTER + 8, "header length"),
    ],
)
def test_refused_headers(at: int, length: int, value: int, what: str) -> None:
    found, offset = refusal(patched(at, value, length))
    assert found == what
    assert at <= offset < at + length


def test_an_l1_table_too_small_for_the_disk() -> None:
    assert Header.parse(patched(24, 512 * MIB, 8)).tables == 1
    assert refusal(patched(24, 513 * MIB, 8)) == ("L1 size", 36)


def test_what_does_not_matter_is_not_refused() -> None:
    """A dirty image (its reference counts only), compatible features, snapshots."""
    for at, length in [(79, 1), (80, 8), (88, 8), (60, 4), (64, 8), (48, 8), (56, 4)]:
        assert Header.parse(patched(at, 1, length)).size == 10 * MIB
    old = patched(72, 2**256 - 1, 32, version=2)
    assert Header.parse(old).refcount_order == 4, "version 2 ends before the features"
    with pytest.raises(Corrupt, match="103 of 104"):
        Header.parse(patched(0, 0x514649FB, 4)[:103])


def test_the_header_of_a_new_image_is_read_again() -> None:
    large = Header(
        size=3 << 40, l1_size=6144, l1_offset=CLUSTER, refcount_offset=0, refcount_clusters=0
    )
    assert Header.parse(large.pack().ljust(HEADER_SIZE, b"\xff")) == large


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (DATA | 1, "unknown bits"),
        (DATA | 1 << 8, "unknown bits"),
        (DATA | 1 << 56, "unknown bits"),
        (DATA | 1 << 62, "unknown bits"),
        (COPIED, "outside"),
        (DATA | 512, "inside a cluster"),
        (1 << 55, "outside"),
    ],
)
def test_refused_l1_entries(entry: int, message: str) -> None:
    large = Header(
        size=1 << 30, l1_size=2, l1_offset=CLUSTER, refcount_offset=0, refcount_clusters=0
    )
    with pytest.raises(Corrupt, match=message) as caught:
        parse_l1(words([0, entry]), large)
    assert caught.value.data == {"what": "L1 entry", "offset": CLUSTER + 8}


def test_l1_tables() -> None:
    large = Header(
        size=2 << 30, l1_size=4, l1_offset=CLUSTER, refcount_offset=0, refcount_clusters=0
    )
    found = parse_l1(words([DATA + CLUSTER, 0, DATA | COPIED, 0]), large)
    assert list(found.items()) == [(2, DATA), (0, DATA + CLUSTER)], "in the order of the file"
    with pytest.raises(Corrupt, match="two entries"):
        parse_l1(words([DATA, 0, DATA | COPIED, 0]), large)


@pytest.mark.parametrize(
    ("entry", "version", "what"),
    [
        (DATA | 1, 2, "L2 entry"),
        (1, 2, "L2 entry"),
        (DATA | 2, 3, "L2 entry"),
        (DATA | 1 << 8, 3, "L2 entry"),
        (DATA | 1 << 56, 3, "L2 entry"),
        (DATA | 1 << 61, 3, "L2 entry"),
        (DATA | 1 << 62, 3, "compressed cluster"),
        (1 << 62, 3, "compressed cluster"),
        (COPIED, 3, "L2 entry"),
        (DATA | 512, 3, "L2 entry"),
        (DATA - CLUSTER, 3, "cluster order"),
        (DATA, 3, "cluster order"),
        (1 << 55, 3, "L2 entry"),
    ],
)
def test_refused_l2_entries(entry: int, version: int, what: str) -> None:
    with pytest.raises(Corrupt) as caught:
        parse_l2(words([DATA | COPIED, entry, 0, 0]), header(version=version), 0, CLUSTER)
    assert caught.value.data == {"what": what, "offset": CLUSTER + 8}


def test_a_row_of_entries_that_starts_at_nothing() -> None:
    """Rows that follow each other are read at once, but they must follow something."""
    rows = [CLUSTER * number | COPIED for number in range(64)]
    with pytest.raises(Corrupt, match="outside") as caught:
        parse_l2(words(rows), header(), 0, CLUSTER)
    assert caught.value.data == {"what": "L2 entry", "offset": CLUSTER}


def test_l2_entries_that_are_taken() -> None:
    """Flags of use do not matter to a reader, nor do entries behind the disk's end."""
    entries = [DATA, (DATA + CLUSTER) | COPIED, 0, 1, (DATA + 2 * CLUSTER), DATA + CLUSTER]
    found = parse_l2(words(entries), header(5 * CLUSTER), 0, CLUSTER)
    assert found.data == 0b10011
    assert found.zeros == 0b01000
    assert (list(found.jumps), list(found.offsets)) == ([0], [DATA])
    assert found.end == DATA + 3 * CLUSTER


def test_placements() -> None:
    entries = [0] * 64
    entries[1:3] = [DATA, DATA + CLUSTER]
    entries[4] = DATA + 5 * CLUSTER
    entries[5] = 1
    size = 4 * MIB - 512
    entries[63] = DATA + 6 * CLUSTER
    made = header(size)
    tables = {0: parse_l2(words(entries), made, 0, 4 * CLUSTER)}
    spans = [Span(CLUSTER, 2 * CLUSTER, DATA), Span(4 * CLUSTER, CLUSTER, DATA + 5 * CLUSTER)]
    last = Span(31 * CLUSTER, CLUSTER - 512, DATA + 6 * CLUSTER)
    delta = ClusterMap(made, tables, DATA, is_differencing=True)
    assert (delta.present, delta.partial) == (b"\1\1", b"\1\1")
    assert list(delta.placements()) == [
        Placement(0, spans, [(5 * CLUSTER, 6 * CLUSTER)]),
        Placement(1, [last], [(2 * MIB - 512, 2 * MIB)]),
    ]
    full = ClusterMap(made, tables, DATA, is_differencing=False)
    assert (full.present, full.partial) == (b"\1\1", b"\0\0")
    assert list(full.placements()) == [
        Placement(0, spans, [(0, CLUSTER), (3 * CLUSTER, 4 * CLUSTER), (5 * CLUSTER, 2 * MIB)]),
        Placement(1, [last], [(0, 31 * CLUSTER), (2 * MIB - 512, 2 * MIB)]),
    ]
    with pytest.raises(Corrupt) as caught:
        ClusterMap(made, tables, DATA + 1, is_differencing=True)
    assert caught.value.data == {"what": "cluster order", "offset": DATA}


LARGEST = Header(
    size=64 << 40,
    l1_size=128 * 1024,
    l1_offset=CLUSTER,
    refcount_offset=0,
    refcount_clusters=0,
    refcount_order=6,
    version=3,
)


def test_tables_are_kept_in_little_memory() -> None:
    """One bit a cluster when they follow each other; never more than what was sent, twice."""
    for step, most in [(1, 1200 + 300), (2, 8192 * 12 + 1200 + 300)]:
        raw = words(DATA + (CLUSTER * step * number | COPIED) for number in range(8192))
        table = parse_l2(raw, LARGEST, 0, CLUSTER)
        parts = (table.data, table.zeros, table.jumps, table.offsets)
        # arrays take some room for more
        assert sum(map(sys.getsizeof, parts)) < 1.2 * most


def test_the_largest_disk_costs_little() -> None:
    table = parse_l2(words([DATA]), LARGEST, 1000, CLUSTER)
    tracemalloc.start()
    try:
        found = ClusterMap(LARGEST, {1000: table}, CLUSTER, is_differencing=True)
        assert tracemalloc.get_traced_memory()[1] < 160 * MIB
    finally:
        tracemalloc.stop()
    assert found.present.find(1) == 256_000
    assert LARGEST.longest < 2 * LARGEST.size


def taken(parse: Callable[[], T]) -> T | None:
    """What was read; ``None`` for a refusal that says what and where."""
    try:
        return parse()
    except Corrupt as error:
        if set(error.data) != {"what", "offset"}:
            raise
        return None


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(9, 21), st.sampled_from([2, 3]))
def test_any_header(rest: bytes, bits: int, version: int) -> None:
    """``Corrupt``, or a header within its bounds."""
    head = struct.pack(">4sI12xI", b"QFI\xfb", version, bits) + rest
    found = taken(lambda: Header.parse(head.ljust(HEADER_SIZE, b"\0")))
    if found is not None:
        assert found.tables <= 128 * 1024
        assert found.size <= 64 << 40


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, DATA]), max_size=64))
def test_any_table(entries: list[int]) -> None:
    for version in (2, 3):
        made = header(version=version)
        table = taken(partial(parse_l2, words(entries), made, 0, CLUSTER))
        if table is not None:
            assert not table.data & table.zeros
            assert table.data.bit_length() <= len(entries)


# Writing


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 << 32).map(lambda n: n * 512), st.sets(st.integers(0, 2**22)))
def test_layouts_are_as_long_as_they_say(size: int, indexes: set[int]) -> None:
    order = sorted(index for index in indexes if index * 2 * MIB < size)[:300]
    layout = Layout(size, order)
    tables = sum(map(len, layout.metadata()))
    assert layout.size == image_size(size, order)
    assert layout.size == tables + sum(map(layout.length_of, order))


@pytest.mark.parametrize("tables", [1, 2])
def test_reference_counts_at_their_edges(tables: int, tmp_path: Path) -> None:
    """The clusters of the counts are counted: sizes around where one more is needed."""
    others = 3 + 5 * tables  # header, tables of counts, L1 and four L2 tables for each
    for extra in range(-1, 3):
        data = 32768 * tables - others + extra
        made = tmp_path / "a.qcow2"
        layout = Layout(data * CLUSTER, range(-(-data // 32)))
        assert layout.size // CLUSTER == 32768 * tables + extra + (extra > 0)
        with made.open("wb") as file:
            file.writelines(layout.metadata())
            file.truncate(layout.size)
        checked(made)
