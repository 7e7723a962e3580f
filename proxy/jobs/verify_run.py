"""A verify as a task, and its records for whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec
import trio

from proxy.errors import Corrupt, ProxyError, Unreachable
from proxy.formats.vhd import BLOCK_SIZE
from proxy.remotes.encryption import algorithm_of
from proxy.repository.verify import verify
from proxy.repository.verify_reports import BackupReport, DiskReport, Level, Status, Summary, worst

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from proxy.remotes import Remote
    from proxy.repository.damage import DamageNotes
    from proxy.repository.verify_reports import Report
    from proxy.tasks import Task

    Work = Callable[[Task], Awaitable[dict[str, Any]]]

_MOST_WARNINGS = 100


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """``backup.verify`` as received; ``remote`` holds credentials."""

    remote: Mapping[str, Any]
    vm_uuid: str | None = None
    filename: str | None = None
    level: Level = "structure"
    sample: float | None = None

    def properties(self) -> dict[str, Any]:
        """Of the root task."""
        said = {
            "remoteId": self.remote.get("id"),
            "vmId": self.vm_uuid,
            "filename": self.filename,
            "level": self.level,
            "sample": self.sample,
        }
        return {key: value for key, value in said.items() if value is not None}


class VerifyRun:
    """One verify that is under way."""

    def __init__(self, request: VerifyRequest) -> None:
        self._request = request
        # nothing is looked at before the record of what came before is taken
        self._send, self._receive = trio.open_memory_channel["Report"](0)
        self._summary = Summary(
            status="canceled", level=request.level, sample=request.sample
        )  # what a cancel leaves
        self._task: Task | None = None

    def begin(self, start: Callable[[Work], Task], work: Work) -> Task:
        """Start the task through ``start``; ``work`` opens the remote and calls :meth:`look`."""

        async def ending(root: Task) -> dict[str, Any]:
            with self._send:
                return await work(root)

        self._task = start(ending)
        return self._task

    async def look(self, root: Task, remote: Remote, damage: DamageNotes) -> dict[str, Any]:
        """The work of the task.  Its result is the summary; it fails when anything is wrong."""
        request, summary = self._request, self._summary
        algorithm = algorithm_of(remote)
        if algorithm is not None and not algorithm.is_authenticated:
            root.warning(
                f"the remote is encrypted by {algorithm}, an unauthenticated algorithm: data that"
                " was changed is noticed only where there are checksums",
                {"algorithm": algorithm.value},
            )
        seen = [Status.OK]
        reports = verify(
            remote,
            vm_uuid=request.vm_uuid,
            filename=request.filename,
            level=request.level,
            sample=request.sample,
            on_progress=root.progress,
            damage=damage,
        )
        warned = 0
        try:
            async for report in reports:
                summary.add(report, BLOCK_SIZE)
                if isinstance(report, BackupReport):
                    seen.append(report.status)
                if report.status is not Status.OK and warned < _MOST_WARNINGS:
                    warned += 1
                    _warn(root, report)
                await self._send.send(report)
        except ProxyError as error:
            summary.status, summary.message = Status.UNREADABLE.value, error.message
            raise
        finally:
            await cast("Any", reports).aclose()
        summary.status = worst(seen).value
        root.complete_progress()
        result: dict[str, Any] = msgspec.to_builtins(summary)
        _judge(summary, result)
        return result

    async def records(self) -> AsyncIterator[dict[str, Any]]:
        """What the client gets: ``start``, a record of each report, ``summary``.

        Leaving before the end cancels the verify, which changes nothing and is of no use to
        anybody else.
        """
        task = self._task
        assert task is not None
        start = {"type": "start", "taskId": task.id, **self._request.properties()}
        try:
            yield start
            async for report in self._receive:
                yield msgspec.to_builtins(report)
            yield msgspec.to_builtins(self._summary)
        finally:
            if task.pending:  # before the channel goes, whose end would look like a failure
                task.cancel("the client has left")
            self._receive.close()


def _warn(root: Task, report: Report) -> None:
    what = "disk" if isinstance(report, DiskReport) else "backup"
    named = report.path if isinstance(report, DiskReport) else report.id
    problem = report.problems[0] if report.problems else None
    root.warning(
        f"the {what} '{named}' is {report.status.value}"
        + ("" if problem is None else f": {problem.message}"),
        {"path": named, "status": report.status.value},
    )


def _judge(summary: Summary, result: dict[str, Any]) -> None:
    """Raise unless every backup is all right, or its merge is under way."""
    damaged = summary.backups.get(Status.DAMAGED.value, 0)
    if damaged:
        raise Corrupt(f"{damaged} of {_all(summary)} backups are damaged", data=result)
    unreadable = summary.backups.get(Status.UNREADABLE.value, 0)
    if unreadable:
        raise Unreachable(
            f"{unreadable} of {_all(summary)} backups could not be read", code="EIO", data=result
        )


def _all(summary: Summary) -> int:
    return sum(summary.backups.values())
