"""An incremental backup of one VM: bases, snapshot, disks, merges, undo."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from proxy.disks.disk import block_pool
from proxy.disks.qcow2_stream import Qcow2Stream
from proxy.errors import ProxyError
from proxy.formats.vhd_directory import Compression
from proxy.jobs.bases import Base, Choice, choose, describe
from proxy.jobs.copying import NoConsumers
from proxy.jobs.disk_copying import DiskFanOut, bottleneck, read_together
from proxy.jobs.disk_snapshots import list_disk_snapshots, list_disk_snapshots_of_others
from proxy.jobs.incremental_metadata import ExportedDisk, devices, exported_disks
from proxy.jobs.power import restarted, shut_down
from proxy.jobs.pruning import prune
from proxy.jobs.target import DiskPart, IncrementalCopy, Progress, now_ms, to_try_again
from proxy.jobs.undo import undo_step
from proxy.jobs.vm_backup import DESTROY_SECONDS, VmBackup, shuts_down, snapshot
from proxy.runtime.deadlines import undo_within
from proxy.xapi import cbt, ownership, vms
from proxy.xapi.migration import block_migration
from proxy.xapi.snapshots import NO_BACKUP
from proxy.xapi.vdi_export import ExportOptions, StepDown, VdiExport, export_vdi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from proxy.disks.disk import RandomDisk
    from proxy.jobs.disk_snapshots import Group
    from proxy.jobs.target import IncrementalWriter, Target
    from proxy.runtime.buffers import BufferPool
    from proxy.tasks import Task

_SETTLE_SECONDS = 600.0
_BUFFERS = 10
"""Of 2 MiB, per VM over all its disks: four read ahead, the others in codecs and on disks."""


async def back_up(task: Task, backup: VmBackup, targets: Sequence[Target]) -> list[str]:
    """One attempt; the caller holds the targets' locks.  Returns the ids of targets that failed.

    Raises when the VM has no backup from this attempt at all.  After a failure or a cancel
    the pool is as before: the new snapshot is gone and the base of the next run is where it
    was, so that the next run is a delta.  Once a target has its backup, its snapshot stays as
    the next base, also when the run is cancelled then.
    """
    for target in targets:
        await target.clean(task, merge=True)
    attempt = _Attempt(task, backup, targets)
    broken: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await attempt.run(nursery)
        except Exception as error:  # noqa: BLE001  raised below, when the targets have ended
            broken = error
        finally:
            attempt.finish()
    if broken is not None and not isinstance(broken, NoConsumers):
        raise broken
    failed = attempt.outcome()  # raises why no target was left
    if broken is not None:
        raise broken
    return failed


class _Attempt:
    """One attempt at one VM."""

    def __init__(self, task: Task, backup: VmBackup, targets: Sequence[Target]) -> None:
        self._task = task
        self._backup = backup
        self._targets = targets
        self._xapi = backup.xapi
        self._errors: dict[str, Exception] = {}
        self._released = trio.Event()
        """The pool's side is done: targets clean, and end."""
        self._ended: dict[str, trio.Event] = {target.id: trio.Event() for target in targets}
        """Set when a target has its backup, or failed."""
        self._runs: list[IncrementalWriter] = []
        self._fan_outs: list[DiskFanOut] = []
        self._stored = backup.stored
        self._ways: dict[str, dict[str, Any]] = {}
        self._exported: list[ExportedDisk] = []
        self._lengths: dict[str, int] = {}

    def outcome(self) -> list[str]:
        """The ids of the targets that are to be tried again; raises when all failed."""
        return to_try_again(
            self._errors, self._stored, len(self._targets), step="writer.transfer()"
        )

    def finish(self) -> None:
        """Let the targets end; what is not complete by now never will be."""
        for run in self._runs:
            run.end(complete=False)
        self._released.set()

    # -- on the pool -------------------------------------------------------------------------

    async def run(self, nursery: trio.Nursery) -> None:
        """The part of the attempt during which the VM must not move."""
        backup, xapi = self._backup, self._xapi
        async with block_migration(xapi, backup.vm_ref):
            groups = await list_disk_snapshots(xapi, backup.vm, backup.job.id)
            disks = [
                vdi["uuid"]
                for _, _, vdi in await vms.disks(xapi, backup.vm)
                if NO_BACKUP not in vdi.get("name_label", "")
            ]
            choices = await choose(
                disks,
                groups,
                self._targets,
                full_interval=int(backup.settings.full_interval),
                others=await self._snapshots_of_others(),
            )
            await ownership.reset_keys(xapi, backup.vm_ref)
            await prune(backup, include_unfinished=True)
            off = shuts_down(backup)
            async with restarted(self._task, backup, needed=off) as start_now:
                if off:
                    await shut_down(backup)
                if backup.settings.cbt_destroy_snapshot_data:
                    await self._enable_cbt()
                async with self._snapshot(groups) as ref:
                    if backup.settings.offline_snapshot:
                        # No reason to lose the backup: it is tried again at the end.
                        with contextlib.suppress(ProxyError):
                            await start_now()
                    await self._export(nursery, ref, choices)
                if self._stored:
                    with undo_within("pruning the snapshots", DESTROY_SECONDS):
                        await prune(backup)
                    await self._drop_data(ref)

    async def _snapshots_of_others(self) -> list[Group]:
        """Only where they can serve: reading them costs calls."""
        if len(self._targets) != 1 or not self._targets[0].knows_content:
            return []
        backup = self._backup
        return await list_disk_snapshots_of_others(self._xapi, backup.vm, backup.job.id)

    @contextlib.asynccontextmanager
    async def _snapshot(self, groups: Sequence[Group]) -> AsyncIterator[str]:
        """The snapshot for the block; it stays as the next base if a target has its backup."""
        async with snapshot(
            self._task,
            self._backup,
            newer_than=groups[-1][0].datetime if groups else "",
            keep=lambda: bool(self._stored),
        ) as ref:
            try:
                yield ref
            finally:
                await self._settle()
                if self._stored:
                    async with undo_step("mark the snapshot as exported", DESTROY_SECONDS):
                        await self._mark_exported(ref)
            if not self._stored:
                self.outcome()  # raises: the snapshot is nobody's base
                raise NoConsumers

    async def _settle(self) -> None:
        """Know of every target whether it has its backup.

        One that is writing its metadata when the run is cancelled goes on to the outcome: whether
        the snapshot is a base is not known before.
        """
        async with undo_step("wait for the targets", _SETTLE_SECONDS):
            for run in self._runs:
                run.end(complete=False)
                await self._ended[run.id].wait()

    async def _mark_exported(self, ref: str) -> None:
        """Make the snapshot the base of the next run; each disk knows the length of its chain."""
        for disk in self._exported:
            if not disk.is_memory:
                await self._xapi.update_map(
                    "VDI",
                    disk.ref,
                    "other_config",
                    {
                        ownership.DELTA_CHAIN_LENGTH: str(self._lengths.get(disk.ref, 0)),
                        ownership.EXPORTED: "true",
                    },
                )
        longest = max(self._lengths.values(), default=0)
        await self._xapi.update_map(
            "VM",
            ref,
            "other_config",
            {ownership.DELTA_CHAIN_LENGTH: str(longest), ownership.EXPORTED: "true"},
        )

    async def _enable_cbt(self) -> None:
        for _, ref, _ in await vms.disks(self._xapi, self._backup.vm):
            try:
                await cbt.enable_cbt(self._xapi, ref)
            except ProxyError as error:
                self._task.info("couldn't enable CBT", {"vdiRef": ref, "error": error.message})

    async def _drop_data(self, ref: str) -> None:
        """Keep of the snapshot only what changed since, if the next run can do with that."""
        settings = self._backup.settings
        if not settings.cbt_destroy_snapshot_data or settings.snapshot_retention != 0:
            return
        disks = [disk for disk in self._exported if not disk.is_memory]
        ways = {way.get("via") for way in self._ways.values()}
        if not disks or not ways <= {"nbd", "nbd+cbt"}:
            self._task.info(
                "snapshot data is kept: the next run may need it", {"ways": sorted(map(str, ways))}
            )
            return
        self._task.info("will delete snapshot data")
        await self._xapi.call("VM.destroy", ref)
        for disk in disks:
            try:
                await cbt.destroy_data(self._xapi, disk.ref)
                self._task.info("Snapshot data has been deleted", {"vdiRef": disk.ref})
            except ProxyError as error:
                self._task.warning(
                    "Couldn't delete snapshot data", {"error": error.message, "vdiRef": disk.ref}
                )

    # -- copies ------------------------------------------------------------------------------

    async def _export(self, nursery: trio.Nursery, ref: str, choices: Mapping[str, Choice]) -> None:
        """Read every disk once into every target, and wait until each has its backup or failed."""
        backup = self._backup
        record = await self._xapi.record("VM", ref)
        self._exported = await exported_disks(self._xapi, record)
        copy = self._copy(choices)
        is_full = not any(isinstance(choice, Base) for choice in choices.values())
        for target in self._targets:
            run = target.incremental(copy)
            self._runs.append(run)
            await nursery.start(self._one_target, target, run, is_full)
        await self._read_disks(copy, choices)
        bases = {
            disk.ref: choice.snapshot.uuid
            for disk in self._exported
            if isinstance(choice := choices.get(disk.source_uuid), Base)
            and copy.is_differencing[disk.ref]
        }
        copy.metadata = {
            "includeNonNbdQcow2Fix": True,
            "isVhdDifferencing": copy.is_differencing,
            "jobId": backup.job.id,
            "scheduleId": backup.job.schedule_id,
            "timestamp": copy.timestamp,
            "vm": backup.vm,
            "vmSnapshot": record,
            **await devices(self._xapi, backup.uuid, record, self._exported, bases),
        }
        self._tell_ways(choices, is_full=is_full)
        for run in self._runs:
            run.end(complete=True)
        for ended in self._ended.values():
            await ended.wait()

    def _copy(self, choices: Mapping[str, Choice]) -> IncrementalCopy:
        backup = self._backup
        deltas = [disk for disk, choice in choices.items() if isinstance(choice, Base)]
        return IncrementalCopy(
            vm_uuid=backup.uuid,
            job_id=backup.job.id,
            schedule_id=backup.job.schedule_id,
            timestamp=now_ms(),
            newest_parent=max(target.sorts_behind(deltas) for target in self._targets),
            stored=self._stored,
            codec=Compression(backup.defaults.vhd_directory_compression),
            progress=Progress(len(self._exported)),
            bottleneck=self._bottleneck,
        )

    async def _one_target(
        self,
        target: Target,
        run: IncrementalWriter,
        is_full: bool,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        ended = self._ended[run.id]
        started = False
        try:
            async with target.export(self._task, is_full=is_full) as export:
                task_status.started()
                started = True
                try:
                    await run.run(export)
                finally:
                    run.leave()
                    ended.set()
                await target.check_health(export, self._backup)
                await self._released.wait()
                await target.clean(export, merge=True)
        except Exception as error:
            self._errors[run.id] = error
            if not started:
                raise
        finally:
            ended.set()

    async def _read_disks(self, copy: IncrementalCopy, choices: Mapping[str, Choice]) -> None:
        """Every disk, several at once.  Raises ``NoConsumers`` when no target is left."""
        pool = block_pool(_BUFFERS)
        await read_together(
            [
                partial(self._read_disk, copy, pool, disk, choices.get(disk.source_uuid))
                for disk in self._exported
            ],
            self._fan_outs,
            at_once=int(self._backup.settings.disk_per_vm_concurrency),
        )

    async def _read_disk(
        self,
        copy: IncrementalCopy,
        pool: BufferPool,
        exported: ExportedDisk,
        choice: Choice | None,
    ) -> None:
        base = choice if isinstance(choice, Base) else None
        defaults, settings = self._backup.defaults, self._backup.settings
        prefer = defaults.prefer_nbd if settings.prefer_nbd is None else settings.prefer_nbd
        options = ExportOptions(
            # the memory of a suspended VM is read once, front to back
            prefer_nbd=prefer and not exported.is_memory,
            nbd_connections=max(1, int(settings.nbd_concurrency)),
        )
        if all(run.failed for run in self._runs):
            raise NoConsumers
        async with contextlib.AsyncExitStack() as stack:
            opened = await self._open(stack, exported, base, options)
            self._note(copy, exported, base, opened)
            fan_out = DiskFanOut(opened.disk, pool.count, self._backup.rate)
            self._fan_outs.append(fan_out)
            for run in self._runs:
                if not run.failed:
                    run.give(DiskPart(exported, opened.disk, fan_out.consumer()))
            await fan_out.run(pool)

    async def _open(
        self,
        stack: contextlib.AsyncExitStack,
        exported: ExportedDisk,
        base: Base | None,
        options: ExportOptions,
    ) -> VdiExport:
        """The disk's content; the difference to ``base`` if it can be had and be used."""
        export = partial(export_vdi, self._xapi, exported.ref, exported.vdi)
        if base is None:
            return await stack.enter_async_context(export(None, options))
        async with contextlib.AsyncExitStack() as delta:
            opened = await delta.enter_async_context(export(base.snapshot.ref, options))
            parts = opened.disk if isinstance(opened.disk, Qcow2Stream) else None
            if parts is not None and parts.partial:
                # Its clusters are smaller than our blocks: the rest of a block is the base's.
                parts.parent = await self._open_base(exported.source_uuid, delta)
            if parts is None or not parts.partial or parts.parent is not None:
                await stack.enter_async_context(delta.pop_all())
                return opened
        whole = await stack.enter_async_context(export(None, options))
        why = "no target can read the base, which the delta has only parts of blocks of"
        whole.steps_down.insert(0, StepDown("delta", "ENOBASE", why))
        return whole

    async def _open_base(self, disk: str, stack: contextlib.AsyncExitStack) -> RandomDisk | None:
        """The whole content of a base, from the first target where it can be read."""
        for target in self._targets:
            opening = target.open_base(disk)
            if opening is not None:
                return await stack.enter_async_context(opening)
        return None

    def _note(
        self,
        copy: IncrementalCopy,
        exported: ExportedDisk,
        base: Base | None,
        opened: VdiExport,
    ) -> None:
        differencing = opened.disk.is_differencing
        copy.is_differencing[exported.ref] = differencing
        copy.progress.add(opened.disk)
        self._lengths[exported.ref] = (
            base.snapshot.chain_length + 1 if base is not None and differencing else 0
        )
        if opened.way != "stream" and not any(
            way["via"] != "stream" for way in self._ways.values()
        ):
            self._task.info("Transfer data using NBD")
        for step in opened.steps_down:
            if step.way == "nbd":
                self._task.warning(
                    "can't connect through NBD, fall back to stream export", asdict(step)
                )
            elif step.way == "delta":
                assert base is not None
                self._task.warning(
                    f"can't compute delta {exported.ref} from {base.snapshot.ref},"
                    " fall back to a full",
                    asdict(step),
                )
        self._ways[exported.source_uuid] = {
            "got": "delta" if differencing else "full",
            "via": opened.way,
            **(
                {"steps": [asdict(step) for step in opened.steps_down]} if opened.steps_down else {}
            ),
        }

    def _tell_ways(self, choices: Mapping[str, Choice], *, is_full: bool) -> None:
        """How each disk was read and why; a delta backup with a full disk warns, as upstream."""
        self._task.info("disks", describe(choices, self._ways))
        if is_full:
            return
        for disk in self._exported:
            if not disk.is_memory and self._ways[disk.source_uuid]["got"] == "full":
                self._task.warning("Backup fell back to a full", {"disk": disk.source_uuid})

    def _bottleneck(self) -> str:
        return bottleneck(self._fan_outs, encodes=any(target.encodes for target in self._targets))
