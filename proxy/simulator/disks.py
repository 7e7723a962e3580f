"""What the pool's disks contain: reproducible from a seed, copied on write, without memory.

A disk is a generator (random, text or zeros) or an image file, under an overlay of written
units.  A unit that comes back from a restore is recognised and kept as its origin, so that
a restored disk of any size needs no memory either.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

UNIT = 1024 * 1024
BLOCK = 2 * UNIT
"""What VHD streams and change tracking count in."""
_VARIANTS = 16
_ZERO = bytes(UNIT)
ZEROS = memoryview(_ZERO)
"""As long as a unit."""
_STAMP = struct.Struct(">8sQQQ")
_MAGIC = b"simdisk\0"
Kind = Literal["random", "text"]
_KINDS: tuple[Kind, ...] = ("random", "text")


@functools.cache
def _variant(kind: Kind, number: int) -> bytes:
    """The content of a unit up to its stamp."""
    source = random.Random(f"{kind} {number}")  # noqa: S311 - reproducible content, no secret
    if kind == "random":
        return source.randbytes(UNIT)[: -_STAMP.size]
    words = [source.randbytes(6).hex() for _ in range(400)]
    line = " ".join(words[source.randrange(400)] for _ in range(5000)).encode() + b"\n"
    return (line * (UNIT // len(line) + 1))[: UNIT - _STAMP.size]


@functools.cache
def _hashed(kind: Kind, number: int) -> Any:
    """The state of XXH64 after the content, before the stamp."""
    digest: Any = xxhash.xxh64()
    digest.update(_variant(kind, number))
    return digest


@dataclass(frozen=True, slots=True)
class Stamped:
    """A generated unit: one of a few precomputed contents, then a stamp that names it."""

    kind: Kind
    seed: int
    number: int

    def pieces(self) -> tuple[memoryview, memoryview]:
        stamp = _STAMP.pack(_MAGIC, self.seed, self.number, _KINDS.index(self.kind))
        return memoryview(_variant(self.kind, self._content)), memoryview(stamp)

    @property
    def _content(self) -> int:
        return (self.seed * 7 + self.number) % _VARIANTS

    def xxh64(self) -> str:
        """The checksum of the unit: only the stamp is left to hash."""
        digest = _hashed(self.kind, self._content).copy()
        digest.update(self.pieces()[1])
        return str(digest.hexdigest())

    @classmethod
    def recognise(cls, data: memoryview) -> Stamped | None:
        """The generated unit that ``data`` is, if it is one in full."""
        if len(data) != UNIT:
            return None
        stamp: tuple[bytes, int, int, int] = _STAMP.unpack_from(data, UNIT - _STAMP.size)
        magic, seed, number, kind = stamp
        if magic != _MAGIC or kind >= len(_KINDS):
            return None
        found = cls(_KINDS[kind], seed, number)
        # as bytes: memory views are compared byte by byte, three times as slow as a disk
        content = bytes(data[: -_STAMP.size])
        return found if content == _variant(found.kind, found._content) else None


class ImageFile:
    """A file as the content under a disk; closed with the last disk that uses it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        return data + bytes(length - len(data))

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)


