"""Several destinations of which each VM uses one: ``distributeBackups`` and replications alike.

A chain goes on where it is; a new one begins where there is most room.  All members are held
for the VM, because retention counts over all of them.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

from proxy.errors import ProxyError, Refused
from proxy.jobs.opening import failed
from proxy.jobs.target import none_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import RandomDisk
    from proxy.jobs.copying import Consumer
    from proxy.jobs.disk_snapshots import DiskSnapshot
    from proxy.jobs.settings import Settings
    from proxy.jobs.target import (
        Destination,
        FullCopy,
        IncrementalCopy,
        IncrementalWriter,
        Refusal,
        Target,
    )
    from proxy.jobs.vm_backup import VmBackup
    from proxy.tasks import Task


class DistributedDestination:
    """``members`` are all remotes, or all SRs; more than one."""

    def __init__(self, members: Sequence[Destination]) -> None:
        self._members = members
        self.id = "+".join(member.id for member in members)
        self._failed: dict[str, set[str]] = {}
        """By VM: the members where an attempt of this run failed; they are tried last."""

    @property
    def properties(self) -> Mapping[str, Any]:
        return {**self._members[0].properties, "id": self.id}

    @property
    def export_ids(self) -> Collection[str]:
        return [each for member in self._members for each in member.export_ids]

    def retention(self, settings: Settings) -> float:
        return self._members[0].retention(settings)

    @contextlib.asynccontextmanager
    async def target(
        self, task: Task, backup: VmBackup, settings: Settings
    ) -> AsyncIterator[DistributedTarget]:
        """With every member that keeps backups of the VM; one that cannot be had is a failed
        export, and the others go on."""
        errors: list[Exception] = []
        targets: list[Target] = []
        free: dict[str, int | None] = {}
        async with contextlib.AsyncExitStack() as stack:
            for member in self._members:
                there = backup.job.settings.target(backup.uuid, member.id)
                if member.retention(there) <= 0:
                    continue
                try:
                    target = await stack.enter_async_context(member.target(task, backup, there))
                    # an SR has nothing to lock: only now is its pool asked anything
                    free[target.id] = await target.space()
                except ProxyError as error:
                    errors.append(error)
                    export = task.child("export", **member.properties, isFull=True)
                    await failed(export, error)
                    continue
                targets.append(target)
            if not targets:
                if errors:
                    raise none_left(errors)
                raise Refused("no target is left for this VM", code="ENOTARGET")
            avoided = self._failed.setdefault(backup.uuid, set())
            distributed = DistributedTarget(
                self.id, settings, targets, avoided, _with_most(targets, free, avoided)
            )
            try:
                yield distributed
            finally:
                if self.id not in backup.stored:
                    avoided.add(distributed.member)


async def roomiest(targets: Sequence[Target]) -> Target:
    """The one with most free space, any of those that have most; if none says, any.

    Raises ``Refused`` with upstream's message when some have a limit and others have none.
    """
    return _with_most(targets, {target.id: await target.space() for target in targets})


def _with_most(
    targets: Sequence[Target], free: Mapping[str, int | None], avoided: Collection[str] = ()
) -> Target:
    limited = {key: space for key, space in free.items() if space is not None and space > 0}
    if limited and len(limited) != len(free) and any(space is None for space in free.values()):
        raise Refused(
            "an Aggregate remote can't use a mix of limited and unlimited storages",
            code="EINVAL",
            data={"available": free},
        )
    candidates = _preferred(targets, avoided)
    most = max(limited.get(target.id, 0) for target in candidates)
    # evenly, where nothing tells them apart: nobody can foresee or steer it, nor needs to
    return random.choice(  # noqa: S311
        [target for target in candidates if limited.get(target.id, 0) == most]
    )


def _preferred(targets: Sequence[Target], avoided: Collection[str]) -> list[Target]:
    """Those whose ids are ``avoided`` only if there is no other."""
    return [target for target in targets if target.id not in avoided] or list(targets)


class DistributedTarget:
    """One VM on its one member.  The others take part in retention and are cleaned."""

    def __init__(
        self,
        target_id: str,
        settings: Settings,
        members: Sequence[Target],
        avoided: Collection[str],
        chosen: Target,
    ) -> None:
        self.id = target_id
        self.settings = settings
        self._members = members
        self._candidates = _preferred(members, avoided)
        self._export: Task | None = None
        self._incremental = False
        self._chosen = chosen
        self.member = chosen.id

    @property
    def encodes(self) -> bool:
        return self._chosen.encodes

    @property
    def stores_md5(self) -> bool:
        return self._chosen.stores_md5

    async def space(self) -> int | None:
        return await self._chosen.space()

    def count_with(self, others: Sequence[Target]) -> None:
        self._chosen.count_with(others)

    def _use(self) -> Target:
        """The member, which from now on speaks for all: it has the VM's backup, or nobody."""
        self._chosen.id = self.id
        self._chosen.count_with([one for one in self._members if one is not self._chosen])
        return self._chosen

    @contextlib.asynccontextmanager
    async def export(self, task: Task, *, is_full: bool) -> AsyncIterator[Task]:
        """The member's; then an ``export`` without transfer for each of the others."""
        async with self._chosen.export(task, is_full=is_full) as export:
            self._export = export
            yield export
        for member in self._members:
            if member is not self._chosen:
                async with member.export(task, is_full=is_full) as other:
                    if self._incremental:
                        await member.clean(other, merge=True)

    async def clean(self, parent: Task, *, merge: bool) -> None:
        """All; inside the member's own export only the member: the others come in theirs."""
        for member in self._members:
            if parent is not self._export or member is self._chosen:
                await member.clean(parent, merge=merge)

    async def check_health(self, parent: Task, backup: VmBackup, **properties: Any) -> None:
        """Its task is known by the member's id, as the export is: a retry keeps both by it."""
        known = {"id": self.member} if "id" in properties else {}
        await self._chosen.check_health(parent, backup, **{**properties, **known})

    async def write_full(self, export: Task, copy: FullCopy, consumer: Consumer) -> None:
        await self._use().write_full(export, copy, consumer)

    @property
    def knows_content(self) -> bool:
        """What another job brought to one of many says nothing about where a chain is."""
        return False

    async def find_bases(
        self, snapshots: Mapping[str, DiskSnapshot], *, by_content: bool = False
    ) -> Mapping[str, Refusal]:
        """The member that has most of them is chosen; where none has any, the choice stands.

        One where an attempt of this run failed has none, if there is any other: a chain that
        cannot be written to must not keep the VM from its backup.
        """
        refused: Mapping[str, Refusal] = {}
        fewest = len(snapshots)
        for member in self._candidates:
            there = await member.find_bases(snapshots)
            if len(there) < fewest:
                fewest, refused = len(there), there
                self._chosen, self.member = member, member.id
            elif fewest == len(snapshots):
                refused = there
        return refused

    def sorts_behind(self, disks: Collection[str]) -> str:
        """Over all members: retention counts by time."""
        return max(member.sorts_behind(disks) for member in self._members)

    def open_base(self, disk: str) -> AbstractAsyncContextManager[RandomDisk] | None:
        return self._chosen.open_base(disk)

    def incremental(self, copy: IncrementalCopy) -> IncrementalWriter:
        self._incremental = True
        return self._use().incremental(copy)
