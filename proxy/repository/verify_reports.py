"""What a verify says: of each disk, of each backup, and all in all."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from proxy.errors import Corrupt, NotFound, ProxyError
from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import Iterable

Level = Literal["structure", "read"]

MOST_PROBLEMS: Final = 20
"""Of one report: after that many, reading stops.  Nobody needs the other thousand."""


class Status(StrEnum):
    """In the order of how bad it is; a backup's is the worst of its disks' and its own."""

    OK = "ok"
    """Everything that this level looks at is as it should be."""
    MERGING = "merging"
    """It is being merged, and does not read through the merge.  Let it end, verify again."""
    UNKNOWN = "unknown"
    """Nothing can be said: it is of a kind that this version does not know, or it was changed
    or removed while it was looked at."""
    UNREADABLE = "unreadable"
    """The storage failed or refused: look after the storage.  The backup may be fine."""
    DAMAGED = "damaged"
    """Proven: this backup does not restore, or restores wrong data."""


_BADNESS: Final = tuple(Status)


def worst(statuses: Iterable[Status]) -> Status:
    return max(statuses, key=_BADNESS.index, default=Status.OK)


def status_of(error: ProxyError) -> Status:
    """What an error that was met while looking proves."""
    if isinstance(error, Corrupt | NotFound):
        return Status.DAMAGED
    return Status.UNKNOWN if error.code == "ENOTSUP" else Status.UNREADABLE


def rooted(path: str) -> str:
    """``path`` as ids of backups are: with a leading slash."""
    return "/" + paths.normalise(path)


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``what`` is a short name of the kind, ``message`` a sentence; then where it is."""

    status: Status
    what: str
    message: str
    path: str | None = None
    block: int | None = None
    """Index: the 2 MiB of the disk from byte ``block * 2 MiB``."""
    offset: int | None = None
    """Bytes from the start of the file."""

    @classmethod
    def of(cls, error: ProxyError, *, path: str, block: int | None = None) -> Problem:
        status = status_of(error)
        what = error.data.get("what")
        offset = error.data.get("offset")
        named = error.data.get("path")
        default = {Status.DAMAGED: "missing", Status.UNKNOWN: "kind"}.get(status, "storage")
        return cls(
            status=status,
            what=what if isinstance(what, str) else default,
            message=error.message,
            path=rooted(named if isinstance(named, str) else path),
            block=block,
            offset=offset if isinstance(offset, int) else None,
        )


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How what was read compares with the checksums from when it was written."""

    result: Literal["match", "mismatch", "unknown"]
    reason: str | None = None
    """Why it is unknown, a stable code: ``NOT_READ``, ``NONE``, ``CHANGED``, ``UNREADABLE``,
    ``UNAUTHENTICATED``."""
    message: str | None = None
    compared: int = 0
    """Blocks of a disk that were compared, bytes of an archive."""


NOT_READ: Final = Comparison(
    result="unknown", reason="NOT_READ", message="its data was not read by this verify"
)


AUTHENTICATED: Final = Comparison(result="match")
"""Of what was read to its end on a remote whose encryption tells every changed byte."""


def unauthenticated(algorithm: str) -> Comparison:
    """Of what was read on a remote whose encryption tells nothing."""
    return Comparison(
        result="unknown",
        reason="UNAUTHENTICATED",
        message=f"the remote is encrypted by {algorithm}, an unauthenticated algorithm: a file"
        " that was changed is read without an error",
    )


class DiskReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    tag_field="type",
    tag="disk",
):
    """One stored disk by itself: of what it stands on only the link is judged."""

    path: str
    """Of its file or alias."""
    uuid: str | None = None
    status: Status
    parent: str | None = None
    is_merging: bool = False
    """It was read through a merge that is under way."""
    blocks: int = 0
    """Blocks that it has itself."""
    read: int = 0
    """Of these, how many were read."""
    checksum: Comparison = NOT_READ
    problems: list[Problem] = []
    """At most :data:`MOST_PROBLEMS`."""


class BackupReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    tag_field="type",
    tag="backup",
):
    """One backup with all that it needs.  Its disks' own reports came before it."""

    id: str
    """Of its metadata file; of the VM's directory when that cannot be read."""
    vm: str
    name_label: str | None = msgspec.field(default=None, name="name_label")
    mode: str | None = None
    timestamp: int = 0
    """Milliseconds since 1970."""
    status: Status
    disks: list[str] = []
    """Every disk that it needs, parents included."""
    read: int = 0
    """Bytes of its archive that were read (full backups)."""
    checksum: Comparison | None = None
    """Of the archive of a full backup."""
    problems: list[Problem] = []
    """Its own, and in short those of its disks."""


Report = DiskReport | BackupReport


class Summary(
    msgspec.Struct,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    tag_field="type",
    tag="summary",
):
    """The last record of a verify."""

    status: str
    """The worst of all backups, or ``canceled``."""
    message: str | None = None
    """Why it did not come to its end."""
    level: Level
    sample: float | None = None
    backups: dict[str, int] = {}
    """How many by status."""
    disks: dict[str, int] = {}
    checksums: dict[str, int] = {}
    """Disks and archives by how their content compares."""
    blocks_read: int = 0
    bytes_read: int = 0
    """Of archives and blocks, uncompressed."""

    def add(self, report: Report, block_size: int) -> None:
        if isinstance(report, DiskReport):
            self.disks = _counted(self.disks, report.status.value)
            self.checksums = _counted(self.checksums, report.checksum.result)
            self.blocks_read += report.read
            self.bytes_read += report.read * block_size
            return
        self.backups = _counted(self.backups, report.status.value)
        self.bytes_read += report.read
        if report.checksum is not None:
            self.checksums = _counted(self.checksums, report.checksum.result)


def _counted(counts: dict[str, int], key: str) -> dict[str, int]:
    return dict(Counter(counts) + Counter([key]))
