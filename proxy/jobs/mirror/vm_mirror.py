"""One VM in one mirror run: locks, plan, copies, retention, retries."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import trio

from proxy.errors import Busy, Canceled, Many, ProxyError, Unreachable
from proxy.jobs import health_check
from proxy.jobs.attempts import try_targets
from proxy.jobs.distribution import roomiest
from proxy.jobs.mirror.archives import copy_archive
from proxy.jobs.mirror.deltas import copy_delta
from proxy.jobs.mirror.locked import Place, lock_everywhere
from proxy.jobs.mirror.planning import plan
from proxy.jobs.mirror.source import Source, look
from proxy.jobs.mirror.target import MirrorTarget
from proxy.jobs.opening import failed
from proxy.jobs.remote_target import RemoteTarget
from proxy.jobs.target import to_try_again
from proxy.repository import list_vm_backups, read_backup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.jobs.health_check import HealthChecks
    from proxy.jobs.mirror.deltas import CopyOptions
    from proxy.jobs.mirror.mirror_job import MirrorJob, MirrorSettings
    from proxy.jobs.mirror.source import Found
    from proxy.remotes import Lock, Remote
    from proxy.repository import Backup
    from proxy.tasks import Task


class VmMirror:
    """One VM in one run, over all attempts."""

    def __init__(
        self,
        task: Task,
        job: MirrorJob,
        vm_uuid: str,
        source: Remote,
        remotes: Mapping[str, Remote],
        *,
        run_id: str,
        options: CopyOptions,
        checks: HealthChecks,
    ) -> None:
        self._task = task
        self._job = job
        self._vm_uuid = vm_uuid
        self._source = source
        self._remotes = remotes
        self._run_id = run_id
        self._options = options
        self._checks = checks
        self._done: set[str] = set()
        """Remotes that have everything."""
        self._attempts = 0
        self._left: list[Exception] = []
        """What went wrong in the last attempt."""
        self._avoided: set[str] = set()
        """Remotes that failed, where any other would do."""
        self._told: set[str] = set()
        """Unreadable metadata that the log speaks of."""

    async def run(self) -> None:
        """Copy what each remote lacks; try again where it failed.

        Raises when a remote does not have everything that it is to have: beside exports of other
        backups that went well, a failed one would not stand out in Xen Orchestra.

        A cancel leaves each backup whole or not there at all; the next run goes on from that.
        """
        settings = self._job.vm(self._vm_uuid)
        wanted: dict[str, MirrorSettings] = {}
        for remote_id in self._remotes:
            of_remote = self._job.target(self._vm_uuid, remote_id)
            if of_remote is not None:
                wanted[remote_id] = of_remote
        if not wanted:
            self._task.info("no remote is to keep backups of this VM")
            return
        tries = settings.n_retries_vm_backup_failures + 1
        message = "Retry the VM mirror backup due to an error"
        if self._job.run.distribute_backups and len(wanted) > 1:

            async def attempt(number: int, missing: Mapping[str, None]) -> list[str]:
                del missing
                await self._attempt_one_of(number, wanted)
                return []

            await try_targets(
                self._task,
                {"+".join(wanted): None},
                attempt,
                tries=tries,
                has=lambda _: bool(self._done),
                message=message,
            )
            self._refuse_left()
            return
        await try_targets(
            self._task,
            wanted,
            self._attempt,
            tries=tries,
            has=lambda target: target in self._done,
            message=message,
        )
        self._refuse_left()

    # -- one attempt -------------------------------------------------------------------------

    async def _attempt(self, number: int, wanted: Mapping[str, MirrorSettings]) -> list[str]:
        self._attempts = number
        errors: dict[str, Exception] = {}
        async with contextlib.AsyncExitStack() as stack:
            source, targets = await self._lock_all(stack, wanted, errors)
            if targets:
                await self._mirror(source, targets)
        for target in targets:
            if target.errors:
                errors[target.id] = target.errors[0]
        self._left = list(errors.values())
        return to_try_again(errors, self._done, len(wanted), step="writer.transfer()")

    def _refuse_left(self) -> None:
        """Raise what the last attempt left, if anything."""
        real = [error for error in self._left if not isinstance(error, Canceled)]
        left = real or self._left
        if len(left) == 1:
            raise left[0]
        if left:
            raise Many(f"{len(left)} remotes do not have everything", left)
        failures = list(self._task.failures())
        if self._attempts > 1 and failures:
            # After a retry Xen Orchestra takes any task of that name that went well for its repeat.
            raise ProxyError(f"not all went well: {'; '.join(failures[:3])}")

    async def _attempt_one_of(self, number: int, wanted: Mapping[str, MirrorSettings]) -> None:
        """``distributeBackups``: all are held, one gets what is missing, retention counts on all.

        A chain goes on where its youngest backup is; what begins, begins where most room is.
        """
        self._attempts = number
        errors: dict[str, Exception] = {}
        async with contextlib.AsyncExitStack() as stack:
            source, members = await self._lock_all(stack, wanted, errors)
            if not members:
                to_try_again(errors, self._done, len(wanted), step="writer.beforeBackup()")
                return
            chosen = await self._choose(members)
            chosen.neighbours = [each for each in members if each is not chosen]
            try:
                await self._mirror(source, [chosen])
            finally:
                if chosen.id not in self._done:
                    self._avoided.add(chosen.id)
            for other in chosen.neighbours:
                # as Xen Orchestra shows them: without a transfer
                async with other.target.export(self._task, is_full=self._is_full) as export:
                    await other.target.clean(export, merge=not self._is_full)
        if chosen.errors:
            raise chosen.errors[0]

    async def _choose(self, members: Sequence[MirrorTarget]) -> MirrorTarget:
        """Those where an attempt of this run failed are taken only if there is no other."""
        candidates = [each for each in members if each.id not in self._avoided] or list(members)
        if not self._is_full:
            newest: dict[float, MirrorTarget] = {}
            for each in candidates:
                backups = await list_vm_backups(each.remote, self._vm_uuid)
                for backup in each.retention.entries(backups):
                    newest[backup.timestamp] = each
            if newest:
                return newest[max(newest)]
        roomy = await roomiest([each.target for each in candidates])
        return next(each for each in candidates if each.target is roomy)

    @property
    def _is_full(self) -> bool:
        return self._job.mode == "full"

    async def _mirror(self, source: Source, targets: Sequence[MirrorTarget]) -> None:
        if not self._is_full:
            # chains must be whole before they can be extended
            for target in targets:
                await target.target.clean(self._task, merge=True)
        found = await look(source.remote, self._vm_uuid, self._job.mode, self._job.filter)
        self.tell_unreadable(found)
        for target in targets:
            await self._plan(target, found)
        if not any(target.wanted or target.errors for target in targets):
            self._task.info("No new data to upload for this VM")
        try:
            await self._transfer(source, targets)
            await self._try_out(targets)
        finally:
            self._done |= {each.id for each in targets if not each.wanted and not each.is_lost}
        # Not after a cancel or a time limit: then nothing more is begun.
        if not self._task.cancel_requested:
            for target in targets:
                if self._is_full or target.is_changed:
                    await target.target.clean(self._task, merge=not self._is_full)

    def tell_unreadable(self, found: Found) -> None:
        for name, error in found.unreadable.items():
            if name not in self._told:
                self._told.add(name)
                self._task.warning(
                    "a backup of the source cannot be read and is not copied",
                    {"path": f"/xo-vm-backups/{self._vm_uuid}/{name}", "error": error.message},
                )

    # -- locks -------------------------------------------------------------------------------

    async def _lock_all(
        self,
        stack: contextlib.AsyncExitStack,
        wanted: Mapping[str, MirrorSettings],
        errors: dict[str, Exception],
    ) -> tuple[Source, list[MirrorTarget]]:
        """Hold the VM's directory on the source and on each remote.

        A remote that cannot be had is a failed export, and in ``errors``; without the source
        nothing is done.
        """
        source_id = self._job.source_id
        places = {
            key: Place(self._remotes[key], settings.get_remote_timeout / 1000)
            for key, settings in wanted.items()
        }
        places[source_id] = Place(self._source, self._job.run.get_remote_timeout / 1000)
        locks, lost = await lock_everywhere(
            stack,
            places,
            self._vm_uuid,
            needed=source_id,
            owner=self._run_id,
            task=self._task,
        )
        for key, error in lost.items():
            errors[key] = error
            await failed(self._failing_export(key), error)
        source = Source(source_id, self._source, locks[source_id])
        return source, [
            self._target(key, settings, locks[key])
            for key, settings in wanted.items()
            if key in locks
        ]

    def _target(self, remote_id: str, settings: MirrorSettings, lock: Lock) -> MirrorTarget:
        remote = self._remotes[remote_id]
        target = RemoteTarget(
            remote_id,
            remote,
            settings.writing(),
            lock,
            vm_uuid=self._vm_uuid,
            job_id=self._job.id,
            damage=self._options.damage(remote),
        )
        return MirrorTarget(target, settings, self._job.retention(settings))

    def _failing_export(self, remote_id: str) -> contextlib.AbstractAsyncContextManager[Task]:
        """Of a remote to which nothing could be begun."""
        return self._task.child("export", id=remote_id, isFull=self._is_full, type="remote")

    # -- copies ------------------------------------------------------------------------------

    async def _plan(self, target: MirrorTarget, found: Found) -> None:
        try:
            present = await target.present()
            backups = [each.backup for each in present]
            planned = plan(found.matching, backups, target.retention)
            if found.matching and not planned.missing:
                # what a run that was cut off in between has left
                await target.remove(self._task, planned.expiring, present)
            target.wanted = planned.missing
        except ProxyError as error:
            await self._fail(target, error)

    async def _make_room(self, target: MirrorTarget, backup: Backup) -> None:
        """Remove what ``backup`` alone makes too old: if it fails, the others are still there."""
        try:
            present = await target.present()
            backups = [each.backup for each in present]
            expiring = plan([backup], backups, target.retention).expiring
            await target.remove(self._task, expiring, present)
        except ProxyError as error:
            await self._fail(target, error)

    async def _fail(self, target: MirrorTarget, error: ProxyError) -> None:
        """It cannot go on, and no export says so."""
        target.is_lost = True
        target.errors.append(error)
        await failed(self._failing_export(target.id), error)

    async def _transfer(self, source: Source, targets: Sequence[MirrorTarget]) -> None:
        """Oldest first: each backup to all remotes that lack it and have not failed."""
        wanted = {backup.id: backup for target in targets for backup in target.wanted}
        ordered = sorted(wanted.values(), key=lambda backup: backup.timestamp)
        for number, backup in enumerate(ordered):
            for target in targets:
                if target.settings.delete_first and not target.is_lost and target.wants(backup):
                    await self._make_room(target, backup)
            takers = [each for each in targets if not each.is_lost and each.wants(backup)]
            if takers:
                error = await self._copy(source, backup, takers)
                if isinstance(error, Unreachable | Busy):
                    # It is the source that fails, not this backup of it.
                    for target in targets:
                        if target.wanted and not target.errors:
                            await self._fail(target, error)
                    return
            self._task.set_property("progress", (number + 1) * 100 // len(ordered))

    async def _copy(
        self, source: Source, backup: Backup, takers: Sequence[MirrorTarget]
    ) -> ProxyError | None:
        """Copy one backup; what is wrong with it on the source, if anything is.

        Then every taker's export has failed with it, and later backups may still be copied.
        """
        before = {target.id: len(target.errors) for target in takers}
        broken: ProxyError | None = None
        try:
            record = await read_backup(source.remote, backup.id)
            if self._is_full:
                rate = self._options.rate
                await copy_archive(self._task, self._job, source, record, takers, rate)
            else:
                await copy_delta(self._task, self._job, source, record, takers, self._options)
        except ProxyError as error:
            broken = error
        for target in takers:
            news = target.errors[before[target.id] :]
            if any(error is not broken for error in news):
                target.is_lost = True
            elif broken is not None and not news and target.wants(backup):
                target.errors.append(broken)
                await failed(self._failing_export(target.id), broken)
        return broken

    async def _try_out(self, targets: Sequence[MirrorTarget]) -> None:
        """The health check of the last backup that each remote got, if its settings ask for one.

        What goes wrong is in the log of the check: the backups are there.
        """
        asked = [each for each in targets if each.target.settings.health_check_sr is not None]
        if asked and all(target.newest is None for target in asked):
            self._task.info("No healthCheck needed because no data was transferred.")
        async with trio.open_nursery() as nursery:
            for target in asked:
                newest = target.newest
                if newest is None:
                    continue
                check = health_check.wanted(target.target.settings, newest.vm.tags or [])
                if check is None:
                    nursery.start_soon(health_check.tell_filtered, self._task)
                else:
                    nursery.start_soon(
                        partial(
                            self._checks.of_backup,
                            self._task,
                            check,
                            target.remote,
                            newest.id,
                            id=target.id,
                        )
                    )
