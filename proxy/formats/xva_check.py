"""Is this stream a whole XVA?  Looks at headers only, so it keeps up with the wire.

An export has no length: a cut connection looks like a normal end, and a pool that fails late
writes a second HTTP answer into the body.  The one proof of completeness is the format.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

from proxy.errors import Corrupt
from proxy.formats.xva import TAR_BLOCK, parse_tar_header

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
_TAIL = 4096
_INFLATED = 1024 * 1024


class _Walker(Protocol):
    def feed(self, view: memoryview) -> None: ...
    def finish(self) -> None: ...


def _corrupt(message: str, what: str, offset: int) -> Corrupt:
    return Corrupt(message, data={"what": what, "offset": offset})


class _Small:
    """Collects exactly as many bytes as the next step needs, over any cuts."""

    def __init__(self) -> None:
        self.held = bytearray()

    def take(self, view: memoryview, want: int) -> tuple[bytes | None, memoryview]:
        if not self.held and len(view) >= want:
            return bytes(view[:want]), view[want:]
        missing = want - len(self.held)
        self.held += view[:missing]
        if len(self.held) < want:
            return None, view[missing:]
        whole = bytes(self.held)
        self.held.clear()
        return whole, view[missing:]


class _Tar:
    """Walks entry headers and skips bodies; wants ``ova.xml`` first and the end blocks last."""

    def __init__(self) -> None:
        self.offset = 0
        self._skip = 0
        self._small = _Small()
        self._zero_blocks = 0
        self._entries = 0

    def feed(self, view: memoryview) -> None:
        while view:
            if self._skip:
                count = min(self._skip, len(view))
                self._skip -= count
                self.offset += count
                view = view[count:]
                continue
            before = len(view)
            block, view = self._small.take(view, TAR_BLOCK)
            self.offset += before - len(view)
            if block is not None:
                self._block(block)

    def _block(self, block: bytes) -> None:
        at = self.offset - TAR_BLOCK
        if not any(block):
            if not self._entries:
                raise _corrupt("the archive is empty", "empty archive", at)
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            raise _corrupt(f"data follow the end of the archive at byte {at}", "tail", at)
        name, size = parse_tar_header(block, at)
        if not self._entries and name != "ova.xml":
            raise _corrupt(
                f"the first entry of the archive is '{name}', not ova.xml", "unexpected entry", at
            )
        self._entries += 1
        self._skip = size + -size % TAR_BLOCK

    def finish(self) -> None:
        if self._skip or self._small.held or self._zero_blocks < 2:
            raise _corrupt(
                f"the archive is truncated: it stops at byte {self.offset} without its end blocks",
                "truncated",
                self.offset,
            )


class _Gzip:
    """Decompresses, checks each member's CRC and the tar inside."""

    def __init__(self) -> None:
        self._tar = _Tar()
        self._open: Any = None
        self._held = b""
        self._offset = 0

    def feed(self, view: memoryview) -> None:
        data: bytes | memoryview = self._held + bytes(view) if self._held else view
        self._held = b""
        self._offset += len(view)
        while data:
            if self._open is None:
                if len(data) < 2:
                    self._held = bytes(data)
                    return
                if bytes(data[:2]) != GZIP:
                    raise _corrupt(
                        f"no gzip member near byte {self._offset}", "gzip member", self._offset
                    )
                self._open = zlib.decompressobj(31)
            try:
                inflated = self._open.decompress(data, _INFLATED)
            except zlib.error as error:
                raise _corrupt(
                    f"damaged gzip data near byte {self._offset}", "gzip data", self._offset
                ) from error
            self._tar.feed(memoryview(inflated))
            if self._open.eof:
                data = self._open.unused_data
                self._open = None
            else:
                data = self._open.unconsumed_tail

    def finish(self) -> None:
        if self._open is not None:
            # zlib holds back output only when it was told a limit: ask for the rest
            self._tar.feed(memoryview(self._open.flush()))
        if self._held or (self._open is not None and not self._open.eof):
            raise _corrupt(
                f"the gzip stream is truncated: it stops at byte {self._offset}",
                "truncated",
                self._offset,
            )
        self._tar.finish()


