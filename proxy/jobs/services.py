"""What the daemon's calls share: tasks, connections, the runs that are alive."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from proxy.errors import Busy, Refused
from proxy.jobs.incremental_restore import restore_incremental
from proxy.jobs.metadata_job import understand_metadata
from proxy.jobs.metadata_restore import read_configuration, restore_pool
from proxy.jobs.metadata_run import run_metadata_job
from proxy.jobs.mirror.mirror_job import understand_mirror
from proxy.jobs.mirror.mirror_run import run_mirror_job
from proxy.jobs.requests import BackupRequest, RestoreRequest, understand
from proxy.jobs.restore import restore_full
from proxy.jobs.sharing import Shared
from proxy.jobs.sweep import Sweeper, SweepRequest, run_sweep
from proxy.jobs.traffic import Traffic, told
from proxy.jobs.verify_run import VerifyRun
from proxy.jobs.vm_run import run_vm_job
from proxy.remotes.factory import RemoteOptions, opened_remote, refuse_missing
from proxy.remotes.unlocking import look, settle
from proxy.repository import backup_path, read_backup, read_metadata_backup, vm_directory
from proxy.repository.damage import DamageNotes
from proxy.repository.metadata_backup_paths import is_pool_backup, metadata_backup_path
from proxy.repository.verify import sample_of
from proxy.runtime import secrets
from proxy.xapi import Xapi, XapiOptions, connect
from proxy.xapi.ownership import Owner, acting_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from proxy.config import Config
    from proxy.jobs.metadata_job import MetadataJob
    from proxy.jobs.metadata_restore import MetadataRestoreRequest
    from proxy.jobs.mirror.mirror_job import MirrorJob
    from proxy.jobs.requests import VmJob
    from proxy.jobs.verify_run import VerifyRequest
    from proxy.remotes import Remote
    from proxy.tasks import Task, Tasks


class Services:
    """Made once by :func:`open_services`; safe for any number of tasks."""

    def __init__(self, config: Callable[[], Config], tasks: Tasks, nursery: trio.Nursery) -> None:
        self._config = config
        self.tasks = tasks
        self.nursery = nursery
        self._remotes: Shared[Remote] = Shared(nursery, self._delay)
        self._xapis: Shared[Xapi] = Shared(nursery, self._delay)
        self.traffic = Traffic()
        self.sweeper = Sweeper(tasks)
        self._live: dict[str, Task] = {}
        self._jobs: dict[str, Task] = {}
        self._accepting = True
        self._ended = trio.Event()

    @property
    def config(self) -> Config:
        """As it is now; a reload makes a new one."""
        return self._config()

    @property
    def datadir(self) -> Path:
        return self.config.datadir

    @property
    def installation(self) -> str:
        """Names this installation on what it makes on pools (promise I7)."""
        return self.tasks.installation

    def _delay(self) -> float:
        return self.config.resource_cache_delay

    # -- connections -------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def remote(
        self, spec: Mapping[str, Any], *, create: bool = True
    ) -> AsyncIterator[Remote]:
        """An open remote for the block; shared with whoever gives the same record.

        Unless ``create``, a directory that does not exist is ``NotFound`` and stays so, and an
        empty remote is not set up for its encryption key: who only looks makes nothing.
        """
        config = self.config
        options = RemoteOptions(
            disable_file_remotes=config.remotes.disable_file_remotes,
            mounts_dir=str(config.remote_options.mounts_dir),
            directory_mode=config.backups.dir_mode,
            mount_seconds=config.remote_options.mount_timeout,
            use_sudo=config.remote_options.use_sudo,
            operation_seconds=config.remote_options.timeout,
            parallel_operations=config.remote_options.max_parallel_operations,
            set_up=False,
        )
        if not create:
            await refuse_missing(spec, options=options)
        async with self._remotes.use(
            _key(spec, options), lambda: self.traffic.counted(spec, opened_remote, options)
        ) as remote:
            await (settle(remote) if create else look(remote))
            yield remote

    def xapi(self, spec: Mapping[str, Any]) -> AbstractAsyncContextManager[Xapi]:
        """A session on a pool for the block; shared when address and credentials are equal."""
        secrets.remember_in(dict(spec))
        config = self.config.xapi_options
        options = XapiOptions.from_record(
            spec,
            {
                "inactivity_timeout": config.http_inactivity_timeout,
                "call_timeout": config.call_timeout,
                "max_uncoalesced_vdis": config.max_uncoalesced_vdis,
            },
        )
        return self._xapis.use(_key(spec, options), lambda: connect(options))

    def open_connections(self) -> dict[str, int]:
        """How many remotes and pools are open now, used or not."""
        return {
            "remote": self._remotes.statistics()["open"],
            "pool": self._xapis.statistics()["open"],
        }

    def damage(self, remote: Remote) -> DamageNotes:
        """What is known to be damaged on ``remote``."""
        return DamageNotes(self.tasks, remote)

    # -- runs --------------------------------------------------------------------------------

    def start_backup(self, request: BackupRequest) -> Task:
        """Begin a job's run and return its root task at once.

        Raises ``Refused`` for a job that cannot be run and ``Busy`` (``job is already
        running``) while the job's former run is alive.
        """
        self._refuse_when_stopping()
        job, work = self._runner(request)
        running = self._jobs.get(job.id)
        if job.id and running is not None and running.pending:
            raise Busy(
                "job is already running",
                code="EJOBRUNNING",
                data={"jobId": job.id, "taskId": running.id},
            )
        secrets.remember_in([*request.remotes.values(), *request.xapis.values()])
        task = self._start("backup run", request.properties(), work)
        self._jobs[job.id] = task
        return task

    def _runner(
        self, request: BackupRequest
    ) -> tuple[VmJob | MetadataJob | MirrorJob, Callable[[Task], Awaitable[None]]]:
        """The job as understood, and the work of its root task."""
        backups = self.config.backups
        if request.job.get("type") == "metadataBackup":
            metadata_job = understand_metadata(
                request, backups.default_settings, backups.metadata.default_settings
            )
            return metadata_job, lambda root: run_metadata_job(self, metadata_job, root)
        defaults = [backups.default_settings, backups.vm.default_settings]
        if request.job.get("type") == "mirrorBackup":
            mirror_job = understand_mirror(request, defaults)
            return mirror_job, lambda root: run_mirror_job(self, mirror_job, root)
        job = understand(request, defaults)
        return job, lambda root: run_vm_job(self, job, root)

    async def start_restore(self, request: RestoreRequest) -> Task:
        """Open the remote and the pool, read the metadata, then begin the restore.

        What is wrong with these is raised here and makes no task.
        """
        self._refuse_when_stopping()
        path = backup_path(request.backup_id)
        secrets.remember_in([request.remote, request.xapi])
        async with self.remote(request.remote, create=False) as remote, self.xapi(request.xapi):
            record = await read_backup(remote, path)
        if record.backup.mode not in ("full", "delta"):
            raise Refused(
                f"'{record.backup.mode}' is no kind of backup that can be restored",
                code="ENOTSUP",
            )

        async def work(root: Task) -> dict[str, Any]:
            for key in request.ignored:
                root.warning(f"the setting '{key}' is not known and has no effect")
            async with (
                self.remote(request.remote, create=False) as remote,
                self.xapi(request.xapi) as xapi,
            ):
                await self.sweeper.contact(root, xapi)
                await self.sweeper.contact_remote(root, remote)
                marks = Owner(self.installation, root.id).marks
                restore = restore_full if record.backup.mode == "full" else restore_incremental
                with told(root, remote):
                    return await restore(root, request, remote, record, xapi, marks=marks)

        properties = {
            "backupId": request.backup_id,
            "jobId": record.backup.job_id,
            "srId": request.sr_uuid,
            "time": record.backup.timestamp,
        }
        return self._start("restore", properties, work)

    async def start_metadata_restore(self, request: MetadataRestoreRequest) -> Task:
        """Open the remote and the pool, read the metadata, then begin the restore.

        What is wrong with these is raised here and makes no task.
        """
        self._refuse_when_stopping()
        path = metadata_backup_path(request.backup_id)
        spec = request.xapi
        secrets.remember_in([request.remote, spec])
        of_pool = is_pool_backup(path)
        if of_pool and spec is None:
            raise Refused(
                "a pool's metadata is restored to a pool: xapi is missing",
                code="EINVAL",
                data={"part": "xapi"},
            )
        if request.dry_run and not of_pool:
            raise Refused(
                "only the restore of a pool's metadata has a dry run",
                code="EINVAL",
                data={"part": "dryRun"},
            )
        async with self.remote(request.remote, create=False) as remote:
            metadata = await read_metadata_backup(remote, path)
        if of_pool and spec is not None:
            async with self.xapi(spec):
                pass

        async def work(root: Task) -> Any:
            async with self.remote(request.remote, create=False) as remote:
                if not of_pool or spec is None:
                    root.handed_out = await read_configuration(remote, path, metadata)
                    return None
                async with self.xapi(spec) as xapi:
                    if not request.dry_run:
                        # The restored database will not know what is left, nor whose it is.
                        await self.sweeper.contact(root, xapi)
                    return await restore_pool(root, remote, path, xapi, dry_run=request.dry_run)

        asked = {"dryRun": True} if request.dry_run else {}
        return self._start("metadataRestore", {"metadata": metadata, **asked}, work)

    async def start_verify(self, request: VerifyRequest) -> VerifyRun:
        """Begin to look at the backups of a remote.

        A remote that does not open and a ``filename`` or VM that cannot be are raised here and
        make no task.
        """
        self._refuse_when_stopping()
        secrets.remember_in(dict(request.remote))
        sample_of(request.level, request.sample, now=0)
        if request.vm_uuid is not None:
            vm_directory(request.vm_uuid)
        async with self.remote(request.remote, create=False) as remote:
            if request.filename is not None:
                await remote.stat(backup_path(request.filename))
        run = VerifyRun(request)

        async def work(root: Task) -> dict[str, Any]:
            async with self.remote(request.remote, create=False) as remote:
                with told(root, remote):
                    return await run.look(root, remote, self.damage(remote))

        run.begin(lambda work: self._start("verify", request.properties(), work), work)
        return run

    def start_sweep(self, request: SweepRequest) -> Task:
        """Begin to remove what dead runs left, and return the root task at once."""
        self._refuse_when_stopping()
        if not request.xapis and not request.remotes:
            raise Refused(
                "nothing to sweep: the call names neither pools (xapis) nor remotes",
                code="EINVAL",
                data={"part": "xapis"},
            )
        secrets.remember_in([*request.remotes.values(), *request.xapis.values()])

        async def work(root: Task) -> dict[str, Any]:
            return await run_sweep(self, request, root)

        return self._start("sweep", {"dryRun": request.dry_run}, work)

    def _start(self, name: str, properties: dict[str, Any], work: Callable[[Task], Any]) -> Task:
        async def counted(root: Task) -> Any:
            try:
                with acting_for(Owner(self.installation, root.id), self._is_live):
                    return await work(root)
            finally:
                self._live.pop(root.id, None)
                self.sweeper.ended(root)
                self._ended.set()
                self._ended = trio.Event()

        task = self.tasks.start(name, properties, counted)
        self._live[task.id] = task
        return task

    def _is_live(self, run: str) -> bool:
        return self.tasks.live(run) is not None

    def running_jobs(self) -> list[str]:
        """Ids of the jobs that have a run alive."""
        self._jobs = {job: task for job, task in self._jobs.items() if task.pending}
        return list(self._jobs)

    # -- stop --------------------------------------------------------------------------------

    def _refuse_when_stopping(self) -> None:
        if not self._accepting:
            raise Refused("the daemon is stopping: it begins nothing new", code="ESHUTDOWN")

    def stop_accepting(self) -> None:
        """No new runs from now on."""
        self._accepting = False

    async def wait_idle(self) -> None:
        """Return when no run is alive."""
        while self._live:
            await self._ended.wait()

    def cancel_all(self, reason: str) -> None:
        """Ask every run to stop; they end when their undo did."""
        for task in list(self._live.values()):
            task.cancel(reason)


def _key(spec: Mapping[str, Any], options: object) -> str:
    """Everything that the resource depends on, hashed: keys must not hold secrets in clear."""
    told = {key: spec[key] for key in sorted(spec) if key not in ("benchmarks", "error", "name")}
    return hashlib.sha256(msgspec.json.encode([told, repr(options)])).hexdigest()


@contextlib.asynccontextmanager
async def open_services(
    config: Callable[[], Config], tasks: Tasks, nursery: trio.Nursery
) -> AsyncIterator[Services]:
    """The services for the block.  ``nursery`` is the daemon's and outlives every call."""
    services = Services(config, tasks, nursery)
    try:
        yield services
    finally:
        services.stop_accepting()
