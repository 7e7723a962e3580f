"""The formats in which one disk travels over ``/export_raw_vdi`` and ``/import_raw_vdi``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.errors import Corrupt
from proxy.simulator.disks import UNIT, ZEROS, DiskContent
from proxy.simulator.qcow2_images import Qcow2Receiver, qcow2_pieces
from proxy.simulator.vdi_operations import LARGEST_VHD
from proxy.simulator.vhd_images import VhdReceiver, vhd_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from proxy.simulator.faults import Damage


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a differencing export is relative to."""

    content: DiskContent
    uuid: UUID
    """Of the file under the base, which is not its VDI's."""
    path: str
    timestamp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """An export: a frozen copy of the disk, and how its stream looks."""

    content: DiskContent
    uuid: UUID
    base: Base | None = None
    damage: Damage | None = None

    def blocks(self) -> list[int]:
        """The 2 MiB blocks that travel: those that differ from the base, or are not zero."""
        if self.base is not None:
            return self.content.changed_units(self.base.content)
        return self.content.held_blocks()


class Receiver(Protocol):
    """Takes a stream apart and writes what it carries into a disk."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises ``Corrupt``."""
        ...

    def finish(self) -> None:
        """No more bytes come; raises ``Corrupt`` when some are missing."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """One format.  ``send`` may read all of a disk before its first piece."""

    content_type: str
    send: Callable[[Sending], tuple[Iterator[memoryview], int]]
    """The pieces of a stream, and how many bytes they are."""
    receive: Callable[[DiskContent, int], Receiver]
    """Made for a disk and the announced length of the body."""
    largest: int | None = None
    """Virtual size above which an export fails."""


def _raw_pieces(sending: Sending) -> tuple[Iterator[memoryview], int]:
    content = sending.content
    wanted = None if sending.base is None else set(sending.blocks())

    def pieces() -> Iterator[memoryview]:
        for number in range(-(-content.size // UNIT)):
            if wanted is None or number // 2 in wanted:
                yield from content.unit(number)
            else:
                yield ZEROS[: content.visible(number)]

    return pieces(), content.size


class RawReceiver:
    """The bytes of the disk, from its start."""

    def __init__(self, content: DiskContent, length: int) -> None:
        self._content = content
        self._missing = length
        self._offset = 0
        self._held = bytearray()

    def feed(self, data: bytes) -> None:
        self._missing -= len(data)
        self._held += data
        while len(self._held) >= UNIT:
            self._write(UNIT)

    def _write(self, length: int) -> None:
        try:
            self._content.write(self._offset, bytes(self._held[:length]))
        except ValueError as error:
            raise Corrupt("more bytes than the disk has") from error
        self._offset += length
        del self._held[:length]

    def finish(self) -> None:
        self._write(len(self._held))
        if self._missing:
            raise Corrupt(f"{self._missing} bytes are missing")


FORMATS: dict[str, ImageFormat] = {
    "raw": ImageFormat("application/octet-stream", _raw_pieces, RawReceiver),
    "qcow2": ImageFormat("application/x-qemu-disk", qcow2_pieces, Qcow2Receiver),
    "vhd": ImageFormat("application/vhd", vhd_pieces, VhdReceiver, largest=LARGEST_VHD),
}
"""By the name in the query, lower case.  Another format joins by its entry here."""
