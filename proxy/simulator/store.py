"""The pool's database: records by class and reference, a generation, back references.

Records are never changed in place: a change makes a new ``dict``, so that an answer under
way keeps the state it was made from.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import XapiError
from proxy.simulator.records import (
    BACK_REFERENCES,
    SCHEMA,
    blank,
    coerce,
    is_null,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = dict[str, Any]
_REMEMBERED_DELETIONS = 50_000


class _Entry:
    __slots__ = ("created", "modified", "record")

    def __init__(self, record: Record, generation: int) -> None:
        self.record = record
        self.created = generation
        self.modified = generation


class Deleted:
    """A record that is gone, for ``event.from``."""

    __slots__ = ("created", "deleted", "kind", "ref")

    def __init__(self, kind: str, ref: str, created: int, deleted: int) -> None:
        self.kind = kind
        self.ref = ref
        self.created = created
        self.deleted = deleted


class Store:
    """Not thread-safe: belongs to the Trio thread.  Ids follow from ``seed``."""

    def __init__(self, seed: int = 0) -> None:
        self.generation = 1
        self.deletions: deque[Deleted] = deque(maxlen=_REMEMBERED_DELETIONS)
        self._random = random.Random(f"store {seed}")  # noqa: S311 - reproducible ids, no secret
        self._tables: dict[str, dict[str, _Entry]] = {kind: {} for kind in SCHEMA}
        self._by_uuid: dict[tuple[str, str], str] = {}
        self._changed = trio.Event()

    # Ids

    def new_uuid(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def new_ref(self) -> str:
        return f"OpaqueRef:{self.new_uuid()}"

    def new_mac(self) -> str:
        tail = self._random.getrandbits(40).to_bytes(5, "big")
        return ":".join(f"{byte:02x}" for byte in b"\x02" + tail)

    # Reading

    def get(self, kind: str, ref: Any) -> Record:
        """The record; raises ``XapiError`` ``HANDLE_INVALID(class, ref)``."""
        entry = self._tables[kind].get(ref) if isinstance(ref, str) else None
        if entry is None:
            raise XapiError("HANDLE_INVALID", [kind, str(ref)])
        return entry.record

    def find(self, kind: str, ref: str) -> Record | None:
        entry = self._tables[kind].get(ref)
        return entry.record if entry else None

    def by_uuid(self, kind: str, identifier: str) -> str:
        """The reference; raises ``XapiError`` ``UUID_INVALID(class, uuid)``."""
        ref = self._by_uuid.get((kind, identifier))
        if ref is None:
            raise XapiError("UUID_INVALID", [kind, str(identifier)])
        return ref

    def all(self, kind: str) -> Iterator[tuple[str, Record]]:
        """Reference and record of every object; may be changed while iterating."""
        for ref, entry in list(self._tables[kind].items()):
            yield ref, entry.record

    def count(self, kind: str) -> int:
        return len(self._tables[kind])

    def entries(self, kind: str) -> Iterator[tuple[str, Record, int, int]]:
        """Reference, record, generation of creation and of the last change."""
        for ref, entry in self._tables[kind].items():
            yield ref, entry.record, entry.created, entry.modified

    # Changing

    def create(self, kind: str, **fields: Any) -> str:
        """A new object; returns its reference.  Unknown fields are dropped."""
        record = blank(kind)
        for name, value in fields.items():
            if name in record:
                record[name] = coerce(kind, name, value)
        record["uuid"] = record["uuid"] or self.new_uuid()
        ref = self.new_ref()
        self._tables[kind][ref] = _Entry(record, self._bump())
        self._by_uuid[kind, record["uuid"]] = ref
        for (source, field), (target, back) in BACK_REFERENCES.items():
            if source == kind:
                self._link(target, back, record[field], ref)
        return ref

    def update(self, kind: str, ref: str, **fields: Any) -> None:
        """Change fields; nothing happens when they are equal already."""
        record = self.get(kind, ref)
        new = {name: coerce(kind, name, value) for name, value in fields.items()}
        if all(record[name] == value for name, value in new.items()):
            return
        entry = self._tables[kind][ref]
        entry.record = {**record, **new}
        entry.modified = self._bump()
        if "uuid" in new:
            del self._by_uuid[kind, record["uuid"]]
            self._by_uuid[kind, new["uuid"]] = ref
        for name, value in new.items():
            ends = BACK_REFERENCES.get((kind, name))
            if ends and record[name] != value:
                self._unlink(*ends, record[name], ref)
                self._link(*ends, value, ref)

    def touch(self, kind: str, ref: str) -> int:
        """Make an event without a change; returns its generation."""
        self.get(kind, ref)
        generation = self._bump()
        self._tables[kind][ref].modified = generation
        return generation

    def destroy(self, kind: str, ref: str) -> None:
        record = self.get(kind, ref)
        entry = self._tables[kind].pop(ref)
        del self._by_uuid[kind, record["uuid"]]
        self.deletions.append(Deleted(kind, ref, entry.created, self._bump()))
        for (source, field), (target, back) in BACK_REFERENCES.items():
            if source == kind:
                self._unlink(target, back, record[field], ref)

    def _link(self, kind: str, field: str, at: str, ref: str) -> None:
        entry = None if is_null(at) else self._tables[kind].get(at)
        if entry is not None and ref not in entry.record[field]:
            entry.record = {**entry.record, field: [*entry.record[field], ref]}
            entry.modified = self._bump()

    def _unlink(self, kind: str, field: str, at: str, ref: str) -> None:
        entry = None if is_null(at) else self._tables[kind].get(at)
        if entry is not None and ref in entry.record[field]:
            kept = [each for each in entry.record[field] if each != ref]
            entry.record = {**entry.record, field: kept}
            entry.modified = self._bump()

    # Waiting

    def _bump(self) -> int:
        self.generation += 1
        self.wake()
        return self.generation

    def wake(self) -> None:
        """Let every waiter look again."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    @property
    def changed(self) -> trio.Event:
        """Set at the next change."""
        return self._changed
