"""XVA, the archive of a whole VM: a plain tar of ``ova.xml`` and the disks in chunks of 1 MiB.

Layout (xen-api, ``ocaml/xapi/export.ml`` and ``stream_vdi.ml``)::

    ova.xml                  one XML-RPC value: {version, objects: [{class, id, snapshot}]}
    Ref:2/00000000           at most 1 MiB of the first disk
    Ref:2/00000000.xxhash    16 upper-case hex digits: XXH64, seed 0
    Ref:2/00000007           chunks of zeros are left out, but never the first and the last
    …
    two blocks of zeros

Older pools write ``.checksum`` (40 hex digits: SHA-1).  The whole may be wrapped in gzip or
zstd, which this module leaves to its callers; :mod:`proxy.formats.xva_check` looks through it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from proxy.errors import Corrupt
from proxy.formats.xmlrpc import dump_value, load_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

TAR_BLOCK = 512
CHUNK = 1024 * 1024
END = bytes(2 * TAR_BLOCK)
LARGEST_OVA_XML = 32 * 1024 * 1024

_ZEROS = memoryview(bytes(CHUNK))
_SMALL = 64 * 1024
_CHUNK_NAME = re.compile(
    r"(?P<disk>[^/]{1,80})/(?P<number>\d{8,18})(?P<sum>\.xxhash|\.checksum)?\Z"
)


# Tar headers


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of a regular file, as xapi writes it (mode 0644, owner and time 0)."""
    encoded = name.encode()
    if len(encoded) > 100:
        raise ValueError(f"a tar name of {len(encoded)} bytes does not fit")
    fields = b"%s%s0000644\0000000000\0000000000\000%011o\00000000000000\0" % (
        encoded,
        bytes(100 - len(encoded)),
        size,
    )
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    total = sum(fields) + 8 * 0x20 + sum(tail)
    return fields + b"%06o\0 " % total + tail


def parse_tar_header(block: bytes, offset: int) -> tuple[str, int]:
    """Name and size in the tar header that stands at ``offset``; raises ``Corrupt``."""
    try:
        stated = int(block[148:156].strip(b"\0 ") or b"0", 8)
        size = int(block[124:136].strip(b"\0 ") or b"0", 8)
        name = block[:100].split(b"\0", 1)[0].decode()
    except ValueError as error:
        raise Corrupt(
            f"no tar header at byte {offset}", data={"what": "tar header", "offset": offset}
        ) from error
    actual = sum(block[:148]) + 8 * 0x20 + sum(block[156:512])
    if stated != actual:
        raise Corrupt(
            f"the tar header at byte {offset} has the checksum {actual:o}, not {stated:o}",
            data={"what": "tar header checksum", "offset": offset},
        )
    if block[156:157] not in (b"0", b"\0"):
        raise Corrupt(
            f"the tar entry '{name}' at byte {offset} is not a regular file",
            data={"what": "tar entry type", "offset": offset},
        )
    return name, size


def padding(size: int) -> int:
    """Bytes of zeros after a body of ``size`` bytes."""
    return -size % TAR_BLOCK


# Writing


@dataclass(frozen=True, slots=True)
class ArchivedDisk:
    """A disk to write: ``read(offset, length)`` gives its bytes in pieces, None for zeros.

    ``xxh64(offset, length)`` may give the checksum (hex) where the source knows it already.
    """

    id: str
    size: int
    read: Callable[[int, int], Sequence[memoryview] | None]
    xxh64: Callable[[int, int], str | None] | None = None


