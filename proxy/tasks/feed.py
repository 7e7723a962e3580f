"""The event feed: ``event.from``'s tokens, pages and waiters.

A change of a run marks it dirty; the flusher writes the dirty runs to the journal in one
transaction, at most four times a second each, and only then tells the waiters: a token that a
client holds is durable.  A waiter is a memory channel of one slot, so a thousand of them cost
a thousand small objects and a slow one costs nothing more.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from proxy.runtime.threads import Work, in_thread
from proxy.tasks.journal import Row

if TYPE_CHECKING:
    from proxy.tasks.journal import Journal
    from proxy.tasks.task import Run

_log = structlog.get_logger("tasks")

_INTERVAL = 0.25
_BYTES_PER_SECOND = 1_000_000
"""A run whose snapshot is large is written less often, so that the journal keeps up."""
_RETRY = 1.0
_PAGE = 1000
_RECENT = 512

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class EventPage:
    """``events`` are encoded ``{class, operation, snapshot}`` objects, oldest change first."""

    events: list[msgspec.Raw]
    token: str
    reset: bool = False


@dataclass(frozen=True, slots=True)
class _Position:
    """What a token says: everything up to ``seq`` is known; tasks added after ``base`` are new."""

    seq: int
    base: int


class Feed:
    """Writes runs to the journal and answers ``event.from``."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seq = journal.last_seq
        self._dirty: dict[Run, float] = {}
        self._added: dict[str, int] = {}
        self._recent: deque[Row] = deque(maxlen=_RECENT)
        self._wake_flusher = trio.Event()
        self._waiters: set[trio.MemorySendChannel[None]] = set()
        self._closed = False
        self._flushing = trio.Lock()

    # -- writing ---------------------------------------------------------------------------

    def changed(self, run: Run) -> None:
        """Called at every change of a run; cheap."""
        if run not in self._dirty:
            root = run.root
            assert root is not None
            self._dirty[run] = trio.current_time() if root.id not in self._added else run.due
            self._wake_flusher.set()

    async def run_flusher(self) -> None:
        """Write dirty runs when they are due, for ever."""
        while True:
            if not self._dirty:
                self._wake_flusher = trio.Event()
                await self._wake_flusher.wait()
            pause = min(self._dirty.values()) - trio.current_time()
            if pause > 0:
                self._wake_flusher = trio.Event()
                with trio.move_on_after(pause):
                    await self._wake_flusher.wait()
                continue
            try:
                await self.flush()
            except sqlite3.Error as error:
                # A full disk under the journal must not stop a backup; runs stay dirty.
                _log.error("journal not written", error=str(error))
                await trio.sleep(_RETRY)

    async def flush(self, *, everything: bool = False) -> None:
        """Write what is due (or ``everything``) and wake the waiters."""
        async with self._flushing:
            now = trio.current_time()
            due = [run for run, when in self._dirty.items() if everything or when <= now]
            if not due:
                return
            for run in due:
                del self._dirty[run]
            try:
                await self._write([self._row(run) for run in due])
            except BaseException:
                for run in due:
                    self._dirty.setdefault(run, now)
                raise
            for run in due:
                pause = max(_INTERVAL, run.snapshot_size / _BYTES_PER_SECOND)
                run.due = now + pause
                root = run.root
                assert root is not None
                if not root.pending and run not in self._dirty:
                    self._added.pop(root.id, None)
                    run.on_stored()

    def _row(self, run: Run) -> Row:
        root = run.root
        assert root is not None
        self._seq += 1
        snapshot = root.snapshot()
        run.snapshot_size = len(snapshot)
        job = root.properties.get("jobId")
        return Row(
            root.id,
            self._added.setdefault(root.id, self._seq),
            self._seq,
            root.status.value,
            None if job is None else str(job),
            root.start,
            root.end,
            deleted=False,
            snapshot=snapshot,
        )

    async def store(self, row: Row) -> None:
        """Write one row that belongs to no live run (a deletion); takes the next number."""
        async with self._flushing:
            self._seq += 1
            await self._write([dataclasses.replace(row, seq=self._seq)])

    async def _write(self, rows: list[Row]) -> None:
        await in_thread(Work.JOURNAL, self._journal.save, rows)
        self._recent.extend(rows)
        for waiter in list(self._waiters):
            try:
                waiter.send_nowait(None)
            except (trio.WouldBlock, trio.BrokenResourceError):
                continue

    # -- reading -----------------------------------------------------------------------------

    async def events(self, token: str, timeout: float) -> EventPage:
        """What ``token`` has not seen; waits up to ``timeout`` seconds for something new.

        ``''`` answers the present tasks at once.  A token that this journal does not know,
        or that is older than the last compaction, answers all present tasks with ``reset``.
        On a time-out: no events and the same token.
        """
        position = self._parse(token)
        reset = position is None and token != ""
        if position is None:
            page = await self._page(_Position(0, 0), token)
            return EventPage(page.events, page.token, reset=reset)
        send, receive = trio.open_memory_channel[None](1)
        self._waiters.add(send)  # before the first look: nothing falls between the two
        try:
            deadline = trio.current_time() + timeout
            while True:
                page = await self._page(position, token)
                if page.events or self._closed:
                    return page
                with trio.move_on_at(deadline) as scope:
                    await receive.receive()
                if scope.cancelled_caught:
                    return EventPage([], token)
        except trio.EndOfChannel:
            return EventPage([], token)
        finally:
            self._waiters.discard(send)
            send.close()
            receive.close()

    def close(self) -> None:
        """Let every waiter answer now: the daemon stops."""
        self._closed = True
        for waiter in list(self._waiters):
            waiter.close()

    def statistics(self) -> dict[str, int]:
        return {"waiters": len(self._waiters), "dirty": len(self._dirty), "seq": self._seq}

    async def _page(self, position: _Position, token: str) -> EventPage:
        rows = self._from_memory(position.seq)
        if rows is None:
            rows = await in_thread(
                Work.JOURNAL, self._journal.after, position.seq, _PAGE + 1, abandon=False
            )
        complete = len(rows) <= _PAGE
        rows = rows[:_PAGE]
        if not rows:
            known = token != "" and position.seq != 0
            return EventPage([], token if known else self._format(self._journal.last_seq, None))
        events = [event for row in rows if (event := _event(row, position.base)) is not None]
        seq = rows[-1].seq
        return EventPage(events, self._format(seq, None if complete else position.base))

    def _from_memory(self, seq: int) -> list[Row] | None:
        """The rows after ``seq``, when all of them are among the recent ones."""
        if seq >= self._journal.last_seq:
            return []
        if not self._recent or self._recent[0].seq > seq + 1:
            return None
        latest: dict[str, Row] = {}
        for row in self._recent:
            if row.seq > seq:
                latest.pop(row.id, None)
                latest[row.id] = row
        return list(latest.values())

    def _format(self, seq: int, base: int | None) -> str:
        boots = self._journal.boots
        token = f"{boots.journal}.{boots.number}.{seq}"
        return token if base is None else f"{token}.{base}"

    def _parse(self, token: str) -> _Position | None:
        parts = token.split(".")
        boots = self._journal.boots
        if len(parts) not in (3, 4) or parts[0] != boots.journal:
            return None
        try:
            boot, seq, *rest = (int(part) for part in parts[1:])
        except ValueError:
            return None
        if not boots.knows(boot, seq, self._journal.last_seq):
            return None
        return _Position(seq, rest[0] if rest else seq)


def _event(row: Row, base: int) -> msgspec.Raw | None:
    if row.deleted:
        if row.added > base:
            return None
        operation = b"del"
    else:
        operation = b"add" if row.added > base else b"mod"
    return msgspec.Raw(
        b'{"class":"Task","operation":"' + operation + b'","snapshot":' + row.snapshot + b"}"
    )
