"""What a run over VMs writes to: remotes and SRs behind one interface.

A :class:`Destination` is open for the whole run.  For each attempt at a VM it gives a
:class:`Target`, with the VM's settings and, on a remote, the lock of the VM's directory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from proxy.errors import Canceled, Many
from proxy.formats.vhd import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import Disk, RandomDisk
    from proxy.formats.vhd_directory import Compression
    from proxy.jobs.copying import Consumer
    from proxy.jobs.disk_copying import DiskConsumer
    from proxy.jobs.disk_snapshots import DiskSnapshot
    from proxy.jobs.incremental_metadata import ExportedDisk
    from proxy.jobs.settings import Settings
    from proxy.jobs.vm_backup import VmBackup
    from proxy.tasks import Task


class Destination(Protocol):
    """A remote or an SR, open for a run; for any number of VMs at once."""

    @property
    def id(self) -> str: ...

    @property
    def properties(self) -> Mapping[str, Any]:
        """Of the ``export`` tasks: what the log says of it."""
        ...

    @property
    def export_ids(self) -> Collection[str]:
        """The ids that its ``export`` tasks can have."""
        ...

    def retention(self, settings: Settings) -> float:
        """How many backups are to be kept here; 0: none are made."""
        ...

    def target(
        self, task: Task, backup: VmBackup, settings: Settings
    ) -> AbstractAsyncContextManager[Target]:
        """For one attempt at one VM.  ``task`` hears of waits.

        Raises ``ProxyError`` when the attempt cannot have it; on a cancel nothing is held.
        """
        ...


class Target(Protocol):
    """A destination with one VM in one attempt."""

    id: str
    """What ``stored`` receives: its destination's id."""

    @property
    def settings(self) -> Settings: ...

    @property
    def encodes(self) -> bool:
        """Whether what it stores is compressed here: then a slow target may be a slow CPU."""
        ...

    @property
    def stores_md5(self) -> bool:
        """Whether a full backup here asks for the MD5 of its stream."""
        ...

    async def space(self) -> int | None:
        """Free bytes; ``None`` where there is no limit."""
        ...

    def count_with(self, others: Sequence[Target]) -> None:
        """Let retention count, and remove, what is on ``others`` too: of the same kind."""
        ...

    def export(self, task: Task, *, is_full: bool) -> AbstractAsyncContextManager[Task]:
        """Its ``export`` task below ``task``, which tells what was done here."""
        ...

    async def clean(self, parent: Task, *, merge: bool) -> None:
        """Remove what no backup needs; a failure stands in the log and stops nothing."""
        ...

    async def write_full(self, export: Task, copy: FullCopy, consumer: Consumer) -> None:
        """Store one full backup inside its ``export`` task.

        Old entries are counted before the new one and removed after it, or before it with
        ``deleteFirst``.  Until it is whole a failure or a cancel leaves nothing.
        """
        ...

    @property
    def knows_content(self) -> bool:
        """Whether :meth:`find_bases` can look ``by_content``."""
        ...

    async def find_bases(
        self, snapshots: Mapping[str, DiskSnapshot], *, by_content: bool = False
    ) -> Mapping[str, Refusal]:
        """Of which live disks (uuids) no delta since their snapshot can be stored here.

        The target remembers what it found for the others, for the deltas that may come; that
        they may come does not mean that they will.  With ``by_content`` whoever brought the
        content of a snapshot here will do; otherwise only this job.
        """
        ...

    def sorts_behind(self, disks: Collection[str]) -> str:
        """The date name that a backup with deltas of ``disks`` must sort behind; may be empty."""
        ...

    def open_base(self, disk: str) -> AbstractAsyncContextManager[RandomDisk] | None:
        """The whole content of the base of ``disk``; ``None`` where it cannot be read."""
        ...

    def incremental(self, copy: IncrementalCopy) -> IncrementalWriter:
        """The writer of one incremental backup."""
        ...

    async def check_health(self, parent: Task, backup: VmBackup, **properties: Any) -> None:
        """Boot what was stored here in this attempt, if its settings ask for it.

        A task below ``parent``, with ``properties``; what goes wrong stands in the log only.
        """
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a target cannot take a delta: a stable code, a sentence, and what was seen."""

    reason: str
    message: str
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class FullCopy:
    """What all targets of one full backup have in common."""

    vm_uuid: str
    job_id: str
    schedule_id: str
    timestamp: int
    """Milliseconds: when the export's stream was ready."""
    vm: Mapping[str, Any]
    exported: Mapping[str, Any]
    estimate: int | None
    stored: set[str]
    """Receives the id of each target that has its backup, even if its task fails later."""
    digest: Callable[[], bytes]
    """MD5 of the whole stream, once it has ended; for targets of which ``stores_md5`` says
    that they ask."""
    bottleneck: Callable[[], str]

    def tell(self, transfer: Task, size: int) -> None:
        """``size`` bytes are stored: the progress of a target's ``transfer``."""
        total = None if self.estimate is None else max(self.estimate, size)
        transfer.progress(size, total, estimated=True, bottleneck=self.bottleneck())


