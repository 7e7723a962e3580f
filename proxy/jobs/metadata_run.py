"""A run that backs up pools' databases and Xen Orchestra's configuration.

Each pool and the configuration is a part with a task of its own, and in it each remote: what
fails in one touches no other.  A pool's database is read once for all remotes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from proxy.formats.pool_database import DatabaseCheck
from proxy.jobs.copying import Check, FanOut
from proxy.jobs.opening import failed, open_remotes
from proxy.jobs.run_limits import RunLimits
from proxy.jobs.target import now_ms
from proxy.jobs.traffic import told
from proxy.repository import lock_metadata, open_metadata_backup, prune_metadata
from proxy.repository.metadata_backup_paths import BINARY_DATA, config_directory, pool_directory
from proxy.runtime.buffers import BufferPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs.copying import Consumer
    from proxy.jobs.metadata_job import Configuration, MetadataJob
    from proxy.jobs.services import Services
    from proxy.remotes import Remote
    from proxy.repository.metadata_backup_writer import MetadataBackupWriter
    from proxy.tasks import Task
    from proxy.xapi import Xapi

    Feed = Callable[[Task, MetadataBackupWriter], Awaitable[None]]

_BUFFERS = 16
_BUFFER_SIZE = 1024 * 1024
"""More than most databases have: a remote that stalls does not hold up the others."""


async def run_metadata_job(services: Services, job: MetadataJob, root: Task) -> None:
    """The work of the root task.  What fails inside a part fails that part's task only."""
    async with contextlib.AsyncExitStack() as stack:
        remotes = await open_remotes(
            services,
            job.request,
            job.remote_ids,
            root,
            stack,
            seconds=job.settings.get_remote_timeout / 1000,
        )
        if not remotes:
            return
        run = _MetadataRun(services, job, root, remotes)
        async with trio.open_nursery() as nursery:
            if job.configuration is not None:
                nursery.start_soon(run.configuration, job.configuration)
            for pool_uuid in job.pools:
                nursery.start_soon(run.pool, pool_uuid)


@dataclass(frozen=True, slots=True)
class _Part:
    """What all remotes of one pool, or of the configuration, have in common."""

    name: str
    """Of the task of each remote, without the remote."""
    directory: str
    data: str
    timestamp: int
    """Milliseconds: when the part began."""
    metadata: dict[str, Any]
    keep: int


