"""qcow2 images made by hand from the format's document, and the real tools."""

from __future__ import annotations

import json
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

COPIED = 1 << 63


def image(
    size: int,
    clusters: Mapping[int, bytes | None],
    *,
    bits: int = 16,
    version: int = 3,
    gaps: Iterable[int] = (),
    flags: int = COPIED,
    backing: bytes = b"",
) -> bytes:
    """An image whose tables stand first, its clusters in the order of the disk.

    ``None`` is a cluster of zeros without data.  A cluster of ``gaps`` has an unused one
    before it.
    """
    cluster = 1 << bits
    entries = cluster // 8
    total = -(-size // cluster)
    tables = -(-total // entries)
    l1_clusters = max(1, -(-tables // entries))
    used = sorted({number // entries for number in clusters})
    gaps = set(gaps)
    data = sum(content is not None for content in clusters.values()) + len(gaps)
    counts = 1
    while True:
        whole = 1 + 1 + counts + l1_clusters + len(used) + data
        if -(-whole // (cluster // 2)) <= counts:
            break
        counts += 1
    assert counts <= entries
    l1_at = 2 + counts
    at = l1_at + l1_clusters + len(used)
    l2 = {number: [0] * entries for number in used}
    body = b""
    parts: list[bytes] = []
    counted = bytearray(b"\0\1" * at)
    for number in sorted(clusters):
        content = clusters[number]
        if content is None:
            l2[number // entries][number % entries] = 1
            continue
        if number in gaps:
            parts.append(b"\xee" * cluster)
            counted += b"\0\0"
            at += 1
        l2[number // entries][number % entries] = at * cluster | flags
        parts.append(content.ljust(cluster, b"\0"))
        counted += b"\0\1"
        at += 1
    body = b"".join(parts)
    l1 = [0] * entries * l1_clusters
    for place, number in enumerate(used):
        l1[number] = (l1_at + l1_clusters + place) * cluster | COPIED
    name_at = 200 if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        name_at,
        len(backing),
        bits,
        size,
        0,
        tables,
        l1_at * cluster,
        cluster,
        1,
        0,
        0,
    )
    if version == 3:
        head += struct.pack(">QQQIIQ", 0, 0, 0, 4, 112, 0)
    if backing:
        head = head.ljust(name_at, b"\0") + backing
    return b"".join(
        [
            head.ljust(cluster, b"\0"),
            words([(2 + nth) * cluster for nth in range(counts)]).ljust(cluster, b"\0"),
            bytes(counted).ljust(counts * cluster, b"\0"),
            words(l1),
            *(words(l2[number]) for number in used),
            body,
        ]
    )


def words(values: Iterable[int]) -> bytes:
    return b"".join(value.to_bytes(8, "big") for value in values)


def flat(
    size: int, clusters: Mapping[int, bytes | None], bits: int = 16, under: bytes = b""
) -> bytes:
    """The disk, over what was there."""
    disk = bytearray(under[:size].ljust(size, b"\0"))
    for number, content in clusters.items():
        start = number << bits
        data = (content or b"").ljust(1 << bits, b"\0")[: size - start]
        disk[start : start + len(data)] = data
    return bytes(disk)


class Source:
    """Bytes in pieces of at most ``most``, with an end that is confirmed, or not."""

    def __init__(self, data: bytes, most: int = 1 << 20, error: Exception | None = None) -> None:
        self.finished = False
        self.read = 0
        self._data = memoryview(data)
        self._most = most
        self._error = error

    async def read_into(self, view: memoryview, /) -> int:
        await trio.lowlevel.checkpoint()
        count = min(len(view), self._most, len(self._data) - self.read)
        view[:count] = self._data[self.read : self.read + count]
        self.read += count
        return count

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        assert self.read == len(self._data)
        if self._error is not None:
            raise self._error
        self.finished = True


def qemu_img(*arguments: str | Path) -> str:
    return _run("qemu-img", *arguments)


def qemu_io(path: Path, *commands: str) -> None:
    """Change an image as a guest would."""
    words = [word for command in commands for word in ("-c", command)]
    out = _run("qemu-io", *words, path)
    assert "failed" not in out


def _run(*words: str | Path) -> str:
    done = subprocess.run(  # noqa: PLW1510 (its words are shown)
        [str(word) for word in words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checked(path: Path) -> dict[str, Any]:
    """What qemu's check says of an image without faults."""
    told = json.loads(qemu_img("check", "--output=json", path))
    for fault in ("corruptions", "leaks", "check-errors"):
        assert told.get(fault, 0) == 0
    return dict(told)


def qemu_reads(path: Path) -> bytes:
    """The disk as qemu has it."""
    raw = path.with_suffix(".read")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()
