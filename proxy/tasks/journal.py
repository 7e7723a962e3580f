"""Where tasks survive the daemon: one row per root task in SQLite, and notes beside them.

The event feed needs no table of its own.  Each row carries the sequence number at which the
task was added and that of its latest change; what a token has not seen is what has a higher
number.  A deleted task keeps its row, emptied, until compaction.

Every method blocks and is called through ``in_thread(Work.JOURNAL, …)``, one at a time.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS boot (number INTEGER PRIMARY KEY, first_seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS task (
  id TEXT PRIMARY KEY, added INTEGER NOT NULL, seq INTEGER NOT NULL UNIQUE,
  status TEXT NOT NULL, job TEXT, start INTEGER NOT NULL, ended INTEGER,
  deleted INTEGER NOT NULL DEFAULT 0, snapshot BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS note (
  kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS task_start ON task (start DESC, id DESC) WHERE deleted = 0;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One root task as stored; ``snapshot`` is the encoded Task object."""

    id: str
    added: int
    seq: int
    status: str
    job: str | None
    start: int
    ended: int | None
    deleted: bool
    snapshot: bytes


_COLUMNS = "id, added, seq, status, job, start, ended, deleted, snapshot"


@dataclass(frozen=True, slots=True)
class Boots:
    """Which sequence numbers each start of the daemon began with.

    A crash of the machine may lose the last numbers, which the next start gives out again:
    a token of an earlier boot is good only for numbers that its boot kept.
    """

    journal: str
    number: int
    first_seq: dict[int, int]
    compacted: int

    def knows(self, boot: int, seq: int, last_seq: int) -> bool:
        if boot not in self.first_seq or seq < self.compacted or seq > last_seq:
            return False
        later = [first for number, first in self.first_seq.items() if number > boot]
        return not later or seq < min(later)