class DiskContent:
    """The bytes of one VDI.

    ``fill`` is the share of units that are not zero.  Not thread-safe for writes; reads of
    a disk that nobody writes may run in a thread.
    """

    def __init__(
        self,
        size: int,
        *,
        kind: Kind | None = None,
        seed: int = 0,
        fill: float = 1.0,
        file: ImageFile | None = None,
    ) -> None:
        self.size = size
        self.file = file
        self._kind: Kind | None = kind
        self._seed = seed
        self._fill = fill
        self._base_size = size
        self._written: dict[int, Stamped | bytes | None] = {}

    def copy(self) -> DiskContent:
        """A snapshot or clone: shares everything, diverges at the next write."""
        other = DiskContent(
            self.size, kind=self._kind, seed=self._seed, fill=self._fill, file=self.file
        )
        other._base_size = self._base_size
        other._written = dict(self._written)
        return other

    def resize(self, size: int) -> None:
        """Grow with zeros.  A disk does not shrink."""
        number, length = divmod(self.size, UNIT)
        if length and size > self.size:
            # what stood in the last unit ends here, however much of it was generated
            self._written[number] = _kept(memoryview(self._padded(number)))
        self.size = size

    # Changes

    def changed_units(self, base: DiskContent) -> list[int]:
        """The 2 MiB blocks, ascending, whose bytes differ from those of ``base``.

        Exact: beyond the end of ``base`` there are zeros.  Costs little for a snapshot or a
        clone, where only the units that either side wrote are looked at.
        """
        if self._origin == base._origin:
            numbers = self._written.keys() | base._written.keys()
            if self.size != base.size:
                numbers.add(min(self.size, base.size) // UNIT)
        else:
            numbers = set(range(-(-self.size // UNIT)))
        blocks = {number // 2 for number in numbers if self._differs(base, number)}
        return sorted(blocks)

    @property
    def _origin(self) -> tuple[object, ...]:
        return self._kind, self._seed, self._fill, self.file, self._base_size

    def visible(self, number: int) -> int:
        """Bytes of a unit that lie inside the disk."""
        return max(0, min(UNIT, self.size - number * UNIT))

    def _padded(self, number: int) -> bytes:
        """A unit with zeros behind the end of the disk."""
        return b"".join(self.unit(number)).ljust(UNIT, b"\0")

    def _differs(self, base: DiskContent, number: int) -> bool:
        length = self.visible(number)
        if not length:
            return False
        ours, theirs = self.stored(number), base.stored(number)
        if length == base.visible(number):
            if ours is theirs or ours == theirs:
                return False
            if length == UNIT and isinstance(ours, Stamped) and isinstance(theirs, Stamped):
                return True
        return self._padded(number) != base._padded(number)

    def stored(self, number: int) -> Stamped | bytes | None:
        """What a MiB is made of: generated, its bytes, or None for zeros."""
        if number in self._written:
            return self._written[number]
        if number * UNIT >= self._base_size:
            return None
        if self.file is not None:
            data = self.file.read(number * UNIT, UNIT)
            return None if data == _ZERO else data
        if self._kind is None:
            return None
        if zlib.crc32(struct.pack(">QQ", self._seed, number)) % 10_000 >= self._fill * 10_000:
            return None
        return Stamped(self._kind, self._seed, number)

    def read(self, offset: int, length: int) -> list[memoryview] | None:
        """``length`` bytes inside one unit, in pieces; None when they are zeros."""
        unit = self.stored(offset // UNIT)
        if unit is None:
            return None
        start = offset % UNIT
        if isinstance(unit, bytes):
            return [memoryview(unit)[start : start + length]]
        content, stamp = unit.pieces()
        end = start + length
        if end <= len(content):
            return [content[start:end]]
        if start == 0:
            return [content, stamp[: end - len(content)]]
        return [memoryview(bytes(content) + bytes(stamp))[start:end]]

    def unit(self, number: int) -> list[memoryview]:
        """What lies inside the disk of the ``number``-th MiB, in pieces."""
        length = self.visible(number)
        pieces = self.read(number * UNIT, length) if length else []
        return [ZEROS[:length]] if pieces is None else pieces

    def xxh64(self, offset: int, length: int) -> str | None:
        """The checksum of a whole unit where it costs nothing."""
        unit = self.stored(offset // UNIT)
        if not isinstance(unit, Stamped) or offset % UNIT or length != UNIT:
            return None
        return unit.xxh64()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put ``data`` at ``offset``; raises ``ValueError`` beyond the end."""
        view = memoryview(data)
        if offset + len(view) > self.size:
            raise ValueError("write beyond the end of the disk")
        while view:
            number, start = divmod(offset, UNIT)
            part = view[: UNIT - start]
            whole = min(UNIT, self.size - number * UNIT)
            if len(part) < whole:
                unit = bytearray(whole)
                old = self.read(number * UNIT, whole)
                if old is not None:
                    unit[:] = b"".join(old)
                unit[start : start + len(part)] = part
                part_view = memoryview(unit)
            else:
                part_view = part
            self._written[number] = _kept(part_view)
            view = view[len(part) :]
            offset += len(part)

    def mutate(self, blocks: Iterable[int], seed: int) -> None:
        """Write new generated content into these 2 MiB blocks, all that lies inside the disk.

        The same ``seed`` writes the same content; it takes no memory.  ``IndexError`` for a
        block beyond the end, before anything is written.
        """
        numbers: list[int] = []
        for block in blocks:
            if not 0 <= block < self.blocks:
                raise IndexError(f"block {block} of a disk of {self.blocks} blocks")
            numbers += [2 * block, 2 * block + 1]
        for number in numbers:
            length = self.visible(number)
            if length == UNIT:
                self._written[number] = Stamped(self._kind or "random", seed, number)
            elif length:
                # its stamp lies beyond the end: what makes it new must stand inside
                mark = _STAMP.pack(_MAGIC, seed, number, 0)[:length]
                self._written[number] = mark + self._padded(number)[len(mark) : length]

    @property
    def blocks(self) -> int:
        """2 MiB blocks, the last one perhaps in part."""
        return -(-self.size // BLOCK)

    def held_blocks(self) -> list[int]:
        """The 2 MiB blocks, ascending, that are not zeros; reads all of a file."""
        return sorted({number // 2 for number in self._held() if self.visible(number)})

    def _held(self) -> Iterator[int]:
        """The units that are not zeros."""
        units: Iterable[int] = range(-(-self.size // UNIT))
        if self._kind is None and self.file is None:
            units = list(self._written)  # a large disk may be nearly empty
        return (number for number in units if self.stored(number) is not None)

    def chunks(self) -> Iterator[bytes]:
        """The whole content, at most 1 MiB at a time."""
        for number in range(-(-self.size // UNIT)):
            yield b"".join(self.unit(number))

    @property
    def allocated(self) -> int:
        """Bytes of the units that are not zero (a file counts in full)."""
        if self.file is not None:
            return self.size
        return sum(UNIT for _ in self._held())


def _kept(data: memoryview) -> Stamped | bytes | None:
    stamped = Stamped.recognise(data)
    if stamped is not None:
        return stamped
    kept = bytes(data)
    return None if kept == _ZERO[: len(kept)] else kept
