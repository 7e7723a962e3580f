"""When a pool or a remote is swept: before the first run on it, and after one that ended badly."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
import trio

from proxy.errors import NoSuchObject, ProxyError
from proxy.jobs.sweep.findings import Fate, Report
from proxy.jobs.sweep.pool_sweep import sweep_pool
from proxy.jobs.sweep.remote_sweep import sweep_remote
from proxy.tasks.status import Status

if TYPE_CHECKING:
    from proxy.jobs.sweep.findings import Entry
    from proxy.remotes import Remote
    from proxy.tasks import Task, Tasks
    from proxy.xapi import Xapi


_LONGEST_RUN_SECONDS = 30 * 86400.0
_SLACK_SECONDS = 2.0
"""By which a store's clock may differ from ours, and what it tells in whole seconds."""


class _Outcome(msgspec.Struct, kw_only=True):
    status: str
    tasks: list[_Outcome] = []

    @property
    def is_well(self) -> bool:
        """Also of an attempt that a later one replaced: what it could not undo nobody else will."""
        return self.status == Status.SUCCESS and all(task.is_well for task in self.tasks)


class _Root(_Outcome, kw_only=True):
    id: str
    start: int
    end: int = 0


class Sweeper:
    """Sweeps each pool at the first contact of this life of the daemon, and again when a run
    has ended badly since; each remote at the first contact, for what earlier lives left.  Made
    once; for any number of tasks."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._locks: dict[tuple[str, str], trio.Lock] = {}
        self._swept: dict[str, int] = {}
        """By pool: how many runs had ended badly when it was swept last."""
        self._cleaned: set[str] = set()
        self._ending: list[Task] = []
        self._bad = 0

    def ended(self, root: Task) -> None:
        """A run is about to end, however."""
        self._ended_badly()  # lets go of those before it: perhaps no pool is ever contacted
        self._ending.append(root)

    async def contact(self, root: Task, xapi: Xapi) -> None:
        """To be awaited before the run ``root`` does anything on the pool.

        Whoever comes while the pool is being swept waits.  What was swept is an info of
        ``root``; trouble is a warning, and the next contact tries again.  On return ``root``
        is in the journal, so that what it marks can be swept should it die.
        """
        await self._tasks.flush()
        async with self._lock("pool", xapi.pool_ref):
            bad = self._ended_badly()
            if self._swept.get(xapi.pool_ref) == bad:
                return
            try:
                report = await sweep_pool(xapi, self._tasks.installation, self.fate)
            except ProxyError as error:
                root.warning("could not sweep what dead runs left", {"error": error.message})
                return
            if _tell(root, report, "pool"):
                self._swept[xapi.pool_ref] = bad

    async def contact_remote(self, root: Task, remote: Remote) -> None:
        """To be awaited before the run ``root`` does anything on the remote.

        Directories that a run of an earlier life of this daemon still holds are cleaned.
        Everything else is cleaned by the next run that needs it, as ever.
        """
        if self._tasks.is_first_life:
            return
        async with self._lock("remote", remote.url):
            if remote.url in self._cleaned:
                return
            try:
                report = await sweep_remote(remote, self.fate, owner=root.id, only_ours=True)
            except ProxyError as error:
                root.warning("could not sweep what dead runs left", {"error": error.message})
                return
            if _tell(root, report, "remote"):
                self._cleaned.add(remote.url)

    async def sweep_pool(self, xapi: Xapi, *, dry_run: bool) -> Report:
        """Sweep it now, asked for by a client."""
        await self._tasks.flush()
        async with self._lock("pool", xapi.pool_ref):
            return await sweep_pool(xapi, self._tasks.installation, self.fate, dry_run=dry_run)

    async def sweep_remote(self, remote: Remote, *, owner: str, dry_run: bool) -> Report:
        """Sweep it now, asked for by a client; ``owner`` is the id of the run that does it.

        Runs that come to the remote meanwhile do not wait for the whole of it: the locks of its
        directories keep them apart.
        """
        await self._tasks.flush()
        async with self._lock("asked", remote.url):
            return await sweep_remote(
                remote, self.fate, owner=owner, dry_run=dry_run, culprit=self._culprit
            )

    async def _culprit(self, vm_uuid: str, at: float) -> str | None:
        """The run that was backing up the VM at that time, and has ended badly."""
        moment, slack = at * 1000, _SLACK_SECONDS * 1000
        since = int(moment - _LONGEST_RUN_SECONDS * 1000)
        async with aclosing(self._tasks.list(since=since)) as remembered:
            async for raw in remembered:
                root = msgspec.json.decode(raw, type=_Root)
                bad = root.status not in (Status.PENDING, Status.SUCCESS)
                during = root.start - slack <= moment <= root.end + slack
                if bad and during and vm_uuid.encode() in bytes(raw):
                    return root.id
        return None

    def _lock(self, kind: str, name: str) -> trio.Lock:
        return self._locks.setdefault((kind, name), trio.Lock())

    def _ended_badly(self) -> int:
        self._bad += sum(not root.pending and not _is_well(root) for root in self._ending)
        self._ending = [root for root in self._ending if root.pending]
        return self._bad

    async def fate(self, run: str) -> Fate:
        """What became of the run with this id."""
        if not run:
            return Fate.UNKNOWN
        try:
            outcome = msgspec.json.decode(await self._tasks.get(run), type=_Outcome)
        except NoSuchObject:
            return Fate.UNKNOWN  # forgotten, or another life's: nothing says that it is dead
        if outcome.status == Status.PENDING:
            return Fate.LIVE
        return Fate.WELL if outcome.is_well else Fate.DEAD


def _is_well(task: Task) -> bool:
    """As :attr:`_Outcome.is_well`."""
    return task.status is Status.SUCCESS and all(_is_well(child) for child in task.children)


def _tell(root: Task, report: Report, where: str) -> bool:
    """Whether everything that was to go is gone."""
    swept: list[Entry] = report.swept
    if swept:
        root.info(f"swept what dead runs left on the {where}", {"swept": swept})
    if report.errors:
        root.warning(
            "could not sweep what dead runs left",
            {"error": report.errors[0].message, "left": report.left},
        )
    return not report.errors
