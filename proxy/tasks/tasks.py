"""The daemon's tasks: starting them, finding, cancelling and forgetting them."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from proxy.errors import Conflict, NoSuchObject
from proxy.runtime.threads import Work, in_thread
from proxy.tasks.feed import EventPage, Feed
from proxy.tasks.journal import Journal
from proxy.tasks.status import Status
from proxy.tasks.task import Run, Task

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

_log = structlog.get_logger("tasks")

_PAGE = 100
_PRUNE_EVERY = 3600.0
_REASONS = 20
"""Failures of one run that the daemon's log names; its task holds all."""


@dataclasses.dataclass(frozen=True, slots=True)
class JournalLimits:
    """How much finished work is remembered."""

    keep: int = 10_000
    max_age: float = 93 * 86400.0
    """Seconds; three months, as long as somebody may ask what happened that night."""
    keep_deleted: int = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class TaskStatistics:
    """Of this life of the daemon."""

    live: int
    """Runs in memory: those that run, and those whose end is not in the journal yet."""
    running: int
    ended: Mapping[str, int]
    """Root tasks by their final status."""
    waiters: int
    dirty: int
    seq: int


class Tasks:
    """Every run of this daemon, live and remembered.  Made by :func:`open_tasks`."""

    def __init__(self, journal: Journal, nursery: trio.Nursery, limits: JournalLimits) -> None:
        self._journal = journal
        self._nursery = nursery
        self._limits = limits
        self._feed = Feed(journal)
        self._runs: dict[str, Run] = {}
        self._ended_by = dict.fromkeys(Status, 0)
        del self._ended_by[Status.PENDING]

    @property
    def installation(self) -> str:
        """Names this installation; made with the journal and kept with it."""
        return self._journal.boots.journal

    @property
    def is_first_life(self) -> bool:
        """Whether no daemon has used this journal before: then none can have died."""
        return self._journal.boots.number == 1

    # -- starting ----------------------------------------------------------------------------

    def start(
        self,
        name: str,
        properties: dict[str, Any],
        work: Callable[[Task], Awaitable[Any]],
        *,
        nursery: trio.Nursery | None = None,
    ) -> Task:
        """Begin a root task in the daemon's nursery and return it at once.

        What ``work`` returns becomes its result, what it raises its failure; nothing of it
        reaches the nursery.  ``name`` stands first in the root's properties, where XO
        expects it.
        """
        run = Run(self._feed.changed, lambda: self._runs.pop(task.id, None))
        task = Task(run, None, {"name": name, **properties})
        self._runs[task.id] = run
        (nursery or self._nursery).start_soon(self._work, task, work, name=f"{name} {task.id}")
        return task

    async def _work(self, task: Task, work: Callable[[Task], Awaitable[Any]]) -> None:
        _log.info("task began", task=task.id, what=task.title)
        try:
            with task.running():
                task.result = await work(task)
        except Exception:  # noqa: BLE001, S110  the log of the task holds it; siblings go on
            pass
        finally:
            if task.end is not None:
                self._ended_by[task.status] += 1
                _tell_end(task)

    # -- looking -----------------------------------------------------------------------------

    def live(self, task_id: str) -> Task | None:
        """The task itself while its run is in memory: root or subtask."""
        for run in self._runs.values():
            if task_id in run.tasks:
                return run.tasks[task_id]
        return None

    async def get(self, task_id: str) -> msgspec.Raw:
        """The Task object, encoded.  Subtasks are found while their run is live."""
        task = self.live(task_id)
        if task is not None:
            return msgspec.Raw(task.snapshot())
        row = await in_thread(Work.JOURNAL, self._journal.get, task_id)
        if row is None:
            raise NoSuchObject("task", task_id)
        return msgspec.Raw(row.snapshot)

    async def list(
        self,
        *,
        limit: int | None = None,
        status: str | None = None,
        job_id: str | None = None,
        since: int | None = None,
    ) -> AsyncGenerator[msgspec.Raw]:
        """Root tasks, newest first, read in pages; ``since`` is a start time in ms."""
        await self._feed.flush(everything=True)
        before: tuple[int, str] | None = None
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            rows = await in_thread(
                Work.JOURNAL,
                partial(
                    self._journal.newest,
                    before=before,
                    limit=size,
                    status=status,
                    job=job_id,
                    since=since,
                ),
            )
            for row in rows:
                yield msgspec.Raw(row.snapshot)
            if len(rows) < size:
                return
            before = (rows[-1].start, rows[-1].id)
            if left is not None:
                left -= size

    async def events(self, token: str, timeout: float) -> EventPage:
        """See :meth:`proxy.tasks.feed.Feed.events`."""
        return await self._feed.events(token, timeout)

    def watch(self, task: Task) -> AsyncIterator[bytes]:
        """The log records of a run that :meth:`start` returned, from the first to the last."""
        return task.log.watch()

    # -- notes -------------------------------------------------------------------------------

    async def note(self, kind: str, key: str, value: Any) -> None:
        """Remember ``value`` (JSON, no secrets) under ``key``; ``None`` forgets it.

        For what the daemon has found out and no task keeps.  Durable as a task is; that it
        cannot be written stands in the daemon's log.
        """
        encoded = None if value is None else msgspec.json.encode(value)
        try:
            await in_thread(Work.JOURNAL, self._journal.note, kind, key, encoded)
        except sqlite3.Error as error:
            _log.error("the journal cannot be written", kind=kind, key=key, error=str(error))

    async def notes(self, kind: str) -> dict[str, Any]:
        """Everything of this kind that is remembered, by key; nothing when the journal cannot be
        read: backups must go on."""
        try:
            rows = await in_thread(Work.JOURNAL, self._journal.notes, kind)
        except sqlite3.Error as error:
            _log.error("the journal cannot be read", kind=kind, error=str(error))
            return {}
        return {key: msgspec.json.decode(value) for key, value in rows}

    # -- ending ------------------------------------------------------------------------------

    async def cancel(self, task_id: str, reason: str = "canceled by request") -> None:
        """Ask a pending task (root or subtask) to stop; returns at once.

        Raises ``NoSuchObject`` for an unknown id and ``Conflict`` for a finished task;
        cancelling twice is fine.
        """
        task = self.live(task_id)
        if task is None:
            row = await in_thread(Work.JOURNAL, self._journal.get, task_id)
            if row is None:
                raise NoSuchObject("task", task_id)
        if task is None or not task.pending:
            raise Conflict(
                f"task {task_id} is already finished, there is nothing to cancel",
                code="EFINISHED",
                data={"id": task_id},
            )
        task.cancel(reason)

    async def destroy(self, task_id: str) -> None:
        """Forget a finished root task; its event says ``del``.

        Raises ``Conflict`` while it is pending, ``NoSuchObject`` when unknown.
        """
        task = self.live(task_id)
        if task is not None:
            if task.parent is not None:
                raise Conflict(
                    f"task {task_id} is part of {self._root_id(task)}: destroy that one",
                    code="ESUBTASK",
                    data={"id": task_id},
                )
            if task.pending:
                raise Conflict(
                    f"task {task_id} is still pending: cancel it first",
                    code="EPENDING",
                    data={"id": task_id},
                )
            await self._feed.flush(everything=True)
        await self._forget(task_id)

    async def _forget(self, task_id: str) -> None:
        row = await in_thread(Work.JOURNAL, self._journal.get, task_id)
        if row is None:
            raise NoSuchObject("task", task_id)
        gone: dict[str, Any] = {
            "id": row.id,
            "start": row.start,
            "end": row.ended,
            "status": row.status,
            "data": {},
        }
        await self._feed.store(
            dataclasses.replace(row, deleted=True, snapshot=msgspec.json.encode(gone))
        )

    @staticmethod
    def _root_id(task: Task) -> str:
        while task.parent is not None:
            task = task.parent
        return task.id

    async def _prune(self) -> None:
        """Forget old tasks now and then."""
        while True:
            oldest = int((time.time() - self._limits.max_age) * 1000)
            for task_id in await in_thread(
                Work.JOURNAL, self._journal.forget_old, self._limits.keep, oldest
            ):
                with contextlib.suppress(NoSuchObject):
                    await self._forget(task_id)
            await in_thread(Work.JOURNAL, self._journal.compact, self._limits.keep_deleted)
            await trio.sleep(_PRUNE_EVERY)

    def release_waiters(self) -> None:
        """Let every ``event.from`` answer now: the daemon stops."""
        self._feed.close()

    def statistics(self) -> TaskStatistics:
        running = sum(run.root is not None and run.root.pending for run in self._runs.values())
        return TaskStatistics(
            live=len(self._runs),
            running=running,
            ended={str(status): count for status, count in self._ended_by.items()},
            **self._feed.statistics(),
        )

    async def recover(self) -> None:
        """Give an end to what an earlier life of the daemon left pending."""
        now = int(time.time() * 1000)
        interrupted = await in_thread(Work.JOURNAL, self._journal.interrupt_pending, now)
        for row in interrupted:
            _log.warning("task was interrupted by the end of the daemon", task=row.id)
        self._feed = Feed(self._journal)  # its numbers go on after those just given

    async def run_background(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed.run_flusher)
            nursery.start_soon(self._prune)

    async def flush(self) -> None:
        """Write everything that is not written yet."""
        await self._feed.flush(everything=True)


