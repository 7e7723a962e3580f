"""One task: a node of a run's tree, a cancel scope, and what the log says of it."""

from __future__ import annotations

import contextlib
import time
import traceback
from typing import TYPE_CHECKING, Any, cast

import msgspec
import structlog
import trio

from proxy.errors import Canceled, ProxyError
from proxy.runtime.secrets import scrub, scrub_text
from proxy.runtime.trouble import listener
from proxy.tasks.progress import Progress
from proxy.tasks.records import RunLog, describe_error, new_id
from proxy.tasks.status import SKIPPED_MESSAGES, Status, worst

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Container, Iterator

_log = structlog.get_logger("tasks")

_ABOUT = ("name_label", "jobName", "id", "backupId")
"""Properties that say what a task works on, the plainest first."""

_encode = msgspec.json.Encoder(enc_hook=str).encode


class Task:
    """A piece of work that can be watched and cancelled.

    Made by :meth:`child` or by ``Tasks.start``, never directly.  Belongs to the one Trio
    task that opened it; :meth:`cancel` and the reading methods may be called from any.
    """

    def __init__(self, run: Run, parent: Task | None, properties: dict[str, Any]) -> None:
        now = _now_ms()
        self.id = new_id(now)
        self.properties = properties
        self.parent = parent
        self.children: list[Task] = []
        self.start = now
        self.end: int | None = None
        self.result: Any = None
        """What a success answers; set it before the block ends."""
        self.handed_out: Any = None
        """What a success answers to those who follow its log, and to nobody else: as it is,
        secrets included, in no snapshot and never stored."""
        self.figures: dict[str, Any] = {}
        """Measurements: shown in ``data`` of snapshots, told by no log record."""
        self._outcome: Status | None = None
        self._run = run
        self._scope = trio.CancelScope()
        self._cancel_requested: int | None = None
        self._cancel_reason: str = "canceled"
        if parent is not None:
            self._cancel_reason = parent._cancel_reason  # noqa: SLF001  same class
        self._error: dict[str, Any] | None = None
        self._infos: list[dict[str, Any]] = []
        self._warnings: list[dict[str, Any]] = []
        self._progress: Progress | None = None
        self._replaced = False
        self._encoded: bytes | None = None
        run.register(self)  # first: a change of a run without root would reach nobody
        record: dict[str, Any] = {"properties": properties}
        if parent is not None:
            record["parentId"] = parent.id
            parent.children.append(self)
        self._emit({**record, "id": self.id, "timestamp": now, "type": "start"})

    # -- what the work says ------------------------------------------------------------

    def info(self, message: str, data: dict[str, Any] | None = None) -> None:
        self._note("info", self._infos, message, data)

    def set_property(self, name: str, value: Any) -> None:
        self.properties[name] = value
        record = {"name": name, "value": value, "id": self.id}
        self._emit({**record, "timestamp": _now_ms(), "type": "property"})

    def warning(self, message: str, data: dict[str, Any] | None = None) -> None:
        """Something the operator should know that is no failure: warnings never change a status."""
        self._note("warning", self._warnings, message, data)

    def retry(self, message: str, data: dict[str, Any], *, kept: Container[object] = ()) -> None:
        """A new attempt replaces the present children: their failures no longer count.

        Except those whose property ``id`` is among ``kept``: nobody does these again.
        """
        for child in self.children:
            if child.properties.get("id") not in kept:
                child.mark_replaced()
        self.warning(message, {**data, "isRetry": True})

    def progress(
        self,
        done: int,
        total: int | None,
        *,
        estimated: bool = False,
        bottleneck: str | None = None,
    ) -> None:
        """Bytes moved so far; cheap enough to be called for every buffer."""
        now = trio.current_time()
        if self._progress is None:
            self._progress = Progress(now)
            self._run.log.set_progress(self.id, 0, _now_ms())
        before = self._progress.percent
        self._progress.update(now, done, total, estimated=estimated, bottleneck=bottleneck)
        if self._progress.percent != before:
            self._run.log.set_progress(self.id, self._progress.percent, _now_ms())
        self._touch()

    def complete_progress(self) -> None:
        """Every byte is where it belongs: 100 %."""
        if self._progress is not None:
            self._progress.complete(trio.current_time())
            self._run.log.set_progress(self.id, 100, _now_ms())
            self._touch()

    @contextlib.asynccontextmanager
    async def child(self, name: str, /, **properties: Any) -> AsyncIterator[Task]:
        """A subtask for the block.

        The block's error ends it as ``failure`` and goes on upwards.  When the subtask
        itself was cancelled it ends as ``canceled``, after the block's own undo, and
        ``Canceled`` is raised, so that the caller treats it as the failure of this part;
        a cancel of an outer task passes through as Trio's.
        """
        task = Task(self._run, self, {**properties, "name": name})
        with task.running():
            yield task

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The block is this task's work.  Used by :meth:`child` and the owner of the root."""
        heard_before = listener.get()
        listener.set(self.warning)
        try:
            with self._scope:
                yield
        except BaseException as error:
            self._finish_with(error)
            raise
        finally:
            listener.set(heard_before)
        if self._scope.cancelled_caught:
            canceled = Canceled(self._cancel_reason)
            self._finish(Status.CANCELED, describe_error(canceled))
            raise canceled
        self._finish(Status.SUCCESS, self.result)

    # -- cancel --------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return self._outcome is None

    @property
    def cancel_requested(self) -> bool:
        """Whether this task, or one above it, was asked to stop."""
        return self._cancel_requested is not None

    def cancel(self, reason: str = "canceled by request") -> None:
        """Ask the task and everything below it to stop; returns at once.

        The task ends when its undo did.  A second call changes nothing.
        """
        self._request_cancel(reason)
        self._scope.cancel(reason)

    def _request_cancel(self, reason: str) -> None:
        if not self.pending or self.cancel_requested:
            return
        now = _now_ms()
        self._cancel_requested = now
        self._cancel_reason = reason
        self._emit(
            {
                "reason": {"message": reason},
                "id": self.id,
                "timestamp": now,
                "type": "abortionRequested",
            }
        )
        for child in self.children:
            child._request_cancel(reason)  # noqa: SLF001  same class
        self._touch()

    def mark_replaced(self) -> None:
        self._replaced = True

    # -- what others see -------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.properties.get("name", ""))

    @property
    def title(self) -> str:
        """Its name and what it works on, for people."""
        about = next((self.properties[key] for key in _ABOUT if self.properties.get(key)), "")
        return f"{self.name} {about}".rstrip()

    def failures(self) -> Iterator[str]:
        """Why it failed: each failed task without failed ones below, with those above it.

        Attempts that a later one replaced do not count.
        """
        below = [
            f"{child.title}: {reason}"
            for child in self.children
            if not child._replaced  # noqa: SLF001  same class
            for reason in child.failures()
        ]
        if below:
            yield from below
        elif self._outcome is Status.FAILURE and self._error is not None:
            yield str(self._error["message"])

    @property
    def log(self) -> RunLog:
        return self._run.log

    @property
    def status(self) -> Status:
        """Pending, or the worst of its own outcome and its children's (promise I5)."""
        if self._outcome is None:
            return Status.PENDING
        counted = (child for child in self.children if not child._replaced)  # noqa: SLF001
        return worst(self._outcome, (child.status for child in counted))

    def snapshot(self) -> bytes:
        """The Task object of ``task.get``, encoded; finished subtrees are encoded once."""
        if self._encoded is not None:
            return self._encoded
        data: dict[str, Any] = {**self.properties, **self.figures}
        if self._progress is not None:
            data["progress"] = self._progress.percent
            data["transfer"] = self._progress.describe()
        if self._cancel_requested is not None:
            data["abortionRequestedAt"] = self._cancel_requested
        if self._infos:
            data["infos"] = self._infos
        if self._warnings:
            data["warnings"] = self._warnings
        if self._error is not None:
            data["error"] = self._error
        elif self.result is not None:
            data["result"] = self.result
        described: dict[str, Any] = {"id": self.id, "start": self.start}
        if self.end is not None:
            described["end"] = self.end
        described["status"] = self.status.value
        described["data"] = scrub(data)
        if self.children:
            described["tasks"] = [msgspec.Raw(child.snapshot()) for child in self.children]
        encoded = _encode(described)
        if self.end is not None and self.parent is not None:
            self._encoded = encoded
        return encoded

    # -- inside -----------------------------------------------------------------------------

    def _note(
        self, kind: str, notes: list[dict[str, Any]], message: str, data: dict[str, Any] | None
    ) -> None:
        record: dict[str, Any] = {} if data is None else {"data": data}
        notes.append({**record, "message": message})
        self._emit(
            {**record, "message": message, "id": self.id, "timestamp": _now_ms(), "type": kind}
        )

    def _finish_with(self, error: BaseException) -> None:
        first = _first_real(error)
        if first is None:
            reason = self._cancel_reason
            self._finish(Status.CANCELED, describe_error(Canceled(reason)))
        elif isinstance(first, Canceled):
            self._finish(Status.CANCELED, describe_error(first))
        else:
            single = error if not isinstance(error, BaseExceptionGroup) else first
            described = describe_error(single)
            if not isinstance(first, ProxyError):
                self._tell_fault(first, described)
            skipped = described["message"] in SKIPPED_MESSAGES
            self._finish(Status.SKIPPED if skipped else Status.FAILURE, described)

    def _tell_fault(self, error: BaseException, described: dict[str, Any]) -> None:
        """A fault of this program: the one who mends it needs to know where it was."""
        if all(child._error != described for child in self.children):  # noqa: SLF001  told there
            text = "".join(traceback.format_exception(error))
            _log.error("internal error", task=self.id, traceback=scrub_text(text))

    def _finish(self, outcome: Status, result: Any) -> None:
        now = _now_ms()
        self.end = now
        self._outcome = outcome
        success = outcome is Status.SUCCESS
        if not success:
            self._error = result
            if outcome is Status.CANCELED and not self.cancel_requested:
                self._request_cancel_late(now)
        record: dict[str, Any] = {"status": "success" if success else "failure"}
        handed_out = self.handed_out if success else None
        if result is not None or handed_out is not None:
            record["result"] = result
        end = {**record, "id": self.id, "timestamp": now, "type": "end"}
        self._run.log.append(end, result=handed_out)
        self._touch()
        self._run.finished(self)

    def _request_cancel_late(self, now: int) -> None:
        """A task cut by an outer scope (the daemon stops) shows the request all the same."""
        self._cancel_requested = now
        self._emit(
            {
                "reason": {"message": self._cancel_reason},
                "id": self.id,
                "timestamp": now,
                "type": "abortionRequested",
            }
        )

    def _emit(self, record: dict[str, Any]) -> None:
        self._run.log.append(record)
        self._touch()

    def _touch(self) -> None:
        self._run.changed()


