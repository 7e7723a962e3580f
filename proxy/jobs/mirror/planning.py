"""Which backups of a source a remote is to get: those that it lacks and that would stay.

Pure: what both hold comes in, decisions come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.repository import old_entries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.repository import Backup


@dataclass(frozen=True, slots=True)
class Retention:
    """How many backups of one schedule and mode a remote keeps of a VM."""

    schedule_id: str
    mode: str
    count: int
    long_term: Mapping[str, Mapping[str, Any]]
    timezone: str | None
    keeps_all: bool = False
    """Nothing is ever removed (``skipDeleteOldEntries``)."""

    def entries(self, present: Sequence[Backup]) -> list[Backup]:
        """Those of the backups ``present`` that count."""
        return [
            backup
            for backup in present
            if backup.mode == self.mode and backup.schedule_id == self.schedule_id
        ]

    def expired(self, present: Sequence[Backup]) -> list[Backup]:
        """Those of the backups ``present`` that are too old now, oldest first."""
        if self.keeps_all:
            return []
        entries = sorted(self.entries(present), key=lambda each: each.timestamp)
        return old_entries(self.count, entries, self.long_term or None, self.timezone)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one remote is to get, and what is too old once it has it."""

    missing: list[Backup]
    """Of the source, oldest first."""
    expiring: list[Backup]
    """Of the remote, oldest first."""


@dataclass(frozen=True, slots=True)
class _Entry:
    backup: Backup
    is_ours: bool
    """On the remote, of our schedule."""
    is_missing: bool = False

    @property
    def timestamp(self) -> float:
        return self.backup.timestamp


def plan(source: Sequence[Backup], present: Sequence[Backup], retention: Retention) -> Plan:
    """Decide from what both remotes hold.

    A backup is on the remote when one of the same time and mode is, whichever job brought it.
    Of the others only those are wanted that retention would keep if every backup of ``source``
    were there: what would be removed at once is never moved.  So a backup that failed is
    wanted again by the next run, and so are older ones once the retention is raised.

    Removing what :meth:`Retention.expired` says after each of ``missing`` never removes what is
    to stay, and in the end leaves exactly that.
    """
    times = {backup.timestamp for backup in present if backup.mode == retention.mode}
    entries = [_Entry(backup, is_ours=True) for backup in retention.entries(present)]
    ours = {entry.timestamp for entry in entries}
    entries += [
        _Entry(backup, is_ours=False, is_missing=backup.timestamp not in times)
        for backup in source
        if backup.mode == retention.mode and backup.timestamp not in ours
    ]
    kept = _kept(entries, retention)
    missing = [entry for entry in kept if entry.is_missing]
    # What other jobs brought is theirs to remove: ours must be enough without it.
    own = [entry for entry in entries if entry.is_ours]
    staying = {id(entry) for entry in _kept([*own, *missing], retention)}
    return Plan(
        missing=[entry.backup for entry in missing],
        expiring=[entry.backup for entry in own if id(entry) not in staying],
    )


def _kept(entries: Sequence[_Entry], retention: Retention) -> list[_Entry]:
    """Oldest first."""
    ordered = sorted(entries, key=lambda entry: entry.timestamp)
    if retention.keeps_all:
        return ordered
    old = old_entries(retention.count, ordered, retention.long_term or None, retention.timezone)
    gone = {id(entry) for entry in old}
    return [entry for entry in ordered if id(entry) not in gone]