def _tell_end(task: Task) -> None:
    """A line for whoever has nothing but the daemon's log, such as after a night."""
    assert task.end is not None
    seconds = (task.end - task.start) / 1000
    said = {"task": task.id, "what": task.title, "status": str(task.status), "seconds": seconds}
    if task.status is not Status.FAILURE:
        _log.info("task ended", **said)
        return
    reasons = list(task.failures())
    _log.warning("task ended", **said)
    for reason in reasons[:_REASONS]:
        _log.warning("it failed", task=task.id, reason=reason)
    if len(reasons) > _REASONS:
        _log.warning("there are more reasons", task=task.id, count=len(reasons) - _REASONS)


@contextlib.asynccontextmanager
async def open_tasks(
    path: str, nursery: trio.Nursery, limits: JournalLimits | None = None
) -> AsyncIterator[Tasks]:
    """Open the journal and run the feed while the block lasts.

    Roots run in ``nursery``, which the caller owns and ends before leaving this block.
    Tasks that an earlier life left pending become ``interrupted``.  On leaving, also on
    cancel, the last changes are written.
    """
    journal = await in_thread(Work.JOURNAL, Journal.open, path)
    tasks = Tasks(journal, nursery, limits or JournalLimits())
    try:
        await tasks.recover()
        async with trio.open_nursery() as background:
            background.start_soon(tasks.run_background)
            try:
                yield tasks
            finally:
                tasks.release_waiters()
                background.cancel_scope.cancel("the daemon stops")
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await tasks.flush()
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(Work.JOURNAL, journal.close)