class Run:
    """One root task with everything below it: its log, its live tasks, who to tell."""

    def __init__(self, on_change: Callable[[Run], None], on_stored: Callable[[], object]) -> None:
        self.log = RunLog()
        self.tasks: dict[str, Task] = {}
        self.root: Task | None = None
        self.due = 0.0
        """When the feed may write it again (Trio's clock)."""
        self.snapshot_size = 0
        self.on_stored = on_stored
        """Called when the finished run is in the journal: memory may let go of it."""
        self._on_change = on_change

    def register(self, task: Task) -> None:
        if self.root is None:
            self.root = task
        self.tasks[task.id] = task

    def finished(self, task: Task) -> None:
        if task is self.root:
            self.log.close()

    def changed(self) -> None:
        if self.root is not None:
            self._on_change(self)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _first_real(error: BaseException) -> BaseException | None:
    """The first exception that is not a mere cancel; a real failure beats ``Canceled``."""
    if isinstance(error, trio.Cancelled):
        return None
    if not isinstance(error, BaseExceptionGroup):
        return error
    group = cast("BaseExceptionGroup[BaseException]", error)
    found = [real for inner in group.exceptions if (real := _first_real(inner)) is not None]
    failures = [real for real in found if not isinstance(real, Canceled)]
    return next(iter(failures or found), None)