class Journal:
    """An open journal.  ``path`` may be ``:memory:`` for tests."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self.last_seq: int = self._db.execute("SELECT max(seq) FROM task").fetchone()[0] or 0
        self.boots = self._begin()

    @classmethod
    def open(cls, path: str) -> Journal:
        """Open or create.  A file that is no database is put aside, never deleted: a daemon
        that cannot read its history must still make backups."""
        try:
            return cls._checked(path)
        except sqlite3.DatabaseError:
            aside = f"{path}.corrupt-{int(time.time())}"
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    Path(path + suffix).rename(aside + suffix)
            return cls._checked(path)

    @classmethod
    def _checked(cls, path: str) -> Journal:
        journal = cls(path)
        verdict = journal._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            journal.close()
            raise sqlite3.DatabaseError(verdict)
        return journal

    def close(self) -> None:
        self._db.close()

    def _begin(self) -> Boots:
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO meta VALUES ('journal', ?), ('compacted', '0')",
                (secrets.token_hex(4),),
            )
            # Numbers given to tasks that are gone must not come back.
            floor = self._db.execute("SELECT max(first_seq) FROM boot").fetchone()[0] or 0
            self.last_seq = max(self.last_seq, floor, self._compacted())
            first = self.last_seq + 1
            number = self._db.execute("INSERT INTO boot (first_seq) VALUES (?)", (first,)).lastrowid
            self.last_seq = first
        assert number is not None
        identity = self._db.execute("SELECT value FROM meta WHERE key = 'journal'").fetchone()[0]
        boots = dict(self._db.execute("SELECT number, first_seq FROM boot").fetchall())
        return Boots(identity, number, boots, self._compacted())

    def _compacted(self) -> int:
        return int(self._db.execute("SELECT value FROM meta WHERE key = 'compacted'").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def save(self, rows: Iterable[Row]) -> None:
        """Store several rows at once; each replaces the row with its id."""
        rows = list(rows)
        with self._transaction():
            self._db.executemany(
                f"INSERT OR REPLACE INTO task ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608
                [
                    (r.id, r.added, r.seq, r.status, r.job, r.start, r.ended, r.deleted, r.snapshot)
                    for r in rows
                ],
            )
        self.last_seq = max(self.last_seq, *(row.seq for row in rows))

    def get(self, task_id: str) -> Row | None:
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM task WHERE id = ? AND deleted = 0",  # noqa: S608
            (task_id,),
        ).fetchone()
        return None if row is None else Row(*row)

    def after(self, seq: int, limit: int) -> list[Row]:
        """Rows that changed after ``seq``, in that order."""
        return [
            Row(*row)
            for row in self._db.execute(
                f"SELECT {_COLUMNS} FROM task WHERE seq > ? ORDER BY seq LIMIT ?",  # noqa: S608
                (seq, limit),
            )
        ]

    def newest(
        self,
        *,
        before: tuple[int, str] | None,
        limit: int,
        status: str | None = None,
        job: str | None = None,
        since: int | None = None,
    ) -> list[Row]:
        """A page of tasks, newest start first; ``before`` is the last row of the previous page."""
        where, values = ["deleted = 0"], list[Any]()
        for condition, value in (
            ("status = ?", status),
            ("job = ?", job),
            ("start >= ?", since),
        ):
            if value is not None:
                where.append(condition)
                values.append(value)
        if before is not None:
            where.append("(start, id) < (?, ?)")
            values += before
        return [
            Row(*row)
            for row in self._db.execute(
                f"SELECT {_COLUMNS} FROM task WHERE {' AND '.join(where)} "  # noqa: S608
                "ORDER BY start DESC, id DESC LIMIT ?",
                (*values, limit),
            )
        ]

    def note(self, kind: str, key: str, value: bytes | None) -> None:
        """Keep ``value`` under ``key`` until another replaces it; ``None`` forgets it."""
        if value is None:
            self._db.execute("DELETE FROM note WHERE kind = ? AND key = ?", (kind, key))
        else:
            self._db.execute("INSERT OR REPLACE INTO note VALUES (?, ?, ?)", (kind, key, value))

    def notes(self, kind: str) -> list[tuple[str, bytes]]:
        """Keys and values, by key."""
        return self._db.execute(
            "SELECT key, value FROM note WHERE kind = ? ORDER BY key", (kind,)
        ).fetchall()

    def interrupt_pending(self, now_ms: int) -> list[Row]:
        """Mark what an earlier life of the daemon left pending, whole trees; returns the rows."""
        pending = self._db.execute(
            f"SELECT {_COLUMNS} FROM task WHERE status = 'pending' AND deleted = 0"  # noqa: S608
        ).fetchall()
        rows: list[Row] = []
        seq = self.last_seq
        for raw in pending:
            row = Row(*raw)
            seq += 1
            snapshot = json.loads(row.snapshot)
            _interrupt(snapshot, now_ms)
            rows.append(
                Row(
                    row.id,
                    row.added,
                    seq,
                    snapshot["status"],
                    row.job,
                    row.start,
                    now_ms,
                    deleted=False,
                    snapshot=json.dumps(snapshot, separators=(",", ":")).encode(),
                )
            )
        if rows:
            self.save(rows)
        return rows

    def forget_old(self, keep: int, older_than_ms: int) -> list[str]:
        """Ids of finished tasks beyond ``keep`` or started before ``older_than_ms``."""
        found = self._db.execute(
            "SELECT id FROM task WHERE deleted = 0 AND status != 'pending' AND (start < ? OR "
            "id IN (SELECT id FROM task WHERE deleted = 0 ORDER BY start DESC, id DESC "
            "LIMIT -1 OFFSET ?))",
            (older_than_ms, keep),
        ).fetchall()
        return [row[0] for row in found]

    def compact(self, keep_deleted: int) -> None:
        """Drop all but the latest ``keep_deleted`` deletions; older tokens become unknown."""
        with self._transaction():
            last = self._db.execute(
                "SELECT seq FROM task WHERE deleted = 1 ORDER BY seq DESC LIMIT 1 OFFSET ?",
                (keep_deleted,),
            ).fetchone()
            if last is None:
                return
            self._db.execute("DELETE FROM task WHERE deleted = 1 AND seq <= ?", last)
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'compacted'", (str(last[0]),))
        self.boots = Boots(
            self.boots.journal, self.boots.number, self.boots.first_seq, self._compacted()
        )


_RANK = ("success", "skipped", "interrupted", "canceled", "failure")


def _interrupt(task: dict[str, Any], now_ms: int) -> None:
    """Give a pending task an end; its status becomes ``interrupted`` or a worse child's."""
    children: list[dict[str, Any]] = task.get("tasks", [])
    for child in children:
        _interrupt(child, now_ms)
    if task["status"] != "pending":
        return
    task["end"] = now_ms
    task["status"] = max(("interrupted", *(child["status"] for child in children)), key=_RANK.index)
    tail = task.pop("tasks", None)
    data = task.pop("data", {})
    task["data"] = data
    if tail is not None:
        task["tasks"] = tail