@dataclass(frozen=True, slots=True)
class DiskPart:
    """One disk on its way to one target: a delta of its base there, if it is differencing."""

    exported: ExportedDisk
    disk: Disk
    consumer: DiskConsumer


@dataclass(slots=True)
class Progress:
    """Bytes of all disks of a VM: known as each is opened."""

    disks: int
    opened: int = 0
    total: int = 0

    def add(self, disk: Disk) -> None:
        self.opened += 1
        self.total += len(disk.blocks) * BLOCK_SIZE

    @property
    def is_estimated(self) -> bool:
        return self.opened < self.disks


@dataclass(slots=True)
class IncrementalCopy:
    """What all targets of one incremental backup have in common."""

    vm_uuid: str
    job_id: str
    schedule_id: str
    timestamp: int
    """Milliseconds."""
    newest_parent: str
    """Date name of the youngest parent of any disk on any target: ours must sort behind it."""
    stored: set[str]
    """Receives the id of each target that has its backup, even if its task fails later."""
    codec: Compression
    """For the blocks of disks without parent, where the target keeps directories."""
    progress: Progress
    bottleneck: Callable[[], str]
    metadata: Mapping[str, Any] | None = None
    """Without the fields that differ between targets; set before the parts end."""
    is_differencing: dict[str, bool] = field(default_factory=dict[str, bool])
    """By the reference of each disk, as it was really exported."""


class IncrementalWriter(Protocol):
    """Stores the disks that it is given, and then makes a backup of them."""

    @property
    def id(self) -> str: ...

    @property
    def failed(self) -> bool: ...

    def give(self, part: DiskPart) -> None:
        """One more disk.  Its consumer is left when this target fails."""
        ...

    def end(self, *, complete: bool) -> None:
        """No more disks; unless ``complete`` nothing becomes a backup.  The first call counts."""
        ...

    async def run(self, export: Task) -> None:
        """Retention, transfer, metadata inside the ``export`` task.

        Until the backup is whole a failure or a cancel leaves nothing of it.
        """
        ...

    def leave(self) -> None:
        """Give back what waits for a target that has ended."""
        ...


def to_try_again(
    errors: Mapping[str, Exception], stored: Collection[str], targets: int, *, step: str
) -> list[str]:
    """The ids of the targets that failed and are worth another attempt.

    That is those without backup, but not one that somebody cancelled.  Raises when all of the
    ``targets`` failed, if only after they had their backup: the only one's error, ``Canceled``
    when each was cancelled, else ``Many`` with upstream's name of the ``step``.
    """
    if len(errors) < targets:
        return [
            target_id
            for target_id, error in errors.items()
            if target_id not in stored and not isinstance(error, Canceled)
        ]
    if targets == 1:
        raise next(iter(errors.values()))
    if all(isinstance(error, Canceled) for error in errors.values()):
        raise Canceled("every target was canceled")
    failed = Many.all_targets(step, list(errors.values()))
    failed.canceled = frozenset(key for key, one in errors.items() if isinstance(one, Canceled))
    raise failed


def none_left(errors: Sequence[Exception]) -> Exception:
    """Why there is no target for an attempt: the only reason, or all, with upstream's message."""
    return errors[0] if len(errors) == 1 else Many.all_targets("writer.beforeBackup()", errors)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
