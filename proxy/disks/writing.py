"""What every writer of a disk is given and does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.formats.vhd import NO_UUID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from proxy.disks.disk import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A disk that is about to be written; ``timestamp`` in seconds since 1970."""

    virtual_size: int
    order: Sequence[int]
    uuid: UUID
    timestamp: int
    is_differencing: bool = False
    parent_uuid: UUID = NO_UUID
    parent_name: str = ""


class DiskWriter(Protocol):
    size: int

    async def write(self, block: Block) -> None: ...

    async def commit(self) -> None: ...