class _Zstd:
    """Walks frames and block headers without decompressing (RFC 8878, 3.1)."""

    def __init__(self) -> None:
        self.offset = 0
        self._skip = 0
        self._small = _Small()
        self._state = "magic"
        self._want = 4
        self._checksum = False
        self._frames = 0

    def feed(self, view: memoryview) -> None:
        while view:
            if self._skip:
                count = min(self._skip, len(view))
                self._skip -= count
                self.offset += count
                view = view[count:]
                continue
            before = len(view)
            got, view = self._small.take(view, self._want)
            self.offset += before - len(view)
            if got is not None:
                self._step(got)

    def _expect(self, state: str, want: int, *, skip: int = 0) -> None:
        self._state, self._want, self._skip = state, want, skip

    def _step(self, got: bytes) -> None:
        if self._state == "magic":
            if got == ZSTD:
                self._expect("descriptor", 1)
            elif self._frames and got[1:] == b"\x2a\x4d\x18" and got[0] & 0xF0 == 0x50:
                self._expect("skippable size", 4)
            else:
                at = self.offset - 4
                raise _corrupt(f"no zstd frame at byte {at}", "zstd frame", at)
        elif self._state == "skippable size":
            self._expect("magic", 4, skip=int.from_bytes(got, "little"))
        elif self._state == "descriptor":
            flag = got[0]
            if flag & 0x08:
                raise _corrupt("reserved bit set in a zstd frame", "zstd frame", self.offset)
            single = bool(flag & 0x20)
            self._checksum = bool(flag & 0x04)
            content = (1 if single else 0, 2, 4, 8)[flag >> 6]
            length = (0 if single else 1) + (0, 1, 2, 4)[flag & 3] + content
            self._expect("block", 3, skip=length)
        else:
            self._block(int.from_bytes(got, "little"))

    def _block(self, header: int) -> None:
        last, kind, size = header & 1, (header >> 1) & 3, header >> 3
        if kind == 3 or size > 128 * 1024:
            at = self.offset - 3
            raise _corrupt(f"damaged zstd block at byte {at}", "zstd block", at)
        stored = 1 if kind == 1 else size
        if last:
            self._frames += 1
            self._expect("magic", 4, skip=stored + (4 if self._checksum else 0))
        else:
            self._expect("block", 3, skip=stored)

    def finish(self) -> None:
        if self._skip or self._small.held or self._state != "magic" or not self._frames:
            raise _corrupt(
                f"the zstd stream is truncated: it stops at byte {self.offset}",
                "truncated",
                self.offset,
            )


class Validator:
    """Watches an XVA pass by and says at the end whether it was whole.

    ``feed`` may raise ``Corrupt`` early; only ``finish`` proves completeness.  Chunk
    checksums are not computed: the pool does that on import.  Not for concurrent use.

    For a plain tar and for zstd ``feed`` costs microseconds per MiB and may be called in
    place.  For gzip (:attr:`cpu_bound`) it decompresses, about 3 ms per MiB outside the GIL:
    call it through ``in_thread(Work.CPU, validator.feed, view)``.
    """

    def __init__(self) -> None:
        self.total = 0
        """Bytes seen."""
        self._start = bytearray()
        self._walker: _Walker | None = None
        self._tail = b""
        self._format = ""

    @property
    def format(self) -> str:
        """``tar``, ``gzip`` or ``zstd``; empty before the first four bytes."""
        return self._format

    @property
    def cpu_bound(self) -> bool:
        """Whether ``feed`` belongs in a thread; known after the first four bytes."""
        return self._format == "gzip"

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Look at the next bytes; raises ``Corrupt`` when they cannot be part of an XVA."""
        view = memoryview(data)
        self.total += len(view)
        if len(view) >= _TAIL:
            self._tail = bytes(view[-_TAIL:])
        else:
            self._tail = (self._tail + bytes(view))[-_TAIL:]
        if self._walker is None:
            self._start += view
            if len(self._start) < 4:
                return
            self._walker = self._recognise(bytes(self._start[:4]))
            view = memoryview(bytes(self._start))
            self._start.clear()
        try:
            self._walker.feed(view)
        except Corrupt as error:
            raise self._explain(error) from error

    def finish(self, total: int | None = None) -> None:
        """The stream ended (after ``total`` bytes, where the caller counted them itself).

        Raises ``Corrupt`` when it is empty, foreign, damaged or cut; ``data['what']`` and
        ``data['offset']`` say what and where.
        """
        if total is not None and total != self.total:
            raise _corrupt(
                f"{total} bytes were stored, but {self.total} were seen", "size", self.total
            )
        if self._walker is None:
            what = "empty" if not self.total else "truncated"
            raise _corrupt(f"the export is {what}: {self.total} bytes", what, self.total)
        try:
            self._walker.finish()
        except Corrupt as error:
            raise self._explain(error) from error

    def _recognise(self, start: bytes) -> _Walker:
        if start[:2] == GZIP:
            self._format = "gzip"
            return _Gzip()
        if start == ZSTD:
            self._format = "zstd"
            return _Zstd()
        if start in (b"HTTP", b"<htm", b"<HTM", b"<!DO", b"<!do"):
            raise _corrupt("the pool sent an error page instead of an archive", "error page", 0)
        self._format = "tar"
        return _Tar()

    def _explain(self, error: Corrupt) -> Corrupt:
        """Name the second HTTP answer that a pool writes when it fails late."""
        at = self._tail.rfind(b"HTTP/1.")
        if at < 0:
            return error
        line = self._tail[at : at + 80].split(b"\r\n", 1)[0].decode("ascii", "replace")
        offset = self.total - len(self._tail) + at
        return _corrupt(
            f"the pool failed while exporting: '{line}' stands in the data at byte {offset}",
            "HTTP answer in the body",
            offset,
        )
