"""Verifying the archive of a full backup."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from proxy.errors import Corrupt, NotFound, ProxyError
from proxy.formats.vhd import BITMAP_SIZE
from proxy.formats.xva_check import Validator
from proxy.remotes.encryption import algorithm_of
from proxy.repository.verify_reports import (
    AUTHENTICATED,
    NOT_READ,
    Comparison,
    Problem,
    Status,
    unauthenticated,
)
from proxy.repository.xva_check import is_valid_xva
from proxy.runtime.background import background
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from proxy.remotes.interface import FileReader, Remote
    from proxy.repository.verify_disk import Reading
    from proxy.runtime.buffers import Buffer

_AHEAD = 2
"""Buffers that are read while others are checked."""
_SIDECAR = re.compile(rb"\$1\$\$([0-9a-f]{32})\s*")


@dataclass(slots=True)
class FoundArchive:
    read: int = 0
    checksum: Comparison = NOT_READ
    problems: list[Problem] = field(default_factory=list["Problem"])


async def look_at_archive(
    remote: Remote, path: str, size: int | None, reading: Reading | None
) -> FoundArchive:
    """Look at the ``.xva`` that should have ``size`` bytes.  Never raises for what it finds.

    Reading checks in one pass that it is a whole archive and that its MD5 is the stored one.
    """
    found = FoundArchive()
    try:
        if size is not None:
            actual = (await remote.stat(path)).size
            if actual != size:
                raise Corrupt(
                    f"'{path}' has {actual} bytes, its metadata says {size}",
                    data={"what": "size", "path": path},
                )
        if not await is_valid_xva(remote, path):
            raise Corrupt(
                f"'{path}' is no complete archive: it was cut",
                data={"what": "archive cut", "path": path},
            )
        if reading is not None and _is_taken(reading, path):
            await _read(remote, path, reading, found)
    except ProxyError as error:
        found.problems.append(Problem.of(error, path=path))
    return found


def _is_taken(reading: Reading, path: str) -> bool:
    """An archive is one stream: a sample takes it whole, or leaves it for another day."""
    return reading.sample is None or reading.sample.takes(0, path)


async def _read(remote: Remote, path: str, reading: Reading, found: FoundArchive) -> None:
    expected = await stored_md5(remote, path)
    async with remote.open_read(path) as file:
        digest = await _check(file, reading, found)
    if isinstance(expected, Comparison):
        found.checksum = expected
        if expected.result == "match":
            found.checksum = Comparison(result="match", compared=found.read)
        return
    matches = digest == expected
    found.checksum = Comparison(result="match" if matches else "mismatch", compared=found.read)
    if not matches:
        found.problems.append(
            Problem(
                status=Status.DAMAGED,
                what="checksum",
                message=f"the MD5 of '{path}' is not the stored one",
                path=path,
            )
        )


async def stored_md5(remote: Remote, path: str) -> str | Comparison:
    """The MD5 that was stored beside the archive, or why it is not known.

    On an encrypted remote a checksum is of the bytes as stored, and the tag says more.
    """
    algorithm = algorithm_of(remote)
    if algorithm is not None:
        return AUTHENTICATED if algorithm.is_authenticated else unauthenticated(algorithm)
    try:
        content = await remote.read_file(f"{path}.checksum", limit=1024)
    except NotFound:
        message = "there is no checksum beside the archive"
        return Comparison(result="unknown", reason="NONE", message=message)
    except ProxyError as error:
        return Comparison(result="unknown", reason="UNREADABLE", message=error.message)
    match = _SIDECAR.fullmatch(content)
    if match is None:
        message = "the checksum beside the archive is none, or of another kind than MD5"
        return Comparison(result="unknown", reason="UNREADABLE", message=message)
    return match[1].decode()


async def _check(file: FileReader, reading: Reading, found: FoundArchive) -> str:
    """Read to the end; the MD5.  ``Corrupt`` where it cannot be part of a whole archive."""
    validator = Validator()
    md5 = hashlib.md5(usedforsecurity=False)
    send, receive = trio.open_memory_channel["tuple[Buffer, int]"](_AHEAD)
    failures: list[Exception] = []

    def feed(view: memoryview) -> None:
        md5.update(view)
        validator.feed(view)

    async def read() -> None:
        try:
            while True:
                buffer = await reading.pool.acquire()
                handed = False
                try:
                    length = await file.read_into(buffer.memory[BITMAP_SIZE:])
                    if not length:
                        return
                    await send.send((buffer, length))
                    handed = True
                finally:
                    if not handed:
                        buffer.release()
        except ProxyError as error:
            failures.append(error)
        except trio.BrokenResourceError:
            pass  # nobody checks any more: the archive is damaged
        finally:
            send.close()

    async with background() as nursery:
        nursery.start_soon(read)
        try:
            async for buffer, length in receive:
                try:
                    view = buffer.memory[BITMAP_SIZE : BITMAP_SIZE + length]
                    await in_thread(Work.CPU, feed, view)
                finally:
                    buffer.release()
                found.read += length
                reading.moved(length)
        finally:
            _give_back(receive)
    if failures:
        raise failures[0]
    validator.finish()
    return md5.hexdigest()


def _give_back(receive: trio.MemoryReceiveChannel[tuple[Buffer, int]]) -> None:
    while True:
        try:
            receive.receive_nowait()[0].release()
        except (trio.WouldBlock, trio.EndOfChannel):
            receive.close()
            return