class _MetadataRun:
    """The parts of one run."""

    def __init__(
        self, services: Services, job: MetadataJob, root: Task, remotes: dict[str, Remote]
    ) -> None:
        self._services = services
        self._job = job
        self._root = root
        self._remotes = remotes
        settings = job.settings
        parts = len(job.pools) + (job.configuration is not None)
        self._limits = RunLimits(
            root,
            parts=parts,
            concurrency=settings.concurrency,
            rate=lambda: settings.max_export_rate,
            timeout=settings.timeout,
        )
        self._copies = parts * len(remotes)
        self._copied = 0

    # -- parts -------------------------------------------------------------------------------

    async def configuration(self, configuration: Configuration) -> None:
        """Store the configuration on every remote; every end of it stands in the log."""
        name = "Starting XO metadata backup"
        job = self._job

        def begin() -> AbstractAsyncContextManager[Task]:
            return self._root.child(f"{name}. ({job.id})", type="xo")

        async def work() -> None:
            async with begin() as task:
                timestamp = now_ms()
                part = _Part(
                    name=name,
                    directory=config_directory(job.schedule_id),
                    data=configuration.name,
                    timestamp=timestamp,
                    metadata=_in_order(
                        {
                            **job.described(),
                            "data": f"./{configuration.name}",
                            "timestamp": timestamp,
                        }
                    ),
                    keep=job.settings.retention_xo_metadata,
                )

                async def feed(_: Task, writer: MetadataBackupWriter) -> None:
                    await writer.write(configuration.content)

                with self._limits.time_limit():
                    async with trio.open_nursery() as nursery:
                        for remote_id in self._remotes:
                            nursery.start_soon(self._copy, task, part, remote_id, feed)

        await self._limits.in_slot(("type", "xo"), begin, work)

    async def pool(self, pool_uuid: str) -> None:
        """Store one pool's database on every remote; every end of it stands in the log."""
        name = f"Starting metadata backup for the pool ({pool_uuid})"

        def begin(**records: Any) -> AbstractAsyncContextManager[Task]:
            properties = {"id": pool_uuid, **records, "type": "pool"}
            return self._root.child(f"{name}. ({self._job.id})", **properties)

        async def work() -> None:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    spec = self._job.request.xapi_of(pool_uuid)
                    xapi = await stack.enter_async_context(self._services.xapi(spec))
                    await self._services.sweeper.contact(self._root, xapi)
                    pool = await xapi.record("pool", await xapi.by_uuid("pool", pool_uuid))
                    master = await xapi.record("host", pool["master"])
                except Exception as error:  # noqa: BLE001  no task would pass for a success
                    await failed(
                        self._root.child("get pool record", id=pool_uuid, type="pool"), error
                    )
                    return
                async with begin(pool=pool, poolMaster=master) as task:
                    timestamp = now_ms()
                    records = {"pool": pool, "poolMaster": master}
                    part = _Part(
                        name=name,
                        directory=pool_directory(self._job.schedule_id, pool_uuid),
                        data=BINARY_DATA,
                        timestamp=timestamp,
                        metadata=_in_order(
                            {**self._job.described(), **records, "timestamp": timestamp}
                        ),
                        keep=self._job.settings.retention_pool_metadata,
                    )
                    with self._limits.time_limit():
                        await self._export(task, part, xapi, pool_uuid)

        await self._limits.in_slot(("id", pool_uuid), begin, work)

    # -- copies ------------------------------------------------------------------------------

    async def _export(self, task: Task, part: _Part, xapi: Xapi, pool_uuid: str) -> None:
        """Read the database once into every remote.

        Raises what is wrong with the source; remotes that failed tell that in their own tasks.
        """
        async with xapi.export_pool() as download:
            check = Check(DatabaseCheck(pool_uuid))
            fan_out = FanOut(download, BufferPool(_BUFFERS, _BUFFER_SIZE), check, self._limits.rate)
            broken = await fan_out.feed(
                [partial(self._receive, task, part, remote_id) for remote_id in self._remotes]
            )
        if broken is not None:
            raise broken

    async def _receive(self, task: Task, part: _Part, remote_id: str, consumer: Consumer) -> None:
        async def feed(copy: Task, writer: MetadataBackupWriter) -> None:
            copy.progress(0, None)
            await consumer.pour(writer.write, lambda: copy.progress(writer.size, None))
            copy.complete_progress()

        await self._copy(task, part, remote_id, feed)

    async def _copy(self, task: Task, part: _Part, remote_id: str, feed: Feed) -> None:
        """One remote's task; its failure is in the log, the other remotes go on."""
        name = f"{part.name} for the remote ({remote_id}). ({self._job.id})"
        try:
            async with task.child(name, id=remote_id, type="remote") as copy:
                remote = self._remotes[remote_id]
                with told(copy, remote):
                    await self._store(copy, part, remote, feed)
        except Exception:  # noqa: BLE001  in the log of the copy
            return
        self._copied += 1
        self._root.set_property("progress", self._copied * 100 // self._copies)

    async def _store(self, copy: Task, part: _Part, remote: Remote, feed: Feed) -> None:
        """Data, metadata, retention.  Until the metadata is written an end leaves nothing."""
        wait = self._job.settings.get_remote_timeout / 1000
        async with lock_metadata(remote, part.directory, owner=self._root.id, wait=wait) as lock:
            async with open_metadata_backup(
                remote, part.directory, part.timestamp, part.data
            ) as writer:
                await feed(copy, writer)
                await lock.check()
                await writer.commit(part.metadata)
            await prune_metadata(
                remote,
                part.directory,
                keep=part.keep,
                newest=writer.name,
                lock=lock,
                warn=copy.warning,
            )


def _in_order(metadata: dict[str, Any]) -> dict[str, Any]:
    """As Xen Orchestra writes it, whose order is that of the names."""
    return dict(sorted(metadata.items()))
