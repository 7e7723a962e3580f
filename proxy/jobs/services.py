"""What the daemon's calls share: tasks, connections, the runs that are alive."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from proxy.errors import Busy, Refused
from proxy.jobs.incremental_restore import restore_incremental
from proxy.jobs.requests import BackupRequest, RestoreRequest, understand
from proxy.jobs.restore import restore_full
from proxy.jobs.sharing import Shared
from proxy.jobs.sweep import Sweeper
from proxy.jobs.verify_run import VerifyRun
from proxy.jobs.vm_run import run_vm_job
from proxy.remotes.factory import RemoteOptions, opened_remote
from proxy.repository import backup_path, read_backup, vm_directory
from proxy.repository.damage import DamageNotes
from proxy.repository.verify import sample_of
from proxy.runtime import secrets
from proxy.xapi import Xapi, XapiOptions, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from proxy.config import Config
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

    def remote(self, spec: Mapping[str, Any]) -> AbstractAsyncContextManager[Remote]:
        """An open remote for the block; shared with whoever gives the same record."""
        config = self.config
        options = RemoteOptions(
            disable_file_remotes=config.remotes.disable_file_remotes,
            mounts_dir=str(config.remote_options.mounts_dir),
            directory_mode=config.backups.dir_mode,
            inactivity_seconds=config.remote_options.timeout,
        )
        return self._remotes.use(_key(spec, options), lambda: opened_remote(spec, options=options))

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
        backups = self.config.backups
        job = understand(request, [backups.default_settings, backups.vm.default_settings])
        running = self._jobs.get(job.id)
        if job.id and running is not None and running.pending:
            raise Busy(
                "job is already running",
                code="EJOBRUNNING",
                data={"jobId": job.id, "taskId": running.id},
            )
        secrets.remember_in([*request.remotes.values(), *request.xapis.values()])
        task = self._start(
            "backup run", request.properties(), lambda root: run_vm_job(self, job, root)
        )
        self._jobs[job.id] = task
        return task

    async def start_restore(self, request: RestoreRequest) -> Task:
        """Open the remote and the pool, read the metadata, then begin the restore.

        What is wrong with these is raised here and makes no task.
        """
        self._refuse_when_stopping()
        path = backup_path(request.backup_id)
        secrets.remember_in([request.remote, request.xapi])
        async with self.remote(request.remote) as remote, self.xapi(request.xapi):
            record = await read_backup(remote, path)
        if record.backup.mode not in ("full", "delta"):
            raise Refused(
                f"'{record.backup.mode}' is no kind of backup that can be restored",
                code="ENOTSUP",
            )

        async def work(root: Task) -> dict[str, Any]:
            for key in request.ignored:
                root.warning(f"the setting '{key}' is not known and has no effect")
            async with self.remote(request.remote) as remote, self.xapi(request.xapi) as xapi:
                await self.sweeper.contact(root, xapi)
                restore = restore_full if record.backup.mode == "full" else restore_incremental
                return await restore(
                    root, request, remote, record, xapi, installation=self.installation
                )

        properties = {
            "backupId": request.backup_id,
            "jobId": record.backup.job_id,
            "srId": request.sr_uuid,
            "time": record.backup.timestamp,
        }
        return self._start("restore", properties, work)

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
        async with self.remote(request.remote) as remote:
            if request.filename is not None:
                await remote.stat(backup_path(request.filename))
        run = VerifyRun(request)

        async def work(root: Task) -> dict[str, Any]:
            async with self.remote(request.remote) as remote:
                return await run.look(root, remote, self.damage(remote))

        run.begin(lambda work: self._start("verify", request.properties(), work), work)
        return run

    def _start(self, name: str, properties: dict[str, Any], work: Callable[[Task], Any]) -> Task:
        async def counted(root: Task) -> Any:
            try:
                return await work(root)
            finally:
                self._live.pop(root.id, None)
                self.sweeper.ended(root)
                self._ended.set()
                self._ended = trio.Event()

        task = self.tasks.start(name, properties, counted)
        self._live[task.id] = task
        return task

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