def archive(ova_xml: bytes, disks: Iterable[ArchivedDisk]) -> Iterator[memoryview]:
    """The bytes of an archive, in pieces of mostly 1 MiB that must not be changed.

    Disks are written in the string order of their ids, as xapi does and expects.
    """
    small = bytearray(tar_header("ova.xml", len(ova_xml)))
    small += ova_xml
    small += bytes(padding(len(ova_xml)))
    for disk in sorted(disks, key=lambda each: each.id):
        count = -(-disk.size // CHUNK)
        for number in range(count):
            offset = number * CHUNK
            length = min(CHUNK, disk.size - offset)
            pieces = disk.read(offset, length)
            if pieces is None:
                if 0 < number < count - 1:
                    continue
                pieces = (_ZEROS[:length],)
            name = f"{disk.id}/{number:08d}"
            small += tar_header(name, length)
            digest = disk.xxh64(offset, length) if disk.xxh64 else None
            if digest is None:
                digest = _xxh64(pieces)
            for piece in pieces:
                if len(piece) < _SMALL:
                    small += piece
                    continue
                yield memoryview(bytes(small))
                small.clear()
                yield piece
            small += bytes(padding(length))
            small += tar_header(f"{name}.xxhash", 16)
            small += digest.upper().encode()
            small += bytes(TAR_BLOCK - 16)
    small += END
    yield memoryview(bytes(small))


def _xxh64(pieces: Iterable[memoryview]) -> str:
    digest: Any = xxhash.xxh64()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


# Reading


@dataclass(frozen=True, slots=True)
class OvaXml:
    """The whole of ``ova.xml``."""

    document: bytes


@dataclass(frozen=True, slots=True)
class ChunkStart:
    """A chunk begins: its bytes belong at ``offset`` of the disk."""

    disk: str
    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkData:
    """Next bytes of the open chunk: a view into what was fed, valid until the next feed."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """The open chunk is whole; ``intact`` says whether its checksum matched."""

    intact: bool


@dataclass(frozen=True, slots=True)
class End:
    """Both blocks of zeros were seen."""


Event: TypeAlias = OvaXml | ChunkStart | ChunkData | ChunkEnd | End


class _Places:
    """Where chunks belong, by xapi's import rule.

    A gap in the numbers skips as many times the length of the *first chunk of the whole
    archive*; each chunk then advances by its own length.  An empty chunk (keep-alive) uses
    up a number and no byte.
    """

    def __init__(self) -> None:
        self._unit = 0
        self._next: dict[str, tuple[int, int]] = {}

    def place(self, disk: str, number: int, length: int, at: int) -> int:
        if not self._unit:
            self._unit = length
        expected, position = self._next.get(disk, (0, 0))
        if number < expected:
            raise Corrupt(
                f"chunk {number} of '{disk}' at byte {at} comes after chunk {expected - 1}",
                data={"what": "chunk order", "offset": at},
            )
        position += (number - expected) * self._unit
        self._next[disk] = (number + 1, position + length)
        return position


class Reader:
    """Strict incremental reader: feed bytes cut anywhere, get events.

    Raises ``Corrupt`` with the offset for a bad header, a missing or foreign entry, an
    archive that does not end; a wrong *chunk checksum* is an event, as xapi's ``force``
    lets it pass.
    """

    def __init__(self) -> None:
        self.offset = 0
        """Bytes consumed."""
        self._head = bytearray()
        self._want = TAR_BLOCK
        self._state = "header"
        self._left = 0
        self._pad = 0
        self._name = ""
        self._places = _Places()
        self._seen_ova = False
        self._pending: str | None = None
        self._xxh: Any = None
        self._sha: Any = None
        self._kind: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the end of the archive was read."""
        return self._state == "end"

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """The events in the next bytes; iterate to the end before the next ``feed``."""
        view = memoryview(data)
        while view:
            if self._state == "data":
                take = view[: self._left]
                view = view[len(take) :]
                self.offset += len(take)
                self._left -= len(take)
                if self._xxh is not None:
                    self._xxh.update(take)
                if self._sha is not None:
                    self._sha.update(take)
                yield ChunkData(take)
                if not self._left:
                    self._after_data()
                continue
            if self._state == "skip":
                count = min(self._left, len(view))
                self._zeros(view[:count])
                view = view[count:]
                self.offset += count
                self._left -= count
                if not self._left:
                    self._expect_header()
                continue
            if self._state == "end":
                self._zeros(view)
                self.offset += len(view)
                return
            take = view[: self._want - len(self._head)]
            self._head += take
            view = view[len(take) :]
            self.offset += len(take)
            if len(self._head) == self._want:
                yield from self._complete()

    def finish(self) -> None:
        """Say that no more bytes come; raises ``Corrupt`` for an archive that was cut."""
        if self._state == "end":
            return
        where = f" inside '{self._name}'" if self._state != "header" else ""
        raise Corrupt(
            f"the archive is truncated: it stops at byte {self.offset}{where}",
            data={"what": "truncated", "offset": self.offset},
        )

    def _zeros(self, view: memoryview) -> None:
        if view != _ZEROS[: len(view)] and any(view):
            raise Corrupt(
                f"bytes other than zero in the padding near byte {self.offset}",
                data={"what": "padding", "offset": self.offset},
            )

    def _expect_header(self) -> None:
        self._state, self._want = "header", TAR_BLOCK

    def _complete(self) -> Iterator[Event]:
        block = bytes(self._head)
        self._head.clear()
        if self._state == "header":
            yield from self._header(block)
        elif self._state == "second zero block":
            self._zeros(memoryview(block))
            self._state = "end"
            yield End()
        elif self._state == "ova":
            self._skip_padding()
            yield OvaXml(block)
        else:
            self._skip_padding()
            yield ChunkEnd(self._matches(block))

    def _skip_padding(self) -> None:
        self._left = self._pad
        self._state = "skip"
        if not self._left:
            self._expect_header()

    def _after_data(self) -> None:
        self._skip_padding()

    def _header(self, block: bytes) -> Iterator[Event]:
        at = self.offset - TAR_BLOCK
        if not any(block):
            if not self._seen_ova or self._pending:
                raise Corrupt(
                    f"the archive ends at byte {at}, too early",
                    data={"what": "early end", "offset": at},
                )
            self._state, self._want = "second zero block", TAR_BLOCK
            return
        name, size = parse_tar_header(block, at)
        self._name, self._pad = name, padding(size)
        if not self._seen_ova:
            if name != "ova.xml" or not 0 < size <= LARGEST_OVA_XML:
                raise _unexpected("ova.xml", name, at)
            self._seen_ova = True
            self._state, self._want = "ova", size
            return
        match = _CHUNK_NAME.match(name)
        if match is None:
            raise _unexpected("a chunk", name, at)
        if match["sum"]:
            self._checksum(name, match["sum"], size, at)
            return
        if self._pending:
            raise _unexpected(f"{self._pending}.xxhash", name, at)
        if size > CHUNK:
            raise Corrupt(f"the chunk '{name}' has {size} bytes", data={"offset": at})
        number = int(match["number"])
        place = self._places.place(match["disk"], number, size, at)
        self._pending, self._left = name, size
        self._xxh = xxhash.xxh64() if self._kind != ".checksum" else None
        self._sha = hashlib.sha1(usedforsecurity=False) if self._kind != ".xxhash" else None
        self._state = "data"
        yield ChunkStart(match["disk"], number, place, size)
        if not size:
            self._after_data()

    def _checksum(self, name: str, kind: str, size: int, at: int) -> None:
        if self._pending is None or name != self._pending + kind:
            raise _unexpected(f"{self._pending}.xxhash" if self._pending else "a chunk", name, at)
        if self._kind not in (None, kind) or size != (16 if kind == ".xxhash" else 40):
            raise Corrupt(f"the checksum '{name}' has {size} bytes", data={"offset": at})
        self._kind, self._pending = kind, None
        self._state, self._want = "sum", size

    def _matches(self, digits: bytes) -> bool:
        digest: str = (self._xxh if self._kind == ".xxhash" else self._sha).hexdigest()
        return digits.strip().lower() == digest.encode()


def _unexpected(wanted: str, found: str, at: int) -> Corrupt:
    return Corrupt(
        f"expected {wanted}, found '{found}' at byte {at}",
        data={"what": "unexpected entry", "expected": wanted, "actual": found, "offset": at},
    )


# ova.xml


@dataclass(frozen=True, slots=True)
class ArchivedObject:
    """A record inside ``ova.xml``; references in it are ids of the same file."""

    kind: str
    id: str
    snapshot: dict[str, Any]


def build_ova_xml(version: dict[str, Any], objects: Iterable[ArchivedObject]) -> bytes:
    """The document from xapi's ``version`` struct and the objects."""
    listed = [{"class": o.kind, "id": o.id, "snapshot": o.snapshot} for o in objects]
    return dump_value({"version": version, "objects": listed}).encode()


def parse_ova_xml(document: bytes) -> tuple[dict[str, Any], list[ArchivedObject]]:
    """``version`` and objects; raises ``Corrupt``.  Integers are decimal strings."""
    if len(document) > LARGEST_OVA_XML:
        raise Corrupt(f"an ova.xml of {len(document)} bytes is refused")
    value = load_value(document)
    try:
        objects = [
            ArchivedObject(str(each["class"]), str(each["id"]), dict(each["snapshot"]))
            for each in value["objects"]
        ]
        return dict(value["version"]), objects
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt("ova.xml has no version and objects") from error
