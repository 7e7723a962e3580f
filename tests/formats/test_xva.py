"""XVA archives against tarfile, xxhash and archives that a running system recorded."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.xva import (
    CHUNK,
    END,
    ArchivedDisk,
    ArchivedObject,
    ChunkData,
    ChunkEnd,
    ChunkStart,
    End,
    Event,
    OvaXml,
    Reader,
    archive,
    build_ova_xml,
    parse_ova_xml,
    tar_header,
)
from proxy.formats.xva_check import Validator

RECORDED = Path(__file__).parents[1] / "fixtures" / "recorded-full-backup.tar.xz"


def disk(identifier: str, content: bytes) -> ArchivedDisk:
    def read(offset: int, length: int) -> Sequence[memoryview] | None:
        part = content[offset : offset + length]
        return None if part == bytes(len(part)) else [memoryview(part[:7]), memoryview(part[7:])]

    return ArchivedDisk(identifier, len(content), read)


def written(ova: bytes, *disks: ArchivedDisk) -> bytes:
    return b"".join(archive(ova, disks))


def read_in(data: bytes, cuts: Sequence[int]) -> Iterator[Event]:
    reader = Reader()
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        yield from reader.feed(data[start:cut])
        start = max(start, cut)
    reader.finish()


def contents(events: Iterator[Event]) -> tuple[bytes, dict[str, bytearray]]:
    ova, disks, at, name = b"", dict[str, bytearray](), 0, ""
    for event in events:
        if isinstance(event, OvaXml):
            ova = event.document
        elif isinstance(event, ChunkStart):
            at, name = event.offset, event.disk
            held = disks.setdefault(name, bytearray())
            held.extend(bytes(max(0, at + event.length - len(held))))
        elif isinstance(event, ChunkData):
            disks[name][at : at + len(event.data)] = event.data
            at += len(event.data)
        elif isinstance(event, ChunkEnd):
            assert event.intact
    return ova, disks


@pytest.fixture(scope="module")
def recorded() -> bytes:
    with tarfile.open(RECORDED) as tar:
        member = next(each for each in tar if each.name.endswith(".xva"))
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


# At least one whole chunk: xapi measures gaps by the first chunk of the archive, so it would
# misplace chunks itself after a first disk of less than 1 MiB.
SHAPE = st.tuples(
    st.lists(st.sampled_from([0, 0, 1, 255]), min_size=1, max_size=4), st.integers(0, 3000)
)


def shaped(shape: tuple[list[int], int]) -> bytes:
    """A disk of whole chunks of one byte each and a tail."""
    chunks, tail = shape
    return b"".join(bytes([fill]) * CHUNK for fill in chunks) + b"t" * tail


@settings(max_examples=20, deadline=None)
@given(SHAPE, SHAPE, st.lists(st.floats(0, 1), max_size=6))
def test_what_is_written_is_read_back_whatever_the_cuts(
    first: tuple[list[int], int], second: tuple[list[int], int], shares: list[float]
) -> None:
    one, two = shaped(first), shaped(second)
    whole = written(b"<value>x</value>", disk("Ref:10", one), disk("Ref:2", two))
    ova, disks = contents(read_in(whole, [int(share * len(whole)) for share in shares]))
    assert ova == b"<value>x</value>"
    assert disks == {"Ref:10": one, "Ref:2": two}


def test_an_archive_is_a_tar_for_other_readers() -> None:
    content = b"a" * CHUNK + bytes(2 * CHUNK) + b"z" * 1000
    whole = written(b"<value/>", disk("Ref:2", content), disk("Ref:10", b"b" * 512))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        names = tar.getnames()
        assert names == [
            "ova.xml",
            *("Ref:10/00000000", "Ref:10/00000000.xxhash"),
            *("Ref:2/00000000", "Ref:2/00000000.xxhash"),
            *("Ref:2/00000003", "Ref:2/00000003.xxhash"),
        ], "string order of ids, zero chunks left out"
        checksum = tar.extractfile("Ref:2/00000003.xxhash")
        assert checksum is not None
        assert checksum.read() == xxhash.xxh64(b"z" * 1000).hexdigest().upper().encode()
    assert whole.endswith(END)
    assert len(whole) % 512 == 0


def test_first_and_last_chunk_are_written_even_when_zero() -> None:
    whole = written(b"<value/>", disk("Ref:1", bytes(3 * CHUNK)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        chunks = [name for name in tar.getnames() if not name.endswith((".xml", ".xxhash"))]
    assert chunks == ["Ref:1/00000000", "Ref:1/00000002"]


def test_a_header_is_what_tarfile_writes_for_the_same_entry() -> None:
    info = tarfile.TarInfo("Ref:2/00000000")
    info.size = CHUNK
    parsed = tarfile.TarInfo.frombuf(tar_header("Ref:2/00000000", CHUNK), "utf-8", "strict")
    assert (parsed.name, parsed.size, parsed.mode, parsed.type) == (
        info.name,
        info.size,
        0o644,
        tarfile.REGTYPE,
    )


def test_a_recorded_archive_is_read(recorded: bytes) -> None:
    ova, disks = contents(read_in(recorded, [1, 1000, 5 << 20]))
    with tarfile.open(fileobj=io.BytesIO(recorded)) as tar:
        expected = dict[str, bytes]()
        for member in tar:
            name, _, rest = member.name.partition("/")
            if rest and "." not in rest:
                file = tar.extractfile(member)
                assert file is not None
                expected[name] = expected.get(name, b"") + file.read()
    assert {name: bytes(content) for name, content in disks.items()} == expected
    version, objects = parse_ova_xml(ova)
    assert version["product_version"] == "8.3.0"
    assert [each.kind for each in objects].count("VDI") == 2
    vm = next(each for each in objects if each.kind == "VM")
    assert vm.snapshot["other_config"]["xo:backup:vm"] == "fda19ed2-4e86-4644-a698-498a6317efb6"
    assert vm.snapshot["is_a_template"] is False
    assert vm.snapshot["HVM_shadow_multiplier"] == 1.0


def test_our_headers_are_byte_for_byte_the_recorded_ones(recorded: bytes) -> None:
    size = tarfile.TarInfo.frombuf(recorded[:512], "utf-8", "strict").size
    # The last field is the recorded writer's ustar version, which readers ignore.
    assert tar_header("ova.xml", size)[:148] == recorded[:148]


def entry(name: str, body: bytes) -> bytes:
    return tar_header(name, len(body)) + body + bytes(-len(body) % 512)


def chunk(name: str, body: bytes) -> bytes:
    return entry(name, body) + entry(
        f"{name}.xxhash", xxhash.xxh64(body).hexdigest().upper().encode()
    )


OVA = entry("ova.xml", b"<value/>")


def starts(data: bytes) -> list[tuple[int, int]]:
    return [(e.offset, e.length) for e in read_in(data, []) if isinstance(e, ChunkStart)]


def test_keep_alive_chunks_use_up_a_number_but_no_byte() -> None:
    data = OVA + chunk("Ref:1/00000000", b"a" * 1024) + chunk("Ref:1/00000001", b"")
    data += chunk("Ref:1/00000002", b"b" * 1024) + END
    assert starts(data) == [(0, 1024), (1024, 0), (1024, 1024)]


def test_a_gap_counts_in_the_first_chunk_of_the_whole_archive() -> None:
    data = OVA + chunk("Ref:1/00000000", b"a" * 1024) + chunk("Ref:2/00000000", b"b" * 512)
    data += chunk("Ref:2/00000003", b"c" * 512) + END
    assert starts(data) == [(0, 1024), (0, 512), (512 + 2 * 1024, 512)]


def test_sha1_checksums_of_older_pools() -> None:
    def old(name: str, body: bytes, digest: bytes) -> bytes:
        return entry(name, body) + entry(f"{name}.checksum", digest)

    good = hashlib.sha1(b"abc").hexdigest().encode()
    data = OVA + old("Ref:1/00000000", b"abc", good) + old("Ref:1/00000001", b"abd", good) + END
    ends = [event.intact for event in read_in(data, []) if isinstance(event, ChunkEnd)]
    assert ends == [True, False]


def test_a_wrong_chunk_is_told() -> None:
    whole = bytearray(written(b"<value/>", disk("Ref:1", b"q" * CHUNK)))
    whole[2000] ^= 1
    assert [e.intact for e in read_in(bytes(whole), []) if isinstance(e, ChunkEnd)] == [False]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "truncated"),
        (OVA, "truncated"),
        (OVA + bytes(512), "truncated"),
        (OVA + chunk("Ref:1/00000000", b"a")[:700], "truncated"),
        (entry("Ref:1/00000000", b"a") + END, "unexpected entry"),
        (END, "early end"),
        (OVA + entry("Ref:1/00000000", b"a") + END, "early end"),
        (OVA + entry("Ref:1/00000000", b"a") * 2 + END, "unexpected entry"),
        (OVA + entry("evil/../x", b"a") + END, "unexpected entry"),
        (OVA + entry("Ref:1/00000000.xxhash", b"0" * 16) + END, "unexpected entry"),
        (OVA + chunk("Ref:1/00000000", b"a") * 2 + END, "chunk order"),
        (OVA + b"HTTP/1.1 500 Internal Error\r\n".ljust(512), "tar header checksum"),
        (b"\x01" + OVA[1:] + END, "tar header checksum"),
        (OVA + END + b"x" * 512, "padding"),
        (OVA + b"x" * 512 + END, "tar header"),
    ],
)
def test_the_reader_is_strict(data: bytes, what: str) -> None:
    with pytest.raises(Corrupt) as caught:
        list(read_in(data, []))
    assert caught.value.data["what"] == what


def test_the_end_is_an_event_and_padding_may_follow() -> None:
    events = list(read_in(OVA + chunk("Ref:1/00000000", b"a") + END + bytes(8192), []))
    assert events[-1] == End()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<value>",
        b"<value>x</value>",
        b'<!DOCTYPE v [<!ENTITY a "b">]><value>&a;</value>',
        b'<!DOCTYPE v SYSTEM "file:///etc/passwd"><value/>',
        b"<value>" * 300 + b"</value>" * 300,
        b"<value><struct><member><value>no name</value></member></struct></value>",
        b"\xff\xfe",
    ],
)
def test_a_hostile_ova_xml_is_refused(document: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_ova_xml(document)


def test_ova_xml_round_trip() -> None:
    snapshot = {
        "name": "a <&> é\n",
        "n": 5,
        "b": True,
        "set": ["x", ""],
        "map": {"k": "v"},
        "f": 1.5,
    }
    document = build_ova_xml({"xapi_major": 1}, [ArchivedObject("VM", "Ref:0", snapshot)])
    version, objects = parse_ova_xml(document)
    assert version == {"xapi_major": "1"}
    assert objects == [ArchivedObject("VM", "Ref:0", {**snapshot, "n": "5"})]


# The check of a passing stream


def check(data: bytes, step: int) -> None:
    validator = Validator()
    for start in range(0, len(data), step):
        validator.feed(memoryview(data)[start : start + step])
    validator.finish(len(data))


def pack(form: str, data: bytes) -> bytes:
    if form == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if form == "zstd":
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
    if form == "zstd stream":
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        return packer.compress(data) + packer.flush()
    return data


FORMS = ["tar", "gzip", "zstd", "zstd stream"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [517, 65536, 1 << 24])
def test_a_whole_archive_passes(recorded: bytes, form: str, step: int) -> None:
    check(pack(form, recorded), step)


@pytest.mark.parametrize("form", FORMS)
def test_upstream_weakness_4_an_archive_cut_anywhere_is_noticed(recorded: bytes, form: str) -> None:
    data = pack(form, recorded)
    cuts = [0, 1, 3, 5, 511, 600, len(data) // 2, len(data) - 1024, len(data) - 512, len(data) - 1]
    for cut in cuts:
        with pytest.raises(Corrupt):
            check(data[:cut], 1 << 20)


def test_a_gzip_stream_of_a_cut_tar_is_noticed(recorded: bytes) -> None:
    with pytest.raises(Corrupt, match="truncated"):
        check(gzip.compress(recorded[:-512], 1), 1 << 20)


def test_many_gzip_members_and_zstd_frames_pass(recorded: bytes) -> None:
    half = len(recorded) // 2
    check(pack("gzip", recorded[:half]) + pack("gzip", recorded[half:]), 100_001)
    frames = pack("zstd", recorded[:half]) + b"\x53\x2a\x4d\x18\x03\0\0\0abc"
    check(frames + pack("zstd", recorded[half:]), 100_001)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (b"<html><body>error</body></html>", "error page"),
        (b"HTTP/1.1 500 Internal Error\r\n\r\n<html>", "error page"),
        (END + bytes(9216), "empty"),
        (entry("etc/passwd", b"x") + END, "etc/passwd"),
        (pack("gzip", b"") + b"junk", "gzip member"),
        (b"\x28\xb5\x2f\xfd\x00\x58\xff\xff\xff", "zstd block"),
        (OVA + END + OVA, "follow the end"),
    ],
)
def test_what_is_no_archive_is_named(data: bytes, text: str) -> None:
    with pytest.raises(Corrupt, match=text):
        check(data, 1 << 20)


@pytest.mark.parametrize("at", [0, 100, 512, 1024, 1024 + 600_000])
@pytest.mark.parametrize("step", [700, 1 << 20])
def test_upstream_weakness_4_a_second_http_answer_in_the_data_is_named(at: int, step: int) -> None:
    whole = written(b"<value/>", disk("Ref:1", b"q" * CHUNK))
    answer = b"HTTP/1.1 500 Internal Error\r\ncontent-length: 40\r\n\r\n<html><body>x</body></html>"
    with pytest.raises(Corrupt) as caught:
        check(whole[:at] + answer, step)
    assert caught.value.data["what"] in ("HTTP answer in the body", "error page")
    assert caught.value.data["offset"] == at


def test_the_stored_size_must_be_what_was_seen(recorded: bytes) -> None:
    validator = Validator()
    validator.feed(recorded)
    with pytest.raises(Corrupt, match="were stored"):
        validator.finish(len(recorded) - 1)


def test_only_gzip_wants_a_thread(recorded: bytes) -> None:
    found = dict[str, bool]()
    for form in FORMS:
        validator = Validator()
        validator.feed(pack(form, recorded)[:100])
        found[validator.format] = validator.cpu_bound
    assert found == {"tar": False, "gzip": True, "zstd": False}
